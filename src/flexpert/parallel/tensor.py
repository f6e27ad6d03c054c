"""Tensor and sequence parallelism of the dense part (Megatron-LM, arXiv 1909.08053 and 2205.05198).

Modules keep their names and become parallel ones in place: attention by heads, FFN by width, embedding and head by
vocabulary. Weights are DTensors over the mesh axis `tp`, so that sharded data parallelism and checkpoints know what
they are; computing takes their local part. Each region (attention, FFN, head) is entered by one collective and left
by another:

    without sequence parallelism    copy ... all-reduce          the stream is the same on all ranks of a group
    with it                         all-gather ... reduce-scatter    each rank has some positions of the stream

Shapes: B sequences, S positions, D residual width, V vocabulary; `…/tp` is a rank's part.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from flexpert.model.attention import Attention, KeyValueCache
from flexpert.model.loss import Vocabulary
from flexpert.model.moe import FeedForward
from flexpert.model.norm import RMSNorm
from flexpert.model.router import Router
from flexpert.model.transformer import Hidden, Transformer
from flexpert.parallel.collectives import all_gather, all_reduce, copy_to, gather_to, reduce_from, scatter_from

SEQUENCE_DIM = 1


class TensorAxis(NamedTuple):
    """The ranks of a tensor group; `sequence`: they share the positions of the stream."""

    mesh: DeviceMesh
    sequence: bool

    @property
    def group(self) -> ProcessGroup:
        return self.mesh.get_group()

    def enter(self, x_BSD: Tensor) -> Tensor:
        """The whole stream, whose gradient is summed over the ranks."""
        return gather_to(x_BSD, SEQUENCE_DIM, self.group) if self.sequence else copy_to(x_BSD, self.group)

    def leave(self, x_BSD: Tensor) -> Tensor:
        """The stream, from what each rank has to add to it."""
        return scatter_from(x_BSD, SEQUENCE_DIM, self.group) if self.sequence else reduce_from(x_BSD, self.group)


def local(parameter: Tensor, gradient: Placement | None = None) -> Tensor:
    """This rank's part of a parameter; `gradient` says how the gradients of the ranks of its axis belong together."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=None if gradient is None else [gradient])


class LocalLinear(nn.Linear):
    """Multiplies by this rank's rows (`Shard(0)`) or columns (`Shard(1)`) of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local(self.weight))


class StreamNorm(RMSNorm):
    """RMSNorm of the residual stream, whose weight all ranks have; each has the gradient of the positions it saw."""

    axis: TensorAxis

    def forward(self, x: Tensor) -> Tensor:
        weight = local(self.weight, Partial() if self.axis.sequence else None)
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.eps).to(x.dtype)


class ShardedNorm(RMSNorm):
    """RMSNorm over a width that the ranks share, [..., width/tp]: the mean square is over all of it, in both passes."""

    axis: TensorAxis

    def forward(self, x: Tensor) -> Tensor:
        values, group = x.float(), self.axis.group
        # Every rank has a part of the squares, and its output depends on all of them: summed forward and backward.
        squares = copy_to(reduce_from(values.square().sum(-1, keepdim=True), group), group)
        normed = values * torch.rsqrt(squares / (x.shape[-1] * group.size()) + self.eps)
        return (normed * local(self.weight).float()).to(x.dtype)


class StreamRouter(Router):
    """A router that all ranks have; each has the gradient of the positions it saw."""

    axis: TensorAxis

    def gather(self, parameters: nn.ParameterList) -> Tensor:
        gradient = Partial() if self.axis.sequence else None
        return torch.cat([local(rows, gradient).float() for rows in parameters])


class ParallelEmbedding(nn.Embedding):
    """Each rank looks up what is in its part of the vocabulary."""

    axis: TensorAxis

    def forward(self, tokens_BS: Tensor) -> Tensor:
        rows = local(self.weight)
        index = tokens_BS - self.axis.group.rank() * len(rows)
        elsewhere = (index < 0) | (index >= len(rows))
        found_BSD = F.embedding(index.masked_fill(elsewhere, 0), rows).masked_fill(elsewhere[..., None], 0)
        return self.axis.leave(found_BSD)


class ParallelAttention(Attention):
    """Each rank has some heads."""

    axis: TensorAxis

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_B1SS: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        return self.axis.leave(super().forward(self.axis.enter(x_BSD), rotary, mask_B1SS, cache))


class ParallelFeedForward(FeedForward):
    """Each rank has some of the FFN's width."""

    axis: TensorAxis

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.axis.leave(super().forward(self.axis.enter(x))[0]), None


class ParallelTransformer(Transformer):
    """Gives the whole stream to the head, which each rank has some rows of."""

    axis: TensorAxis

    def forward(
        self, tokens_BS: Tensor, document_ids_BS: Tensor | None = None, caches: list[KeyValueCache] | None = None
    ) -> Hidden:
        hidden = super().forward(tokens_BS, document_ids_BS, caches)
        return hidden._replace(stream_BSD=self.axis.enter(hidden.stream_BSD))

    def new_caches(self, batch: int, capacity: int) -> list[KeyValueCache]:
        """Of this rank's heads."""
        weight, config = local(self.head.weight), self.config
        shape = (batch, config.kv_heads // self.axis.group.size(), capacity, config.head_dim)
        return [KeyValueCache(weight.new_empty(shape), weight.new_empty(shape)) for _ in range(config.num_layers)]


class ShardedVocabulary(Vocabulary):
    """The head's rows of this rank, `first` being the first."""

    def __init__(self, first: int, group: ProcessGroup) -> None:
        self.first, self.group = first, group

    def logsumexp(self, local_T: Tensor) -> Tensor:
        return all_gather(local_T[None], 0, self.group).logsumexp(0)

    def sum(self, local_T: Tensor) -> Tensor:
        return all_reduce(local_T, self.group)

    def argmax(self, local_TV: Tensor) -> Tensor:
        values_T, tokens_T = local_TV.max(1)
        values_RT, tokens_RT = (all_gather(part[None], 0, self.group) for part in (values_T, tokens_T + self.first))
        return tokens_RT.gather(0, values_RT.argmax(0, keepdim=True))[0]


def become(module: nn.Module, kind: type[nn.Module], axis: TensorAxis) -> None:
    """Change the class of a module in place: same parameters, names and settings, another way to compute."""
    module.__class__ = kind
    module.axis = axis  # type: ignore[assignment]


def distribute(module: nn.Module, name: str, mesh: DeviceMesh, placements: list[Placement]) -> None:
    """Turn a parameter on the meta device into a DTensor on the meta device."""
    parameter = module._parameters[name]
    assert parameter is not None and parameter.is_meta
    shape = list(parameter.shape)
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            assert shape[placement.dim] % mesh.size(axis) == 0, (name, shape, placements)
            shape[placement.dim] //= mesh.size(axis)
    part = torch.empty(shape, dtype=parameter.dtype, device="meta")
    shared = DTensor.from_local(part, mesh, placements, run_check=False)
    module._parameters[name] = nn.Parameter(shared, requires_grad=parameter.requires_grad)


#: How the weights of a block's linears lie over the ranks: by output or by input features.
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")


def apply_tensor_parallel(model: Transformer, axis: TensorAxis) -> None:
    """Make every dense module of a model on the meta device parallel; experts are `parallel.expert`'s."""
    for name, module in list(model.named_modules()):
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Linear):
            shard = Shard(1) if last in ROWS else Shard(0)
            assert last in (*COLUMNS, *ROWS, "head"), name
            distribute(module, "weight", axis.mesh, [shard])
            become(module, LocalLinear, axis)
        elif isinstance(module, nn.Embedding):
            distribute(module, "weight", axis.mesh, [Shard(0)])
            become(module, ParallelEmbedding, axis)
        elif isinstance(module, RMSNorm):
            is_sharded = last in ("q_norm", "k_norm")
            distribute(module, "weight", axis.mesh, [Shard(0) if is_sharded else Replicate()])
            become(module, ShardedNorm if is_sharded else StreamNorm, axis)
        elif isinstance(module, Router):
            for parameters in (module.weight, module.bias):
                for index in range(len(parameters)):
                    distribute(parameters, str(index), axis.mesh, [Replicate()])
            become(module, StreamRouter, axis)
        elif isinstance(module, Attention):
            become(module, ParallelAttention, axis)
        elif isinstance(module, FeedForward):
            become(module, ParallelFeedForward, axis)
    become(model, ParallelTransformer, axis)
