"""The one place where parallelism is put on a model, in this order:

    1. tensor       dense modules become parallel ones, weights DTensors over tp          (parallel/tensor.py)
    2. expert       experts are shared out over ep and etp                                (parallel/expert.py)
    3. recompute    blocks forget activations and compute them again                      (parallel/recompute.py)
    4. compile      blocks go through the compiler                                        (train/compilation.py)
    5. shard        parameters, gradients and optimiser state over dp, experts' over edp  (fully_shard)

Steps 3 and 4 are the training loop's, in one process, too. They wrap a block's `forward`, 4 what 3 made of it; what 5
hooks around the block, gathering and scattering, stays outside of both, whenever it is put on.

The model arrives on the meta device and leaves with memory for this rank's part alone, to be filled by
`checkpoint.huggingface.fill` or `model.transformer.initialise`.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from flexpert.config.groups import ModelConfig, ParallelConfig
from flexpert.errors import UserError
from flexpert.model.moe import MixtureOfExperts
from flexpert.model.transformer import Transformer
from flexpert.parallel.environment import num_ranks
from flexpert.parallel.expert import ExpertAxes, apply_expert_parallel
from flexpert.parallel.layout import Layout, check_layout, for_inference
from flexpert.parallel.mesh import Meshes, build_meshes
from flexpert.parallel.ranks import Ranks
from flexpert.parallel.tensor import TensorAxis, apply_tensor_parallel


def layout_of(config: ParallelConfig, is_mixture: bool) -> Layout:
    """What the settings mean for the processes that there are.

    Raises:
        UserError: they are for another number of processes.
    """
    width = config.expert_tensor or (config.tensor if is_mixture else 1)
    shares = {"tensor": config.tensor, "expert": config.expert, "expert_tensor": width, "replicas": config.replicas}
    for key, number in shares.items():
        if number > 1 and num_ranks() == 1:
            raise UserError(
                f"parallel.{key}={number} needs several processes, and this is one: start them with "
                f"torchrun --nproc-per-node {number} -m flexpert …, or with srun"
            )
    sequence = config.sequence and config.tensor > 1
    layout = Layout(num_ranks(), config.tensor, config.expert, width, sequence, config.replicas)
    if config.data not in (-1, layout.data):
        raise UserError(
            f"parallel.data={config.data} x parallel.tensor={config.tensor} are not the {layout.num_ranks} processes: "
            f"leave parallel.data out, or set it to {layout.data}"
        )
    return layout


def put_on_ranks(
    model: Transformer,
    config: ParallelConfig,
    sequence_length: int,
    device: torch.device,
    group_sizes: tuple[int, ...] | None = None,
) -> Ranks:
    """Give a model on the meta device memory: for all of it in one process, for this rank's part among several.

    Args:
        model: on the meta device, `requires_grad` set as it shall be trained.
        sequence_length: S of training.
        group_sizes: how its experts are held, as it was built.

    Raises:
        UserError: the layout does not fit the processes or the model.
    """
    experts = model.config.num_experts
    layout = layout_of(config, experts > 0)
    check_layout(layout, model.config, group_sizes or (experts,), sequence_length)
    ranks = Ranks(build_meshes(layout, device)) if layout.num_ranks > 1 else Ranks()
    put_beside(model, ranks, device)
    return ranks


def put_beside(model: Transformer, ranks: Ranks, device: torch.device, compute: torch.dtype | None = None) -> None:
    """The same for another model of these processes; `compute` as of `apply_parallel`, None: as training computes."""
    if ranks.meshes is not None:
        trained_in = torch.bfloat16 if device.type == "cuda" else torch.float32
        apply_parallel(model, ranks.meshes, compute or trained_in)
    model.to_empty(device=device)


def ranks_for_inference(config: ParallelConfig, device: torch.device, model: ModelConfig) -> Ranks:
    """The processes of a stage that trains nothing, in the layout that `for_inference` makes of the settings.

    Raises:
        UserError: the settings do not fit the processes or the model.
    """
    layout = layout_of(config, model.num_experts > 0)
    if layout.num_ranks == 1:
        return Ranks()
    if layout.num_ranks % layout.tensor == 0 and layout.num_ranks % (layout.expert * layout.expert_tensor) == 0:
        layout = for_inference(layout)
    check_held(model, layout)
    return Ranks(build_meshes(layout, device))


def check_for_inference(config: ModelConfig, ranks: Ranks) -> None:
    """Raises `UserError` where a model cannot be held in the layout of these processes."""
    if ranks.meshes is not None:
        check_held(config, ranks.meshes.layout)


def check_held(config: ModelConfig, layout: Layout) -> None:
    """Raises `UserError` where a model that nothing trains cannot be held so; experts may be split by width alone."""
    experts = config.num_experts
    held = layout if experts else replace(layout, expert=1, expert_tensor=1)
    group_sizes = (experts,) if experts % layout.expert == 0 else (1,) * experts  # as when one was excluded
    check_layout(held, config, group_sizes, config.max_sequence_length)


def put_for_inference(model: Transformer, ranks: Ranks, device: torch.device, one_batch: bool = False) -> None:
    """Give a model on the meta device, dense or a mixture, memory for this process's part.

    Args:
        one_batch: all processes have the same tokens. Then what tensor and expert axes leave is not shared out further:
            `fully_shard` would gather every weight for every token that is generated.

    Raises:
        UserError: the layout does not fit the model.
    """
    check_for_inference(model.config, ranks)
    if ranks.meshes is not None:
        split_model(model, ranks.meshes, one_batch)
        if not one_batch:
            shard_data(model, ranks.meshes)
    model.to_empty(device=device)


def apply_parallel(model: Transformer, meshes: Meshes, compute: torch.dtype) -> None:
    """Steps 1, 2 and 5.

    Args:
        model: on the meta device, `requires_grad` set as it shall be trained.
        meshes: of all ranks.
        compute: type of matrix products; parameters are gathered in it, and the router's in fp32.
    """
    split_model(model, meshes)
    shard_data(model, meshes, compute)


def split_model(model: Transformer, meshes: Meshes, one_batch: bool = False) -> None:
    """Steps 1 and 2; `one_batch`: all ranks have the same tokens."""
    layout = meshes.layout
    if layout.tensor > 1:
        apply_tensor_parallel(model, TensorAxis(meshes.dense["tp"], layout.sequence))
    if layout.expert * layout.expert_tensor > 1 and model.config.num_experts:
        same_tokens = ("etp",) if layout.tensor > 1 and not layout.sequence else ()
        apply_expert_parallel(
            model, ExpertAxes(meshes.experts["ep", "etp"], ("ep", "etp") if one_batch else same_tokens)
        )


def placement(num_ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """Along which dimension `fully_shard` splits a parameter: one that divides and that no other axis splits."""

    def choose(parameter: nn.Parameter) -> Shard | None:
        placements = parameter.placements if isinstance(parameter, DTensor) else ()
        taken = {p.dim for p in placements if isinstance(p, Shard)}
        free = [dim for dim, size in enumerate(parameter.shape) if dim not in taken and size % num_ranks == 0]
        return Shard(free[0]) if free else None

    return choose


def shard_data(model: Transformer, meshes: Meshes, compute: torch.dtype | None = None) -> None:
    """`fully_shard` for each block, and within it for the experts, over their own mesh, and the fp32 router.

    Gradients are summed, not averaged: the loss is divided by the tokens of the whole step, and the meshes differ.
    `compute` is the type that parameters are gathered in; None: their own.
    """
    # Inputs stay as they are: the tables of the rotation are fp32, whatever products are.
    mixed = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    full = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    # Nothing changes a module's output in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    dense, experts = meshes.over_data(meshes.dense, "dp"), meshes.over_data(meshes.experts, "edp")
    sharded: list[nn.Module] = []

    def shard(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=placement(mesh.size(-1)))
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


def reshard(model: nn.Module) -> None:
    """After forward passes that no backward pass followed: what `fully_shard` has gathered is shards again.

    Until then the model's parameters are not those that the optimiser knows.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
