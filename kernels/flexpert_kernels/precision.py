"""In which type something is computed."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """fp64 stays what it is; everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def result_dtype(x: Tensor) -> torch.dtype:
    """x's type; where autocast is on, which does not look into functions of ours, its."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
