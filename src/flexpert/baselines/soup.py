"""Model soup: the plain average of several models' weights (arXiv 2203.05482)."""

from pathlib import Path

import torch

from flexpert.checkpoint.directory import ModelDirectory
from flexpert.checkpoint.huggingface import inference_dtype, load_model
from flexpert.errors import UserError
from flexpert.model.transformer import Transformer


def check_shapes(models: list[ModelDirectory]) -> None:
    """Raises `UserError` where the models cannot be averaged."""
    for model in models[1:]:
        if model.config != models[0].config:
            raise UserError(
                f"{model.path} has another shape than {models[0].path}: models of different shape cannot be averaged "
                "(baselines.soup=false)"
            )


@torch.no_grad()
def soup(paths: list[Path], device: torch.device) -> Transformer:
    """Average dense models in fp32, one in memory beside the sum; the result is held as the first is for inference.

    Raises:
        UserError: the models have different shapes.
    """
    models = [ModelDirectory.open(path) for path in paths]
    check_shapes(models)
    mean = load_model(paths[0], device=device)[0]
    for path in paths[1:]:
        other = load_model(path, device=device)[0]
        for total, parameter in zip(mean.parameters(), other.parameters(), strict=True):
            total.add_(parameter)
    for total in mean.parameters():
        total.div_(len(paths))
    return mean.to(inference_dtype(models[0], device))
