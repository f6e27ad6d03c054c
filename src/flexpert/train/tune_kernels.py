"""`flexpert tune_kernels`: the fastest tiles of the experts' products, found on this machine's GPU before training."""

from pathlib import Path
from typing import NamedTuple

import torch
from flexpert_kernels import lacking
from flexpert_kernels.moe.dispatch import choose
from flexpert_kernels.tuning import Tuned, cache_file, tune

from flexpert.checkpoint.directory import ModelDirectory
from flexpert.config.compose import compose
from flexpert.config.groups import ModelConfig
from flexpert.config.stages import TuneKernelsConfig
from flexpert.config.tree import group_options
from flexpert.errors import UserError


class Layer(NamedTuple):
    """What a rank computes of a layer's experts.

    Attributes:
        hidden, ffn: widths, the latter this rank's part.
        num_experts: that it holds.
        active_experts: of a token; 1 where ranks share the experts, because each row is sent to one of them.
        rows: of a microbatch, pairs of a token and one of its experts; as many come from other ranks as go there.
    """

    hidden: int
    ffn: int
    num_experts: int
    active_experts: int
    rows: int


def run(config: TuneKernelsConfig, resolved: str) -> None:
    """Time the candidates of each product, print what was chosen, one line each, and keep it for the runs to come.

    Raises:
        UserError: no model, or one without experts; no GPU that the kernels run on; a microbatch that does not fit it.
    """
    layer, dtype = layer_of(config), torch.bfloat16
    device, widths = torch.device("cuda" if torch.cuda.is_available() else "cpu"), (layer.hidden, layer.ffn)
    if lacks := lacking(device, dtype, widths):
        raise UserError(f"tune_kernels needs a GPU that the kernels run on: {lacks}")
    backend = choose(layer.num_experts, layer.active_experts, layer.rows, dtype, device, widths)
    if backend != "triton":
        print(f"note: moe_backend=auto takes {backend} for this shape; what is tuned serves moe_backend=triton")
    try:
        tuned = tune(*widths, layer.num_experts, layer.rows, device, dtype)
    except torch.OutOfMemoryError:
        raise UserError(f"tokens={config.tokens}: the rows of a layer do not fit this GPU; give fewer") from None
    except ValueError as error:  # of every candidate of a product
        raise UserError(f"tune_kernels: {error}") from None
    for line in lines_of(tuned):
        print(line)
    print(f"kept in {cache_file()} for {torch.cuda.get_device_name(device)}")


def layer_of(config: TuneKernelsConfig) -> Layer:
    """Raises `UserError` where there is no such model, it has no experts, or it cannot be split or run so."""
    model = model_of(config.model)
    if not model.num_experts:
        raise UserError(f"model={config.model} is dense: it has no experts whose kernels could be tuned")
    active = config.active_experts or model.active_experts
    if active > model.num_experts:
        raise UserError(f"active_experts={active} is more than the {model.num_experts} experts of model={config.model}")
    shares = {"expert": model.num_experts, "expert_tensor": model.intermediate_size}
    for key, whole in shares.items():
        if whole % getattr(config, key):
            what = "experts" if key == "expert" else "columns of each expert"
            raise UserError(f"{key}={getattr(config, key)} does not divide the {whole} {what} of model={config.model}")
    ffn, held = model.intermediate_size // config.expert_tensor, model.num_experts // config.expert
    return Layer(model.hidden_size, ffn, held, active if config.expert == 1 else 1, config.tokens * active)


def model_of(name: str) -> ModelConfig:
    """The shape that `plan` knows by this name, or that of a model directory."""
    named = group_options("model")
    if name in named:
        shape: ModelConfig = compose("plan", [f"model={name}"])[0].model
        return shape
    if not Path(name).is_dir():
        raise UserError(f"model={name} is neither a model directory nor one of {', '.join(named)}")
    return ModelDirectory.open(Path(name)).config


def lines_of(tuned: list[Tuned]) -> list[str]:
    """A line for each product: kernel, outputs x inputs, tile, warps, stages, TFLOP/s."""
    rows = [
        (
            row.kernel,
            f"{row.n} x {row.k}",
            f"tile {row.config.block_m} x {row.config.block_n} x {row.config.block_k}, {row.config.group_m} a group",
            f"{row.config.num_warps} warps",
            f"{row.config.num_stages} stages",
            f"{row.tflops:.0f} TFLOP/s",
        )
        for row in tuned
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
