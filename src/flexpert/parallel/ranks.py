"""What a training step asks about the other processes; alone, every answer is the plain one."""

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flexpert.model.loss import Vocabulary
from flexpert.parallel.collectives import all_reduce
from flexpert.parallel.mesh import Meshes
from flexpert.parallel.tensor import ShardedVocabulary

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Attributes: meshes: those that the model was put on; None: one process."""

    meshes: Meshes | None = None

    @property
    def share(self) -> tuple[int, int]:
        """This rank's place among those with other sequences, and how many there are."""
        return (0, 1) if self.meshes is None else (self.meshes.data.rank(), self.meshes.layout.data)

    def without_sequence(self) -> "Ranks":
        """The same, where every rank sees all positions."""
        if self.meshes is None:
            return self
        return Ranks(replace(self.meshes, layout=replace(self.meshes.layout, sequence=False)))

    def vocabulary(self, num_rows: int) -> Vocabulary:
        """Of a rank that holds `num_rows` rows of the head."""
        if self.meshes is None or self.meshes.layout.tensor == 1:
            return Vocabulary()
        group = self.meshes.dense.get_group("tp")
        return ShardedVocabulary(group.rank() * num_rows, group)

    def own_positions(self, x_BS: Tensor) -> Tensor:
        """The positions of the residual stream that this rank has."""
        if self.meshes is None or not self.meshes.layout.sequence:
            return x_BS
        return x_BS.chunk(self.meshes.layout.tensor, dim=1)[self.meshes.dense.get_local_rank("tp")]

    def sum(self, value: Tensor, of_positions: bool = False) -> Tensor:
        """Over all sequences; `of_positions`: what each rank has counted of its own positions."""
        if self.meshes is None:
            return value
        value = all_reduce(value, self.meshes.data)
        if of_positions and self.meshes.layout.sequence:
            value = all_reduce(value, self.meshes.dense.get_group("tp"))
        return value

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether some rank has it."""
        if self.meshes is None:
            return list(flags)
        device = self.meshes.dense.device_type
        value = torch.tensor(flags, dtype=torch.int32, device=device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return [bool(flag) for flag in value.tolist()]

    def collect(self, found: dict[int, T]) -> dict[int, T]:
        """What ranks with other sequences have found, together."""
        if self.meshes is None:
            return found
        parts: list[dict[int, T]] = [{} for _ in range(self.meshes.data.size())]
        dist.all_gather_object(parts, found, group=self.meshes.data)
        return {key: value for part in parts for key, value in part.items()}

    def every(self, value: int) -> list[int]:
        """Of each rank, in their order."""
        if self.meshes is None:
            return [value]
        values = [0] * self.meshes.layout.num_ranks
        dist.all_gather_object(values, value)
        return values


#: One process.
ALONE = Ranks()


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that their norm over all parameters is at most `max_norm`; returns it as it was.

    Parameters on different meshes count alike: a rank adds the squares of its parts, divided by the number of ranks
    that hold the same one, and the sum is over all ranks.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    parts, squares = [], []
    for gradient in gradients:
        assert isinstance(gradient, DTensor)
        copies = 1
        for axis, placement in enumerate(gradient.placements):
            copies *= gradient.device_mesh.size(axis) if placement.is_replicate() else 1
        parts.append(gradient.to_local())
        squares.append(parts[-1].float().square().sum() / copies)
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for part in parts:
        part.mul_(scale)
    return norm
