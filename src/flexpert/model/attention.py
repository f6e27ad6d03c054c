"""OLMo2 attention: RMSNorm over the full query and key projections, rotary embeddings, causal softmax.

Shapes: B sequences, S positions, D residual width, H heads, G key/value heads, C = D / H.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexpert.config.groups import ModelConfig
from flexpert.model.norm import RMSNorm


def rotary_tables(config: ModelConfig, positions_S: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables in fp32, both [S, C], for the rotate-half form of RoPE (arXiv 2104.09864)."""
    channels = torch.arange(0, config.head_dim, 2, device=positions_S.device, dtype=torch.float)
    frequencies = 1.0 / (config.rope_theta ** (channels / config.head_dim))
    angles_SC = (positions_S.float()[:, None] * frequencies).repeat(1, 2)
    return angles_SC.cos(), angles_SC.sin()


def apply_rotary(x_BHSC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    first, second = x_BHSC.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x_BHSC * cos_SC + rotated * sin_SC).to(x_BHSC.dtype)


@dataclass
class KeyValueCache:
    """Keys and values of one layer for generation, each [B, G, capacity, C]; `length` positions are filled."""

    key: Tensor
    value: Tensor
    length: int = 0

    def append(self, key_BGSC: Tensor, value_BGSC: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + key_BGSC.shape[2]
        assert end <= self.key.shape[2], "the cache is allocated for the whole generation"
        self.key[:, :, self.length : end] = key_BGSC
        self.value[:, :, self.length : end] = value_BGSC
        self.length = end
        return self.key[:, :, :end], self.value[:, :, :end]

    def keep(self, rows: list[int]) -> None:
        """Forget all sequences but these."""
        self.key, self.value = self.key[rows], self.value[rows]


class Attention(nn.Module):
    """Causal self-attention. The norm of queries and keys is over all heads together, before the split (OLMo2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.hidden_size, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(width, config.rms_norm_eps)
        self.k_norm = RMSNorm(kv_width, config.rms_norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_B1SS: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Args:
        x_BSD: residual stream.
        rotary: tables for these S positions.
        mask_B1SS: True, or 0, where a query (row) may see a key (column); None: causal.
        cache: earlier positions, extended in place; without a mask, S must be 1 unless the cache is empty.

        Returns: [B, S, D].
        """
        batch, length, _ = x_BSD.shape
        query = self.q_norm(self.q_proj(x_BSD)).view(batch, length, -1, self.head_dim).transpose(1, 2)
        key = self.k_norm(self.k_proj(x_BSD)).view(batch, length, -1, self.head_dim).transpose(1, 2)
        value = self.v_proj(x_BSD).view(batch, length, -1, self.head_dim).transpose(1, 2)
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        if cache is not None:
            key, value = cache.append(key, value)
        assert mask_B1SS is not None or length in (1, key.shape[2])
        out = self.attend(query, key, value, mask_B1SS)
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return projected

    def attend(self, query_BHSC: Tensor, key_BGSC: Tensor, value_BGSC: Tensor, mask: Tensor | None) -> Tensor:
        """Values weighted by the softmax of scores, [B, H, S, C]."""
        return F.scaled_dot_product_attention(
            query_BHSC,
            key_BGSC,
            value_BGSC,
            attn_mask=mask,
            is_causal=mask is None and query_BHSC.shape[2] > 1,
            enable_gqa=query_BHSC.shape[1] != key_BGSC.shape[1],
        )


def document_mask(document_ids_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, S, S] mask: 0 where a position may attend, the same document and not later, elsewhere -inf.

    In the type that attention computes in, which would otherwise turn it into that in every layer.
    """
    length = document_ids_BS.shape[1]
    same = document_ids_BS[:, None, :, None] == document_ids_BS[:, None, None, :]
    seen = same & torch.ones(length, length, dtype=torch.bool, device=same.device).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
