"""The model: OLMo2 (dense) and FlexOlmo (mixture) decoder, in plain modules, with no parallelism and no device logic.

    h   = x + RMSNorm(attention(x))
    out = h + RMSNorm(feed_forward(h))          post-norm: router and experts read the raw stream h

- no pre-norm; RMSNorm over the full query and key projections; rotary embeddings; no biases; untied embeddings
- a dense model's feed_forward is one SwiGLU FFN, a mixture's is routed (FlexOlmo, arXiv 2507.07024)
- built on the meta device, then filled from a Hugging Face directory or by `initialise`

Shapes: B sequences, S positions, D residual width, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexpert.config.groups import ModelConfig
from flexpert.model.accelerate import accelerate
from flexpert.model.attention import Attention, KeyValueCache, document_mask, rotary_tables
from flexpert.model.moe import FeedForward, MixtureOfExperts
from flexpert.model.norm import RMSNorm
from flexpert.model.router import Routing


class Hidden(NamedTuple):
    """The stream before the output head, [B, S, D], and every layer's routing (empty for a dense model)."""

    stream_BSD: Tensor
    routings: list[Routing]


class Block(nn.Module):
    def __init__(self, config: ModelConfig, group_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward: nn.Module = (
            MixtureOfExperts(config, group_sizes) if config.num_experts else FeedForward(config)
        )
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KeyValueCache | None,
    ) -> tuple[Tensor, Routing | None]:
        h_BSD = x_BSD + self.attention_norm(self.attention(x_BSD, rotary, mask, cache))
        out_BSD, routing = self.feed_forward(h_BSD)
        return h_BSD + self.feed_forward_norm(out_BSD), routing


class Transformer(nn.Module):
    """Decoder-only language model.

    Args:
        config: shapes.
        group_sizes: how a mixture's experts are held (see `MixtureOfExperts`); None: all in one group.
    """

    def __init__(self, config: ModelConfig, group_sizes: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.config = config
        groups = group_sizes or (config.num_experts,)
        # from_pretrained: nn.Embedding would draw weights, which costs a second of imports on the meta device
        empty = torch.empty(config.vocab, config.hidden_size)
        self.embedding = nn.Embedding.from_pretrained(empty, freeze=False)  # type: ignore[no-untyped-call]
        self.blocks = nn.ModuleList(Block(config, groups) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab, bias=False)

    def forward(
        self,
        tokens_BS: Tensor,
        document_ids_BS: Tensor | None = None,
        caches: list[KeyValueCache] | None = None,
    ) -> Hidden:
        """Args:
        tokens_BS: token ids.
        document_ids_BS: attend within equal ids only; None: over the whole window.
        caches: one per layer, for generation; extended in place.
        """
        offset = caches[0].length if caches else 0
        positions = torch.arange(offset, offset + tokens_BS.shape[1], device=tokens_BS.device)
        rotary = rotary_tables(self.config, positions)
        x_BSD = self.embedding(tokens_BS)
        mask = None
        if document_ids_BS is not None:
            device = x_BSD.device.type
            is_mixed = torch.is_autocast_enabled(device)
            mask = document_mask(document_ids_BS, torch.get_autocast_dtype(device) if is_mixed else x_BSD.dtype)
        routings = []
        for index, block in enumerate(self.blocks):
            x_BSD, routing = block(x_BSD, rotary, mask, caches[index] if caches else None)
            if routing is not None:
                routings.append(routing)
        return Hidden(self.norm(x_BSD), routings)

    def logits(self, tokens_BS: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """[B, S, V]; training uses `flexpert.model.loss`, which never holds them all."""
        return F.linear(self(tokens_BS, caches=caches).stream_BSD, self.head.weight)

    def new_caches(self, batch: int, capacity: int) -> list[KeyValueCache]:
        """Empty key/value caches for `batch` sequences of up to `capacity` tokens."""
        weight = self.head.weight
        shape = (batch, self.config.kv_heads, capacity, self.config.head_dim)
        return [KeyValueCache(weight.new_empty(shape), weight.new_empty(shape)) for _ in range(self.config.num_layers)]


def build_on_meta(config: ModelConfig, group_sizes: tuple[int, ...] | None = None) -> Transformer:
    """The model's structure with no memory behind it."""
    with torch.device("meta"):
        model = Transformer(config, group_sizes)
    if config.is_accelerated:
        accelerate(model, config)
    return model


@torch.no_grad()
def initialise(model: Transformer, seed: int, assign: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
    """Fill weights in place: norms 1, router biases 0, everything else N(0, initializer_range²).

    Each parameter draws from a generator of its own, seeded by (seed, position), so that its values do not depend on
    the device or on which other parameters a process holds. `assign` copies a whole one to what may be a part of it.
    """
    std = model.config.initializer_range
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "norm" in name:
            parameter.fill_(1.0)
        elif ".router.bias" in name:
            parameter.zero_()
        else:
            generator = torch.Generator().manual_seed((seed << 20) + index)
            assign(parameter, torch.randn(parameter.shape, generator=generator) * std)
