"""How a kernel is started."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flexpert_kernels.tuning import Config, chosen

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
