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


class Way:
    """The way of an all-to-all of rows.

    Args:
        sent: how many of them, consecutive ones, go to each rank.
        received: how many come from each.
        group: of the ranks.

    Attributes:
        gradient: the rows' on their way back, from when the backward pass meets the end of the exchange until it meets
            its start. It cannot be handed on as a gradient: it has the shape of the rows that were sent.
    """

    def __init__(self, sent: list[int], received: list[int], group: ProcessGroup) -> None:
        self.sent, self.received, self.group = sent, received, group
        self.gradient: Tensor | None = None

    def back(self) -> "Way":
        return Way(self.received, self.sent, self.group)

    def send(self, x: Tensor) -> Tensor:
        """Rows under way, until `waited` says otherwise."""
        rows: Tensor = torch.ops._c10d_functional.all_to_all_single(
            x.contiguous(), self.received, self.sent, self.group.group_name
        )
        return rows


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


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return way.send(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.way.gradient = ctx.way.gradient, None
        return waited(gradient), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return waited(x).view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.way.gradient = ctx.way.back().send(grads[0])
        return grads[0], None


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


def start_exchange(x: Tensor, way: Way) -> Tensor:
    """Send rows on a way of their own; what is returned, nothing but `finish_exchange` may read.

    Their gradient starts on its way back where the backward pass meets the finish, and is waited for where it meets the
    start: what is computed between the two, in either direction, goes on beside the exchange.
    """
    return _Start.apply(x, way)  # type: ignore[no-untyped-call, no-any-return]


def finish_exchange(x: Tensor, way: Way) -> Tensor:
    """The rows that arrived."""
    return _Finish.apply(x, way)  # type: ignore[no-untyped-call, no-any-return]
