"""What the layer's functions say of arguments that do not fit, before anything is computed."""

from typing import Any

import torch
from torch import Tensor

from flexpert_kernels.arguments import KERNEL_FLOATS, check_count, check_same, check_tensors, expect
from flexpert_kernels.moe.dispatch import BACKENDS, computed_dtype, missing
from flexpert_kernels.route import MAX_EXPERTS, Order
from flexpert_kernels.route.reference import MOST_EXPERTS


def check_moe(
    x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, backend: str,
    checked: bool,
) -> None:  # fmt: skip
    """`checked`: indices are read, too."""
    matrices = {"gate_up_E2FD": gate_up_E2FD, "down_EDF": down_EDF}
    check_tensors({"x_TD": x_TD, "weights_TK": weights_TK, **matrices}, {"indices_TK": indices_TK})
    check_matrices(x_TD, matrices)
    expect(backend in BACKENDS, "backend", f"{', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}", backend)
    experts, width, ffn = down_EDF.shape
    if backend in ("triton", "grouped_mm"):
        dtype = computed_dtype(x_TD)
        expect(dtype in KERNEL_FLOATS, "x_TD", f"bf16, fp16 or fp32 for backend {backend}", dtype)
        for name, x in matrices.items():
            expect(x.is_contiguous(), name, f"contiguous memory for backend {backend}", f"strides {x.stride()}")
        fits, sizes = width * dtype.itemsize % 16 == ffn * dtype.itemsize % 16 == 0, f"D = {width}, F = {ffn}"
        expect(fits, " and ".join(matrices), f"rows of multiples of 16 bytes for backend {backend}", sizes)
    if backend == "triton":
        lacks = missing(x_TD.device)
        expect(not lacks, "backend", "a CUDA device of sm_80 or newer, and Triton", f"triton, where {lacks}, is")
        expect(experts <= MAX_EXPERTS, "backend", f"another for more than {MAX_EXPERTS} experts", "triton")
    if checked and indices_TK.numel():
        largest = int(indices_TK.max())
        expect(largest < experts, "indices_TK", f"experts below {experts}", largest)


def check_mixing(x_TD: Tensor, probs_TE: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> None:
    matrices = {"gate_up_E2FD": gate_up_E2FD, "down_EDF": down_EDF}
    check_tensors({"x_TD": x_TD, "probs_TE": probs_TE, **matrices})
    check_matrices(x_TD, matrices)


def check_matrices(x_TD: Tensor, matrices: dict[str, Tensor]) -> None:
    """Of x's type, unless autocast makes them so."""
    if not torch.is_autocast_enabled(x_TD.device.type):
        check_same("type", {"x_TD": x_TD.dtype, **{name: x.dtype for name, x in matrices.items()}})
    check_count("the number of experts", len(matrices["down_EDF"]), MOST_EXPERTS)


def check_route(logits_TE: Tensor, top_k: int) -> None:
    check_tensors({"logits_TE": logits_TE})
    check_count("top_k", top_k, logits_TE.shape[1])


def check_sort(indices_TK: Tensor, num_experts: int) -> None:
    check_tensors({}, {"indices_TK": indices_TK})
    check_count("num_experts", num_experts, MOST_EXPERTS)


def check_order(order: Any, **floats: Tensor) -> None:
    """Tokens, rows or weights that go with an order."""
    expect(isinstance(order, Order), "order", "what sort_by_expert returned", type(order).__name__)
    check_tensors(floats, {"order.order_N": order.order_N, "order.places_TK": order.places_TK})
