"""The definition of the expert layer: a loop over tokens' experts in fp32 (or fp64), written to be read.

Shapes: T tokens, D residual width, F FFN width, E experts, K active experts.
"""

import torch
from torch import Tensor

from flexpert_kernels.precision import wide


def reference_moe(
    x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """`y_t = Σ_k w_tk · W2_e (silu(W1_e x_t) ⊙ W3_e x_t)` with `e = indices_tk` (FlexOlmo, arXiv 2507.07024).

    Args:
        x_TD: inputs.
        weights_TK, indices_TK: the router's weights and choices; negative: held elsewhere, adds nothing.
        gate_up_E2FD: W1 (index 0) and W3 (index 1) of every expert.
        down_EDF: W2 of every expert.

    Returns: [T, D] in fp64 for fp64 inputs, else in fp32.
    """
    x_TD = wide(x_TD)
    weights_TK, gate_up_E2FD, down_EDF = (tensor.to(x_TD.dtype) for tensor in (weights_TK, gate_up_E2FD, down_EDF))
    if len(x_TD) == 0:  # of nothing, too, there are gradients
        return x_TD + sum(tensor[:0].sum() for tensor in (weights_TK, gate_up_E2FD, down_EDF))
    rows = []
    for token, x_D in enumerate(x_TD):
        y_D = torch.zeros_like(x_D)
        for weight, expert in zip(weights_TK[token], indices_TK[token].tolist(), strict=True):
            if expert < 0:
                continue
            gate_F, up_F = gate_up_E2FD[expert, 0] @ x_D, gate_up_E2FD[expert, 1] @ x_D
            y_D = y_D + weight * (down_EDF[expert] @ (gate_F * gate_F.sigmoid() * up_F))
        rows.append(y_D)
    return torch.stack(rows)
