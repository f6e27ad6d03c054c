"""RMSNorm, computed in fp32 as OLMo2 does: the weight multiplies before the cast back."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`weight · x / sqrt(mean(x²) + eps)` over the last dimension.

    Args:
        size: length of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        normed = torch.nn.functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(x.dtype)
