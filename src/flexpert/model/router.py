"""The router: fp32 softmax over all experts, then top-k, with no renormalisation (FlexOlmo, arXiv 2507.07024).

Shapes: T tokens, D residual width, E experts, K active experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from flexpert_kernels import route
from torch import Tensor, nn


class Routing(NamedTuple):
    """What one layer's router decided for T tokens.

    `normaliser_T` is log Σ_e exp(logit_e − mean logit), which the z-loss squares. A softmax does not see what is added
    to all logits, and rows are kept relative to the public one: without centring, the z-loss would depend on that and
    pull every other row below it.
    """

    probs_TE: Tensor
    weights_TK: Tensor
    indices_TK: Tensor
    normaliser_T: Tensor


class Router(nn.Module):
    """Rows of `W_r` and the bias, in as many parameters as there are expert groups.

    An expert job keeps the public row and the owner's row in two parameters, so that the frozen one has neither
    gradient nor optimiser state.

    Args:
        hidden_size: D.
        group_sizes: experts in each group; E is their sum.
        top_k: K.
        bias: add `min(b, 0)` to the logits: a bias can make an expert harder to choose, never easier.
    """

    def __init__(self, hidden_size: int, group_sizes: tuple[int, ...], top_k: int, bias: bool) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.ParameterList([nn.Parameter(torch.empty(size, hidden_size)) for size in group_sizes])
        self.bias = nn.ParameterList([nn.Parameter(torch.empty(size)) for size in group_sizes] if bias else [])

    def gather(self, parameters: nn.ParameterList) -> Tensor:
        """All groups' rows or biases, in fp32."""
        return torch.cat([part.float() for part in parameters])

    def forward(self, x_TD: Tensor) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            weight_ED = self.gather(self.weight)
            bias_E = self.gather(self.bias).clamp(max=0) if len(self.bias) else None
            logits_TE = F.linear(x_TD.float(), weight_ED, bias_E)
            return Routing(*route(logits_TE, self.top_k))
