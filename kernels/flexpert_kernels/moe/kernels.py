"""Backend `triton`: this package's kernels as operators of PyTorch. Importing it imports Triton.

Shapes as in `layer.py`. Each `like_…` tells PyTorch's compiler what the kernel's results look like.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexpert_kernels.combine import triton as combining
from flexpert_kernels.grouped_mm import triton as grouped
from flexpert_kernels.moe.backends import Backend
from flexpert_kernels.operators import register
from flexpert_kernels.route import triton as routing
from flexpert_kernels.swiglu import triton as gating


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Launched on the device that its first argument is on, whichever is current."""

    @functools.wraps(function)
    def run(*args: Any, **keys: Any) -> Any:
        with torch.cuda.device_of(args[0]):  # type: ignore[no-untyped-call]
            return function(*args, **keys)

    return run


def route_of(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`route` without bias, which is in the logits, and without renormalisation."""
    return routing.route(logits_TE, top_k)


def like_route(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    probs_TE = torch.empty_like(logits_TE, dtype=torch.float32)
    weights_TK = probs_TE.new_empty(logits_TE.shape[0], top_k)
    return probs_TE, weights_TK, weights_TK.long(), probs_TE.new_empty(logits_TE.shape[0])


def like_sort(indices_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    numbers = indices_TK.new_empty(0, dtype=torch.int32)
    order_N = numbers.new_empty(indices_TK.shape[0] * indices_TK.shape[1])
    return order_N, numbers.new_empty(indices_TK.shape), numbers.new_empty(num_experts + 1)


def like_up(x: Tensor, order_N: Tensor, top_k: int, gate_up_E2FD: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = order_N.shape[0], gate_up_E2FD.shape[2]
    return x.new_empty(rows, 2 * width), x.new_empty(rows, width)


def like_rows(
    x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool = False, order_N: Tensor | None = None, top_k: int = 1
) -> Tensor:
    return x.new_empty((x if order_N is None else order_N).shape[0], weight.shape[2 if transposed else 1])


def outer_y(y: Tensor, x: Tensor, offsets: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    """`outer`, which gathers y. Into new memory: a schema would have to say that it writes into the caller's."""
    return grouped.outer(y, x, offsets, order_N, top_k, "y")


def outer_x(y: Tensor, x: Tensor, offsets: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    """Likewise; gathers x."""
    return grouped.outer(y, x, offsets, order_N, top_k, "x")


def like_outer(y: Tensor, x: Tensor, offsets: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, y.shape[1], x.shape[1])


def like_combine(y_ND: Tensor, places_TK: Tensor, weights_TK: Tensor | None, offsets: Tensor) -> Tensor:
    return y_ND.new_empty(places_TK.shape[0], y_ND.shape[1])


def combine_backward_of(
    dz_TD: Tensor, y_ND: Tensor, weights_TK: Tensor, places_TK: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """`combine_backward` with weights: an operator returns as many tensors each time."""
    dy_ND, dweights_TK = combining.combine_backward(dz_TD, y_ND, weights_TK, places_TK, offsets)
    assert dweights_TK is not None
    return dy_ND, dweights_TK


def like_combine_backward(
    dz_TD: Tensor, y_ND: Tensor, weights_TK: Tensor, places_TK: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y_ND), torch.empty_like(weights_TK)


def like_swiglu(h_N2F: Tensor, weights_N: Tensor | None = None, num_rows: Tensor | None = None) -> Tensor:
    return h_N2F.new_empty(h_N2F.shape[0], h_N2F.shape[1] // 2)


def swiglu_backward_of(
    h_N2F: Tensor, da_NF: Tensor, weights_N: Tensor, num_rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`swiglu_backward` with weights: an operator returns as many tensors each time."""
    dh_N2F, a_NF, dweights_N = gating.swiglu_backward(h_N2F, da_NF, weights_N, num_rows)
    assert dweights_N is not None
    return dh_N2F, a_NF, dweights_N


def like_swiglu_backward(
    h_N2F: Tensor, da_NF: Tensor, weights_N: Tensor, num_rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(h_N2F), torch.empty_like(da_NF), weights_N.new_empty(weights_N.shape, dtype=torch.float32)


ROUTE = register(guarded(route_of), like_route)
BACKEND = Backend(
    sort=register(guarded(routing.sort_by_expert), like_sort),
    up=register(guarded(grouped.up), like_up),
    rows=register(guarded(grouped.rows), like_rows),
    outer_y=register(guarded(outer_y), like_outer),
    outer_x=register(guarded(outer_x), like_outer),
    combine=register(guarded(combining.combine), like_combine),
    combine_backward=register(guarded(combine_backward_of), like_combine_backward),
    swiglu=register(guarded(gating.swiglu), like_swiglu),
    swiglu_backward=register(guarded(swiglu_backward_of), like_swiglu_backward),
    gathers=True,
)
