"""The expert layer in plain matrix products, one expert after another, on any device.

Shapes: T tokens, D residual width, F FFN width, E experts, K active experts, N = T·K pairs of a token and an expert of
its. The definition is `reference.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def gated(gate_up: Tensor) -> Tensor:
    """`silu(gate) ⊙ up` of [..., 2F], the two side by side."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def each(stacked: Tensor) -> Sequence[Tensor]:
    """An expert's matrix each. The gradients are stacked once, a single expert's not even copied."""
    return (stacked.squeeze(0),) if len(stacked) == 1 else stacked.unbind()


def dense_mixing(x_TD: Tensor, probs_TE: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Every expert on every token: `y = Σ_e W2_e (p_e ⊙ silu(W1_e x) ⊙ W3_e x)`, [T, D].

    The router weight is applied before the down projection, so experts' outputs are never held side by side.
    """
    y_TD = None
    for probs_T, gate_up_2FD, down_DF in zip(probs_TE.unbind(1), each(gate_up_E2FD), each(down_EDF), strict=True):
        part_TD = F.linear(gated(F.linear(x_TD, gate_up_2FD.flatten(0, 1))) * probs_T[:, None], down_DF)
        y_TD = part_TD if y_TD is None else y_TD + part_TD
    assert y_TD is not None, "a group holds at least one expert"
    return y_TD


def moe_ffn(x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Each token through its own experts: `y_t = Σ_k w_tk · E_{indices_tk}(x_t)`, [T, D]; no token is dropped.

    Pairs of a token and its expert are sorted by expert, so that each expert reads consecutive rows. Indices outside
    [0, E) belong to experts held elsewhere and add nothing. A token's experts are summed in the order of its choices
    and nothing is added atomically: the result and its gradients are deterministic.
    """
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        x_TD, gate_up_E2FD, down_EDF = x_TD.to(dtype), gate_up_E2FD.to(dtype), down_EDF.to(dtype)
    experts_N, order_N = indices_TK.flatten().sort(stable=True)
    starts = torch.searchsorted(experts_N, torch.arange(len(down_EDF) + 1, device=experts_N.device))
    places_TK = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
    places_TK = places_TK.view_as(indices_TK)
    x_ND = Spread.apply(x_TD, order_N, places_TK)  # type: ignore[no-untyped-call]
    weights_N = Permute.apply(weights_TK.flatten(), order_N, places_TK.flatten())  # type: ignore[no-untyped-call]
    hidden_NF = gated(GroupedLinear.apply(x_ND, gate_up_E2FD.flatten(1, 2), starts))  # type: ignore[no-untyped-call]
    hidden_NF = hidden_NF * weights_N[:, None].to(hidden_NF.dtype)
    y_ND = GroupedLinear.apply(hidden_NF, down_EDF, starts)  # type: ignore[no-untyped-call]
    y_TD: Tensor = Gather.apply(y_ND, order_N, places_TK)  # type: ignore[no-untyped-call]
    return y_TD


def spread(x_TD: Tensor, order_N: Tensor, places_TK: Tensor) -> Tensor:
    """Tokens' rows in the order of their experts, [N, D]."""
    return x_TD[order_N // places_TK.shape[1]]


def gather(y_ND: Tensor, places_TK: Tensor) -> Tensor:
    """The sum of each token's K rows, [T, D]: the transpose of `spread`."""
    return y_ND[places_TK].sum(1)


class Spread(torch.autograd.Function):
    """`spread`, whose backward pass gathers too: PyTorch's own would add row by row."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, places_TK: Tensor) -> Tensor:
        ctx.save_for_backward(places_TK)
        return spread(x_TD, order_N, places_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return gather(grads[0], *ctx.saved_tensors), None, None


class Gather(torch.autograd.Function):
    """`gather`, with `spread` as its backward pass."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, order_N: Tensor, places_TK: Tensor) -> Tensor:
        ctx.save_for_backward(order_N, places_TK)
        return gather(y_ND, places_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return spread(grads[0], *ctx.saved_tensors), None, None


class Permute(torch.autograd.Function):
    """`x_N[order_N]`; `places_N` is the inverse of the permutation `order_N`."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, order_N: Tensor, places_N: Tensor) -> Tensor:
        ctx.save_for_backward(places_N)
        return x_N[order_N]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.saved_tensors[0]], None, None


class GroupedLinear(torch.autograd.Function):
    """`y_n = W_e x_n` for rows starts[e] ≤ n < starts[e+1]; 0 for rows outside of all. I inputs, O outputs."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_EOI: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, weight_EOI, starts)
        return torch.ops.flexpert.grouped_rows(x_NI, weight_EOI.mT, starts)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_NI, weight_EOI, starts = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = torch.ops.flexpert.grouped_rows(grads[0], weight_EOI, starts) if need_x else None
        grad_weight = torch.ops.flexpert.grouped_outer(grads[0], x_NI, starts) if need_weight else None
        return grad_x, grad_weight, None


def grouped_rows(x_NI: Tensor, weight_EIO: Tensor, starts: Tensor) -> Tensor:
    """Each expert's rows times its matrix, [N, O]."""
    y_NO = x_NI.new_empty(len(x_NI), weight_EIO.shape[2])
    bounds = starts.tolist()
    y_NO[: bounds[0]] = 0
    y_NO[bounds[-1] :] = 0
    for first, last, weight_IO in zip(bounds, bounds[1:], weight_EIO.unbind(), strict=False):
        torch.mm(x_NI[first:last], weight_IO, out=y_NO[first:last])
    return y_NO


def grouped_outer(y_NO: Tensor, x_NI: Tensor, starts: Tensor) -> Tensor:
    """Each expert's `Σ_n y_n x_nᵀ`, [E, O, I]; 0 for an expert without rows."""
    bounds = starts.tolist()
    weight_EOI = x_NI.new_empty(len(bounds) - 1, y_NO.shape[1], x_NI.shape[1])
    for first, last, weight_OI in zip(bounds, bounds[1:], weight_EOI.unbind(), strict=False):
        torch.mm(y_NO[first:last].T, x_NI[first:last], out=weight_OI)
    return weight_EOI


def like_rows(x_NI: Tensor, weight_EIO: Tensor, starts: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_EIO.shape[2])


def like_outer(y_NO: Tensor, x_NI: Tensor, starts: Tensor) -> Tensor:
    return x_NI.new_empty(starts.shape[0] - 1, y_NO.shape[1], x_NI.shape[1])


# Operators to PyTorch, whose compiler is told their shapes and does not look inside: which rows are whose depends on
# the text. By hand, because what `torch.library.custom_op` makes takes longer to call than a small product.
_library = torch.library.Library("flexpert", "FRAGMENT")  # type: ignore[no-untyped-call]
for _operator, _shape in ((grouped_rows, like_rows), (grouped_outer, like_outer)):
    _name = _operator.__name__
    _schema = torch.library.infer_schema(_operator, mutates_args=(), op_name=_name)
    _library.define(_schema)  # type: ignore[no-untyped-call]
    _library.impl(_name, _operator, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"flexpert::{_name}", _shape, lib=_library)
