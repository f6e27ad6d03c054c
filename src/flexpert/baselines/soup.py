"""Model soup: the plain average of several models' weights (arXiv 2203.05482)."""

from pathlib import Path

import torch

from flexpert.checkpoint.huggingface import load_model
from flexpert.errors import UserError
from flexpert.model.transformer import Transformer


@torch.no_grad()
def soup(paths: list[Path], device: torch.device) -> Transformer:
    """Average dense models, one in memory beside the sum.

    Raises:
        UserError: the models have different shapes.
    """
    mean = load_model(paths[0], device=device)[0]
    for path in paths[1:]:
        other = load_model(path, device=device)[0]
        if other.config != mean.config:
            raise UserError(f"{path} has another shape than {paths[0]}: models of different shape cannot be averaged")
        for total, parameter in zip(mean.parameters(), other.parameters(), strict=True):
            total.add_(parameter)
    for total in mean.parameters():
        total.div_(len(paths))
    return mean
