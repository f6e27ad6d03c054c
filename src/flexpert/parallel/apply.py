"""The one place where parallelism is put on a model, in this order:

    1. tensor       dense modules become parallel ones, weights DTensors over tp          (parallel/tensor.py)
    2. expert       experts are shared out over ep and etp                                (parallel/expert.py)
    3. checkpoint   blocks forget activations and compute them again
    4. compile      blocks go through the compiler
    5. shard        parameters, gradients and optimiser state over dp, experts' over edp  (fully_shard)

The model arrives on the meta device and leaves with memory for this rank's part alone, to be filled by
`checkpoint.huggingface.fill` or `model.transformer.initialise`.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from flexpert.model.moe import MixtureOfExperts
from flexpert.model.transformer import Transformer
from flexpert.parallel.expert import ExpertAxes, apply_expert_parallel
from flexpert.parallel.mesh import Meshes
from flexpert.parallel.tensor import TensorAxis, apply_tensor_parallel


def apply_parallel(model: Transformer, meshes: Meshes, compute: torch.dtype) -> None:
    """Steps 1, 2 and 5 (3 and 4 are the caller's settings, between them).

    Args:
        model: on the meta device, `requires_grad` set as it shall be trained.
        meshes: of all ranks.
        compute: type of matrix products; parameters are gathered in it, and the router's in fp32.
    """
    layout = meshes.layout
    if layout.tensor > 1:
        apply_tensor_parallel(model, TensorAxis(meshes.dense["tp"], layout.sequence))
    if layout.expert * layout.expert_tensor > 1 and model.config.num_experts:
        same_tokens = layout.tensor > 1 and not layout.sequence
        apply_expert_parallel(model, ExpertAxes(meshes.experts["ep", "etp"], same_tokens))
    shard_data(model, meshes, compute)


def placement(num_ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """Along which dimension `fully_shard` splits a parameter: one that divides and that no other axis splits."""

    def choose(parameter: nn.Parameter) -> Shard | None:
        placements = parameter.placements if isinstance(parameter, DTensor) else ()
        taken = {p.dim for p in placements if isinstance(p, Shard)}
        free = [dim for dim, size in enumerate(parameter.shape) if dim not in taken and size % num_ranks == 0]
        return Shard(free[0]) if free else None

    return choose


def shard_data(model: Transformer, meshes: Meshes, compute: torch.dtype) -> None:
    """`fully_shard` for each block, and within it for the experts, over their own mesh, and the fp32 router.

    Gradients are summed, not averaged: the loss is divided by the tokens of the whole step, and the meshes differ.
    """
    mixed = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    full = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    dense, experts = meshes.dense["dp"], meshes.experts["edp"]
    sharded: list[nn.Module] = []

    def shard(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=placement(mesh.size()))
        sharded.append(module)

    for block in model.blocks:
        layer = block.feed_forward
        if isinstance(layer, MixtureOfExperts):
            for group in layer.groups:
                shard(group, experts, mixed)
            shard(layer.router, dense, full)
        shard(block, dense, mixed)
    shard(model, dense, mixed)
    for module in sharded:
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
