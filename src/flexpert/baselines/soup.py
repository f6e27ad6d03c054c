"""Model soup: the plain average of several models' weights (arXiv 2203.05482)."""

from collections.abc import Callable
from pathlib import Path

import torch

from flexpert.checkpoint.directory import ModelDirectory
from flexpert.checkpoint.huggingface import inference_dtype
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
def soup(paths: list[Path], load: Callable[..., Transformer], device: torch.device) -> Transformer:
    """Average dense models in fp32, one in memory beside the sum; the result is held as the first is for inference.

    Args:
        load: gives the model of a path, `dtype` as of `load_model`.

    Raises:
        UserError: the models have different shapes.
    """
    models = [ModelDirectory.open(path) for path in paths]
    check_shapes(models)
    mean = load(paths[0], dtype=torch.float32)
    for path in paths[1:]:
        other = load(path, dtype=torch.float32)
        for total, parameter in zip(mean.parameters(), other.parameters(), strict=True):
            total.add_(parameter)
    for total in mean.parameters():
        total.div_(len(paths))
    return mean.to(inference_dtype(models[0], device))
