"""The expert layer in plain matrix products, one expert after another; any device, autograd through and through.

Shapes: T tokens, D residual width, F FFN width, E experts, K active experts. The definition is `reference.py`.
"""

import torch.nn.functional as F
from torch import Tensor


def expert_hidden(x_TD: Tensor, gate_up_2FD: Tensor) -> Tensor:
    """`silu(W1 x) ⊙ W3 x`, [T, F], with one product for both."""
    gate_TF, up_TF = F.linear(x_TD, gate_up_2FD.flatten(0, 1)).chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def dense_mixing(x_TD: Tensor, probs_TE: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Every expert on every token: `y = Σ_e W2_e (p_e ⊙ silu(W1_e x) ⊙ W3_e x)`, [T, D].

    The router weight is applied before the down projection, so experts' outputs are never held side by side.
    """
    y_TD = None
    for probs_T, gate_up_2FD, down_DF in zip(probs_TE.unbind(1), gate_up_E2FD, down_EDF, strict=True):
        part_TD = F.linear(expert_hidden(x_TD, gate_up_2FD) * probs_T[:, None], down_DF)
        y_TD = part_TD if y_TD is None else y_TD + part_TD
    assert y_TD is not None, "a group holds at least one expert"
    return y_TD


def moe_ffn(x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Each token through its own experts: `y_t = Σ_k w_tk · E_{indices_tk}(x_t)`, [T, D]; no token is dropped.

    Indices outside [0, E) belong to experts held elsewhere and add nothing. A token occurs at most once per expert, so
    the sum over experts is in a fixed order and the result is deterministic.
    """
    y_TD = x_TD.new_zeros(x_TD.shape)
    for expert, (gate_up_2FD, down_DF) in enumerate(zip(gate_up_E2FD, down_EDF, strict=True)):
        tokens, slots = (indices_TK == expert).nonzero(as_tuple=True)
        hidden = expert_hidden(x_TD[tokens], gate_up_2FD) * weights_TK[tokens, slots, None]
        y_TD = y_TD.index_add(0, tokens, F.linear(hidden, down_DF).to(y_TD.dtype))
    return y_TD
