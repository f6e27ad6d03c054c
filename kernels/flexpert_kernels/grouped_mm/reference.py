"""The grouped matrix products as a loop over experts in fp32, or fp64 for fp64 inputs: what the kernels must compute.

Shapes: T tokens, K active experts, N = T·K rows sorted by expert, E experts, D residual width, F FFN width, I inputs
and O outputs of a matrix. Rows past the last expert's are 0 here; the kernels leave them as they were allocated.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert_kernels.precision import wide


def experts(offsets: Tensor) -> Iterator[slice]:
    """Rows of each expert."""
    return (slice(begin, end) for begin, end in itertools.pairwise(offsets.tolist()))


def tokens(x: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    """The token of each row, [N, ·]."""
    return x[order_N // top_k]


def rows(
    x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool = False, order_N: Tensor | None = None, top_k: int = 1
) -> Tensor:
    """`y_n = W_e x_n`, or `W_eᵀ x_n`: [N, O] in the inputs' dtype."""
    x_NI = wide(x if order_N is None else tokens(x, order_N, top_k))
    weight_EOI = wide(weight.mT if transposed else weight)
    y_NO = x_NI.new_zeros(len(x_NI), weight_EOI.shape[1])
    for mine, weight_OI in zip(experts(offsets), weight_EOI, strict=True):
        y_NO[mine] = x_NI[mine] @ weight_OI.T
    return y_NO.to(x.dtype)


def up(x_TD: Tensor, order_N: Tensor, top_k: int, gate_up_E2FD: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """`h_n = W_gate_up x_t` and `silu(gate) ⊙ up`: [N, 2F] and [N, F] in the inputs' dtype."""
    h_N2F = rows(wide(x_TD), wide(gate_up_E2FD).flatten(1, 2), offsets, order_N=order_N, top_k=top_k)
    gate_NF, up_NF = h_N2F.chunk(2, dim=-1)
    return h_N2F.to(x_TD.dtype), (F.silu(gate_NF) * up_NF).to(x_TD.dtype)


def outer(
    y: Tensor,
    x: Tensor,
    offsets: Tensor,
    order_N: Tensor | None = None,
    top_k: int = 1,
    gathered: str | None = None,
    out: Tensor | None = None,
    beta: int = 0,
) -> Tensor:
    """`Σ_n y_n x_nᵀ` over each expert's rows, [E, O, I]: in `out` (fp32), to which it is added if `beta` is 1."""
    if gathered is not None:
        assert order_N is not None, "tokens are found by order_N"
    y_NO = wide(tokens(y, order_N, top_k) if gathered == "y" and order_N is not None else y)
    x_NI = wide(tokens(x, order_N, top_k) if gathered == "x" and order_N is not None else x)
    weight_EOI = torch.stack([y_NO[mine].T @ x_NI[mine] for mine in experts(offsets)])
    if out is None:
        return weight_EOI.to(x.dtype)
    return out.mul_(beta).add_(weight_EOI) if beta else out.copy_(weight_EOI)
