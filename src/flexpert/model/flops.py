"""Floating-point operations of one token, from the model's shape and from which of its parts are trained.

Matrix products alone are counted, two operations for each multiply-add, as is usual (PaLM, arXiv 2204.02311, appendix
B): projections, attention, FFNs of the active experts, routers and output head. Attention counts all S × S scores, as
published figures do, although a causal kernel computes half of them: that flatters long sequences. Nothing that is
computed a second time counts (the loss repeats the logits in its backward pass).
"""

from dataclasses import dataclass

from torch import nn

from flexpert.config.groups import ModelConfig
from flexpert.model.moe import MixtureOfExperts
from flexpert.model.transformer import Block, Transformer


@dataclass
class Flops:
    """Operations per token of the forward and of the backward pass."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def add_product(self, size: int, gradients: int) -> None:
        """A product of `size` multiply-adds; each of the `gradients` operands that need one costs as much again."""
        self.forward += 2 * size
        self.backward += 2 * size * gradients


def is_trained(*modules: nn.Module) -> bool:
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


def flops_per_token(model: Transformer, sequence_length: int) -> Flops:
    """Operations of a training step, per token of its sequences.

    A frozen weight has no gradient, but what flows into it has one where anything before it is trained. Attention, each
    group of experts, the router and the head are each trained as a whole or not at all, as in every stage.

    Args:
        model: read for its config and `requires_grad`; it may be on the meta device.
        sequence_length: S, in tokens.
    """
    config, flops = model.config, Flops()
    width, kv_width = config.hidden_size, config.kv_heads * config.head_dim
    has_gradient = is_trained(model.embedding)  # whether the residual stream has one, from here on
    for block in model.blocks:
        assert isinstance(block, Block)
        trained = is_trained(block.attention)
        flops.add_product(width * (width + 2 * kv_width), trained + has_gradient)  # queries, keys, values
        has_gradient |= trained
        flops.add_product(2 * width * sequence_length, 2 * has_gradient)  # scores, and the values that they weight
        flops.add_product(width * width, trained + has_gradient)
        has_gradient |= is_trained(block.attention_norm)
        add_feed_forward(flops, block.feed_forward, config, has_gradient)
        has_gradient |= is_trained(block.feed_forward, block.feed_forward_norm)
    has_gradient |= is_trained(model.norm)
    flops.add_product(config.vocab * width, is_trained(model.head) + has_gradient)
    return flops


def add_feed_forward(flops: Flops, layer: nn.Module, config: ModelConfig, has_gradient: bool) -> None:
    groups, routed = [(1, layer)], False
    if isinstance(layer, MixtureOfExperts):
        # Where only some experts are active, which group they are in depends on the text.
        assert layer.all_active or len(layer.groups) == 1, "experts held apart are all active"
        sizes = layer.group_sizes if layer.all_active else (config.active_experts,)
        groups, routed = list(zip(sizes, layer.groups, strict=True)), is_trained(layer.router)
        flops.add_product(config.num_experts * config.hidden_size, is_trained(layer.router.weight) + has_gradient)
    for num_active, group in groups:
        size, trained = num_active * config.hidden_size * config.intermediate_size, is_trained(group)
        flops.add_product(2 * size, trained + has_gradient)  # gate and up
        # Its input is weighted by the router, and has a gradient where the router is trained.
        flops.add_product(size, trained + (trained or routed or has_gradient))
