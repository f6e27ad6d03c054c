"""Collectives with gradients, each the other's transpose. `group` is a process group; one of one rank costs nothing.

megatron-core has the same set; its sequence-parallel ones ask for the current CUDA device, which a CPU run does not
have, and its all-reduce leaves an input that is not contiguous as it was.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional

# PyTorch 2.13 has renamed them.
_gather = getattr(functional, "all_gather_single", functional.all_gather_tensor)
_scatter = getattr(functional, "reduce_scatter_single", functional.reduce_scatter_tensor)


def waited(x: Tensor) -> Tensor:
    done: Tensor = functional.wait_tensor(x)  # type: ignore[no-untyped-call]
    return done


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over ranks, in new memory."""
    return waited(functional.all_reduce(x.contiguous(), "sum", group))


def all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Every rank's part, end to end along `dim`, in the order of the ranks; parts are of equal size."""
    moved = x.movedim(dim, 0).contiguous()
    out = waited(_gather(moved, 0, group))
    return out.movedim(0, dim).contiguous()  # once, and not in each of the products that read it


def sum_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part along `dim` of the sum over ranks."""
    moved = x.movedim(dim, 0).contiguous()
    assert moved.shape[0] % group.size() == 0, "parts are of equal size"
    return waited(_scatter(moved, "sum", 0, group)).movedim(0, dim)


def exchange(x: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    """All-to-all of rows: `sent[r]` consecutive ones go to rank r, `received[r]` come from it."""
    return waited(functional.all_to_all_single(x.contiguous(), received, sent, group))


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return sum_scatter(grads[0], ctx.dim, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return sum_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grads[0], ctx.dim, ctx.group), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return exchange(x, received, sent, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(grads[0], ctx.sent, ctx.received, ctx.group), None, None, None


def copy_to(x: Tensor, group: ProcessGroup) -> Tensor:
    """The same tensor; its gradient is the sum of what the ranks, each with a part of the work, have of it."""
    return x if group.size() == 1 else _Copy.apply(x, group)  # type: ignore[no-untyped-call]


def reduce_from(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over ranks; every rank has the whole gradient."""
    return x if group.size() == 1 else _Reduce.apply(x, group)  # type: ignore[no-untyped-call]


def gather_to(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """All parts along `dim`; the gradient is summed over the ranks and scattered."""
    return x if group.size() == 1 else _Gather.apply(x, dim, group)  # type: ignore[no-untyped-call]


def scatter_from(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part of the sum over ranks; the gradient is gathered."""
    return x if group.size() == 1 else _Scatter.apply(x, dim, group)  # type: ignore[no-untyped-call]


def exchange_rows(x: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    """As `exchange`; the gradient takes the way back."""
    if group.size() == 1:
        return x
    arrived: Tensor = _Exchange.apply(x, received, sent, group)  # type: ignore[no-untyped-call]
    return arrived
