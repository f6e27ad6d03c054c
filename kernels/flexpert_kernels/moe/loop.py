"""Backends `loop` and `grouped_mm`: products of PyTorch's, for each expert in turn or for all in one call.

The loop needs the offsets on the host, where they are brought once for all products of a layer;
`torch.nn.functional.grouped_mm` takes them on the device.

Shapes: N rows (pairs of a token and an expert of its) in the order of their experts; F FFN width, E experts; offsets
[E+1] are each expert's first row, and the last one's end. I inputs and O outputs of a product.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert_kernels.operators import register
from flexpert_kernels.swiglu import reference

#: Elements of each operand in a block of rows.
BLOCK = 1 << 17


def loop_rows(x_NI: Tensor, weight_EIO: Tensor, offsets: Tensor) -> Tensor:
    """Each row times its expert's matrix, [N, O]; 0 past offsets[E]."""
    y_NO = x_NI.new_empty(len(x_NI), weight_EIO.shape[2])
    bounds = offsets.tolist()
    y_NO[bounds[-1] :] = 0
    for first, last, weight_IO in zip(bounds, bounds[1:], weight_EIO.unbind(), strict=False):
        torch.mm(x_NI[first:last], weight_IO, out=y_NO[first:last])
    return y_NO


def loop_outer(y_NO: Tensor, x_NI: Tensor, offsets: Tensor) -> Tensor:
    """Each expert's `Σ_n y_n x_nᵀ`, [E, O, I]; 0 for an expert without rows."""
    bounds = offsets.tolist()
    weight_EOI = x_NI.new_empty(len(bounds) - 1, y_NO.shape[1], x_NI.shape[1])
    for first, last, weight_OI in zip(bounds, bounds[1:], weight_EOI.unbind(), strict=False):
        torch.mm(y_NO[first:last].T, x_NI[first:last], out=weight_OI)
    return weight_EOI


def grouped_rows(x_NI: Tensor, weight_EIO: Tensor, offsets: Tensor) -> Tensor:
    """As `loop_rows`; rows past offsets[E] are nobody's there, and become 0."""
    y_NO = F.grouped_mm(x_NI, weight_EIO, offs=offsets[1:].int())
    is_past_N = torch.arange(len(x_NI), device=x_NI.device) >= offsets[-1]
    return y_NO.masked_fill_(is_past_N[:, None], 0)


def grouped_outer(y_NO: Tensor, x_NI: Tensor, offsets: Tensor) -> Tensor:
    """As `loop_outer`."""
    return F.grouped_mm(y_NO.T, x_NI, offs=offsets[1:].int())


def like_rows(x_NI: Tensor, weight_EIO: Tensor, offsets: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_EIO.shape[2])


def like_outer(y_NO: Tensor, x_NI: Tensor, offsets: Tensor) -> Tensor:
    return x_NI.new_empty(offsets.shape[0] - 1, y_NO.shape[1], x_NI.shape[1])


class Products:
    """One way to multiply each expert's rows; its methods are a `Backend`'s.

    Args:
        rows: operator `(x_NI, weight_EIO, offsets) → y_NO`.
        outer: operator `(y_NO, x_NI, offsets) → weight_EOI`.
        swiglu: what follows gate and up.
    """

    def __init__(
        self,
        rows: Callable[..., Tensor],
        outer: Callable[..., Tensor],
        swiglu: Callable[..., Tensor] = reference.swiglu,
    ) -> None:
        self._rows, self.outer, self._swiglu = rows, outer, swiglu

    def up(self, x_ND: Tensor, gate_up_E2FD: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Both projections of each row side by side, [N, 2F], and `silu(gate) ⊙ up`, [N, F]."""
        h_N2F = self.rows(x_ND, gate_up_E2FD.flatten(1, 2), offsets)
        return h_N2F, self._swiglu(h_N2F)

    def rows(self, x_NI: Tensor, weight: Tensor, offsets: Tensor, transposed: bool = False) -> Tensor:
        """`W_e x_n`, [N, O], weight [E, O, I]; transposed: `W_eᵀ x_n`, weight [E, I, O]. 0 past offsets[E]."""
        y_NO: Tensor = self._rows(x_NI, weight if transposed else weight.mT, offsets)
        return y_NO


def swiglu_backward(
    h_N2F: Tensor, da_NF: Tensor, weights_N: Tensor, num_rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the reference's, to the bit, whose seven passes over memory the compiler makes one.

    Without it they go over blocks of rows that stay in a core's cache, in half the time. Rows from `num_rows` on are 0
    already, because the products made them so.
    """
    if torch.compiler.is_compiling() or h_N2F.device.type != "cpu":
        return reference.swiglu_backward(h_N2F, da_NF, weights_N)
    dh_N2F, a_NF, dweights_N = torch.empty_like(h_N2F), torch.empty_like(da_NF), weights_N.new_empty(len(weights_N))
    length = max(1, BLOCK // da_NF.shape[1])
    for first in range(0, len(da_NF), length):
        block = slice(first, first + length)
        (gate, up), (dgate, dup) = h_N2F[block].chunk(2, dim=-1), dh_N2F[block].chunk(2, dim=-1)
        da, a, weights = da_NF[block], a_NF[block], weights_N[block, None].to(da_NF.dtype)
        silu = F.silu(gate)
        torch.mul(silu, up, out=a)
        dweights_N[block] = (da * a).sum(-1)
        a.mul_(weights)
        da = da * weights
        torch.mul(silu, da, out=dup)
        torch.ops.aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=dgate)
    return dh_N2F, a_NF, dweights_N


#: Rows and outer products of each backend.
OPERATORS = {
    "loop": (register(loop_rows, like_rows), register(loop_outer, like_outer)),
    "grouped_mm": (register(grouped_rows, like_rows), register(grouped_outer, like_outer)),
}
