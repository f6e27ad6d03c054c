"""`swiglu` and its gradients in plain PyTorch, on any device: the definition, and the path of CPUs.

Shapes: F FFN width, N rows. Most operations write over what is no longer needed, which saves a CPU about a quarter of
the time: memory new to the process has to be mapped first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert_kernels.precision import wide


def swiglu(h_N2F: Tensor, weights_N: Tensor | None = None, num_rows: Tensor | None = None) -> Tensor:
    """`a = w · silu(gate) ⊙ up` of rows [gate | up], [N, F]: arXiv 2002.05202, times the router's weight.

    Args:
        weights_N: None for ones.
        num_rows: None, or one integer: rows from it on are written as zeros, whatever they hold.

    Returns: a in h's dtype, computed in fp64 for fp64 rows, else in fp32.
    """
    gate_NF, up_NF = wide(h_N2F).chunk(2, dim=-1)
    a_NF = F.silu(gate_NF).mul_(up_NF)
    if weights_N is not None:
        a_NF = a_NF.mul_(weights_N[:, None].to(a_NF.dtype))
    return zeroed(a_NF, num_rows).to(h_N2F.dtype)


def swiglu_backward(
    h_N2F: Tensor, da_NF: Tensor, weights_N: Tensor | None = None, num_rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `Σ_n w_n <da_n, silu(gate_n) ⊙ up_n>`, and the weighted activations, needed for the next weight.

    Args:
        da_NF: the gradient of a row before its weight: of z_n where a layer's output is Σ_n w_n z_n.
        weights_N, num_rows: as for `swiglu`.

    Returns: `dh_N2F` and `a_NF` in h's dtype; `dweights_N` in fp32 (fp64 for fp64 rows), None without weights.
    """
    h, da = wide(h_N2F), wide(da_NF)
    gate_NF, up_NF = h.chunk(2, dim=-1)
    silu_NF = F.silu(gate_NF)
    a_NF = silu_NF * up_NF
    scratch_NF = torch.empty_like(a_NF)
    dweights_N = None
    if weights_N is not None:
        dweights_N = zeroed(torch.mul(da, a_NF, out=scratch_NF).sum(-1), num_rows)
        weights_N1 = weights_N[:, None].to(h.dtype)
        a_NF, da = a_NF.mul_(weights_N1), torch.mul(da, weights_N1, out=scratch_NF)
    dup_NF = silu_NF.mul_(da)
    dgate_NF = torch.mul(da, up_NF, out=scratch_NF)
    torch.ops.aten.silu_backward.grad_input(dgate_NF, gate_NF, grad_input=dgate_NF)
    dh = torch.cat((dgate_NF, dup_NF), -1)
    return zeroed(dh, num_rows).to(h_N2F.dtype), zeroed(a_NF, num_rows).to(h_N2F.dtype), dweights_N


def zeroed(x: Tensor, num_rows: Tensor | None) -> Tensor:
    """`x`, written over with zeros from row `num_rows` on."""
    if num_rows is None:
        return x
    past = torch.arange(len(x), device=x.device) >= num_rows
    return x.masked_fill_(past.view(-1, *[1] * (x.dim() - 1)), 0)
