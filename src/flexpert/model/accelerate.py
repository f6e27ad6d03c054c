"""Modules of other packages in place of ours, where `model.norm`, `model.attention` or `model.linear` asks for them.

They are put in when a model is built. Parameters keep their names, shapes and order, so that the initial weights, files
and sharding are the same, and what is saved does not tell. None is split by tensor parallelism or compiled.

Shapes: B sequences, S positions, H heads, G key/value heads, C channels of a head.
"""

import contextlib
import importlib

import torch
from torch import Tensor, nn

from flexpert.config.accelerators import FP8_MULTIPLE, load
from flexpert.config.groups import ModelConfig
from flexpert.errors import UserError
from flexpert.model.attention import Attention
from flexpert.model.norm import RMSNorm


class EngineAttention(Attention):
    """Attention whose products and softmax are transformer-engine's; in training, where there is no cache."""

    core: nn.Module

    def attend(self, query_BHSC: Tensor, key_BGSC: Tensor, value_BGSC: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is None and query_BHSC.shape[2] == key_BGSC.shape[2], "causal over the whole window"
        operands = [x.transpose(1, 2).contiguous() for x in (query_BHSC, key_BGSC, value_BGSC)]
        out_BSD: Tensor = self.core(*operands)
        return out_BSD.view(operands[0].shape).transpose(1, 2)


def accelerate(model: nn.Module, config: ModelConfig) -> None:
    """Put in what the config names, in place.

    Args:
        model: on the meta device, as it was built.

    Raises:
        UserError: a linear layer whose sides fp8 cannot take.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, RMSNorm) and config.norm != "torch":
            model.set_submodule(path, new_norm(config.norm, len(module.weight), module.eps))
        elif isinstance(module, Attention) and config.attention == "te":
            module.__class__ = EngineAttention
            module.core = load("model.attention", config.attention)(
                config.num_heads, config.head_dim, num_gqa_groups=config.kv_heads, attention_dropout=0.0,
                qkv_format="bshd", attn_mask_type="causal",
            )  # fmt: skip
        elif isinstance(module, nn.Linear) and config.linear == "te_fp8" and path != "head":
            model.set_submodule(path, new_linear(path, module.in_features, module.out_features))


def new_norm(name: str, size: int, eps: float) -> nn.Module:
    kind = load("model.norm", name)
    with torch.device("meta"):
        norm: nn.Module = kind(size, eps=eps, device="meta") if name == "te" else kind(size, eps=eps)
    return norm


def new_linear(path: str, in_features: int, out_features: int) -> nn.Module:
    if in_features % FP8_MULTIPLE or out_features % FP8_MULTIPLE:
        raise UserError(
            f"model.linear=te_fp8 needs widths that divide by {FP8_MULTIPLE}, and {path} is {in_features} x "
            f"{out_features}: leave model.linear=torch"
        )
    linear: nn.Module = load("model.linear", "te_fp8")(in_features, out_features, bias=False, device="meta")
    return linear


def precision(config: ModelConfig) -> contextlib.AbstractContextManager[object]:
    """For a forward pass: the region in which linear layers compute in fp8, where they do.

    Each tensor is scaled by what it holds now: no history of scales that a checkpoint would have to keep.
    """
    if config.linear != "te_fp8":
        return contextlib.nullcontext()
    engine = importlib.import_module("transformer_engine.pytorch")
    recipe = importlib.import_module("transformer_engine.common.recipe").Float8CurrentScaling()
    region: contextlib.AbstractContextManager[object] = engine.autocast(enabled=True, recipe=recipe)
    return region
