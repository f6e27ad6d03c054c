"""Generation by several processes: they share one model and continue the same sequences together.

Shapes: B sequences, S positions, D residual width, V vocabulary.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flexpert.model.attention import KeyValueCache
from flexpert.model.generate import AttentionStep, Decoder
from flexpert.parallel.collectives import all_gather
from flexpert.parallel.tensor import ParallelTransformer, local


class ParallelDecoder(Decoder):
    """A `Decoder` of a model that `apply.put_for_inference` has shared out, all processes having the same tokens.

    Every process gets rank 0's logits, so that all draw the same token although sums differ in their last bits.
    """

    def block_steps(self) -> list[AttentionStep]:
        return [module_step(block, cache) for block, cache in zip(self.model.blocks, self.caches, strict=True)]

    def logits(self, x_BD: Tensor) -> Tensor:
        logits_BV = F.linear(self.model.norm(x_BD), local(self.model.head.weight))
        if isinstance(self.model, ParallelTransformer):
            logits_BV = all_gather(logits_BV, 1, self.model.axis.group)
        dist.broadcast(logits_BV, 0)
        return logits_BV


def module_step(block: nn.Module, cache: KeyValueCache) -> AttentionStep:
    """One token of every sequence through the block's own modules, which know who holds what."""

    def step(x_BD: Tensor, cos_B1C: Tensor, signed_sin_B1C: Tensor, mask_B11S: Tensor | None) -> Tensor:
        negated, second = signed_sin_B1C.chunk(2, -1)
        rotary = cos_B1C[:, None], torch.cat((-negated, second), -1)[:, None]
        x_B1D, _ = block(x_BD[:, None], rotary, mask_B11S, cache)
        return x_B1D[:, 0]  # type: ignore[no-any-return]

    return step
