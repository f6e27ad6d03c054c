"""Which way the expert layer is computed, where the caller leaves it open."""

import importlib.util
import logging
import os

import torch
from torch import Tensor

from flexpert_kernels.precision import result_dtype
from flexpert_kernels.route import MAX_EXPERTS

logger = logging.getLogger("flexpert_kernels")

#: Where an expert has at least so many rows, and there are few experts, one library product each is hard to beat
#: (pytorch issues 163425 and 185530). `benchmarks/gpu_moe.py` times both; no GPU has yet been asked.
FEW_EXPERTS, MANY_ROWS = 2, 8192


#: What a caller can ask for.
BACKENDS = ("auto", "reference", "dense", "loop", "grouped_mm", "triton")
#: Of the two ways through PyTorch's products, the faster one on a CPU.
ON_CPU = "loop"


#: Choices, with their reasons, that have been logged.
told: set[tuple[str, str]] = set()


def choose(
    num_experts: int,
    top_k: int,
    num_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    widths: tuple[int, ...],
    is_part: bool = False,
) -> str:
    """A backend of `moe_ffn`. Its name and why are logged, once each.

    Args:
        num_experts: held here, E.
        top_k: experts of each token, K.
        num_rows: pairs of a token and an expert of its, T·K.
        dtype: of the products.
        device: where the tensors are.
        widths: of the rows that kernels would read, D and F.
        is_part: some of a token's experts are held elsewhere.
    """
    level, lacks = logging.INFO, lacking(device, dtype, widths, num_experts)
    if top_k == num_experts and not is_part:
        backend, reason = "dense", "every expert is active, so there is nothing to sort"
    elif device.type != "cuda":
        backend, reason = ON_CPU, "there is no GPU"
    elif lacks:
        backend, reason, level = "loop", lacks, logging.WARNING
    elif num_experts <= FEW_EXPERTS and num_rows >= MANY_ROWS * num_experts:
        backend, reason = "loop", f"products of at most {FEW_EXPERTS} experts with {MANY_ROWS} rows each are large"
    else:
        backend, reason = "triton", f"{num_experts} experts share the rows"
    tell(level, backend, reason)
    return backend


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def tell(level: int, backend: str, reason: str) -> None:
    """Once each."""
    if (backend, reason) not in told:
        told.add((backend, reason))
        logger.log(level, "expert layers are computed by the backend %s: %s", backend, reason)


def lacking(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...] = (), num_experts: int = 1) -> str:
    """What keeps the Triton kernels from computing a layer there; empty: nothing."""
    lacks: str = missing(device)
    if lacks:
        return lacks
    if dtype not in (torch.bfloat16, torch.float16) and device.type == "cuda":
        return f"{dtype} is not for tensor cores"
    if any(width * dtype.itemsize % 16 for width in widths):
        return f"rows of {' or '.join(map(str, widths))} are not multiples of 16 bytes"
    return f"{num_experts} experts are more than {MAX_EXPERTS}" if num_experts > MAX_EXPERTS else ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def missing(device: torch.device) -> str:
    """What any Triton kernel lacks on a device; empty: nothing. Triton's interpreter needs no GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if device.type != "cuda":
        return "there is no GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return "the GPU is older than sm_80" if torch.cuda.get_device_capability(device) < (8, 0) else ""


def computed_dtype(x: Tensor) -> torch.dtype:
    """Of the products: the result's; fp32 for half precision on a CPU, where its backward pass crawls."""
    dtype = result_dtype(x)
    return torch.float32 if dtype.itemsize == 2 and x.device.type == "cpu" and missing(x.device) else dtype


def elementwise(x: Tensor, num_experts: int = 1) -> str:
    """The backend of what has no products in it."""
    return "loop" if missing(x.device) or x.dtype == torch.float64 or num_experts > MAX_EXPERTS else "triton"
