"""What `moe_ffn` says of arguments that do not fit, before anything is computed."""

from typing import Any

import torch
from torch import Tensor

from flexpert_kernels.moe.dispatch import BACKENDS, missing

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_moe(
    x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, backend: str,
    checked: bool,
) -> None:  # fmt: skip
    """Raises `ValueError` naming the argument, what it should be and what it is; `checked`: indices are read, too."""
    tensors = {"weights_TK": weights_TK, "indices_TK": indices_TK, "gate_up_E2FD": gate_up_E2FD, "down_EDF": down_EDF}
    for name, dims in {"weights_TK": 2, "indices_TK": 2, "gate_up_E2FD": 4, "down_EDF": 3}.items():
        expect(tensors[name].dim() == dims, name, f"{dims} dimensions", f"{tensors[name].dim()}")
        expect(tensors[name].device == x_TD.device, name, f"x_TD's device {x_TD.device}", tensors[name].device)
    expect(x_TD.dim() == 2, "x_TD", "2 dimensions", x_TD.dim())
    (tokens, width), (experts, _, ffn) = x_TD.shape, down_EDF.shape
    shape_TK = (tokens, indices_TK.shape[1])
    for name, shape in {
        "indices_TK": shape_TK, "weights_TK": shape_TK, "gate_up_E2FD": (experts, 2, ffn, width),
        "down_EDF": (experts, width, ffn),
    }.items():  # fmt: skip
        expect(tensors[name].shape == shape, name, f"shape {list(shape)}", list(tensors[name].shape))
    for name, tensor in {"x_TD": x_TD, **tensors}.items():
        allowed = (torch.int32, torch.int64) if name == "indices_TK" else FLOATS
        expect(tensor.dtype in allowed, name, f"type {' or '.join(map(str, allowed))}", tensor.dtype)
    for name in ("gate_up_E2FD", "down_EDF"):
        is_cast = torch.is_autocast_enabled(x_TD.device.type)
        expect(is_cast or tensors[name].dtype == x_TD.dtype, name, f"x_TD's type {x_TD.dtype}", tensors[name].dtype)
    expect(backend in BACKENDS, "backend", f"{', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}", backend)
    if backend in ("triton", "grouped_mm"):
        for name in ("gate_up_E2FD", "down_EDF"):
            expect(tensors[name].is_contiguous(), name, "contiguous memory", f"strides {tensors[name].stride()}")
        of_rows = width * x_TD.element_size() % 16 == ffn * x_TD.element_size() % 16 == 0
        expect(of_rows, "down_EDF", f"rows of multiples of 16 bytes for backend {backend}", [width, ffn])
    if backend == "triton":
        lacks = missing(x_TD.device)
        expect(not lacks, "backend", "a CUDA device of sm_80 or newer, and Triton", f"triton, where {lacks}, is")
    if checked and indices_TK.numel():
        largest = int(indices_TK.max())
        expect(largest < experts, "indices_TK", f"experts below {experts}", largest)


def expect(is_so: bool, name: str, expected: str, given: Any) -> None:
    if not is_so:
        raise ValueError(f"{name}: {expected} expected, {given} given")
