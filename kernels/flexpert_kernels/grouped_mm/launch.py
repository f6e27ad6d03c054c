"""What the wrappers share: how a kernel is started, and checks of its arguments."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flexpert_kernels.tuning import Config, chosen

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED_PROGRAMS = 4


@dataclass(frozen=True)
class Plan:
    """How a kernel is started: its tiles, how many programs share them, and whether TMA may read where it can."""

    config: Config
    programs: int
    tma: bool


def plan(kernel: str, n: int, k: int, x: Tensor) -> Plan:
    """For a product whose matrices are n × k: a program for each multiprocessor, on which it stays."""
    return Plan(chosen(kernel, n, k, x.dtype, x.device), *resources(x.device))


@functools.cache
def resources(device: torch.device) -> tuple[int, bool]:
    """Multiprocessors, and whether there is TMA."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS, False
    return (
        torch.cuda.get_device_properties(device).multi_processor_count,
        torch.cuda.get_device_capability(device) >= (9, 0),
    )


def fits_tma(*tensors: Tensor) -> bool:
    """TMA reads tensors that start at a multiple of 16 bytes, as do their rows."""
    return all(x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0 for x in tensors)


def descriptor(x: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """Describes `x` to TMA, which reads it in blocks; what lies outside of its bounds reads as 0."""
    return TensorDescriptor.from_tensor(x, list(block))


def check(**tensors: Tensor) -> None:
    """One device, one supported dtype, dense and in order."""
    first, x = next(iter(tensors.items()))
    if x.dtype not in DTYPES:
        raise ValueError(f"{first} is {x.dtype}; the kernels take {', '.join(str(dtype) for dtype in DTYPES)}")
    for name, other in tensors.items():
        if other.dtype != x.dtype:
            raise ValueError(f"{name} is {other.dtype}, {first} is {x.dtype}; both must be the same")
        check_layout(name, other, x.device)
    if x.device.type == "cpu":
        if not triton.knobs.runtime.interpret:
            raise ValueError(f"{first} is on the CPU, where Triton's kernels only run with TRITON_INTERPRET=1")
        if x.dtype == torch.bfloat16:
            raise ValueError(f"{first} is bfloat16, which Triton's interpreter multiplies wrongly")


def check_layout(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; the other arguments are on {device}")
    if not x.is_contiguous():
        raise ValueError(f"{name} of shape {tuple(x.shape)} has strides {x.stride()}; it must be contiguous")


def check_shape(name: str, x: Tensor, shape: Sequence[int | None]) -> None:
    """None: any size."""
    if x.dim() != len(shape) or any(size not in (None, has) for size, has in zip(shape, x.shape, strict=True)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has the shape {tuple(x.shape)}; expected ({expected})")


def check_index(name: str, x: Tensor, length: int | None, device: torch.device) -> None:
    if x.dtype != torch.int32:
        raise ValueError(f"{name} is {x.dtype}; expected torch.int32")
    check_shape(name, x, (length,))
    check_layout(name, x, device)


def check_tokens(name: str, x: Tensor, order_N: Tensor, top_k: int) -> None:
    """`order_N // top_k` must be rows of `x`."""
    if top_k < 1 or len(order_N) != len(x) * top_k:
        raise ValueError(f"order_N has {len(order_N)} pairs; expected {len(x)} rows of {name} times top_k = {top_k}")
