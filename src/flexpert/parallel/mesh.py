"""Which rank holds what: a mesh `dp × tp` for the dense part, `edp × ep × etp` for experts, over the same ranks.

Process groups are megatron-core's (`parallel_state`): tensor fastest, then expert, data slowest. Both meshes are made
of them, and that they agree is asserted once.
"""

import functools
import warnings
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from flexpert.errors import UserError
from flexpert.parallel import process
from flexpert.parallel.layout import Layout


@dataclass(frozen=True)
class Meshes:
    """The meshes of a layout.

    Attributes:
        dense: with the axes dp and tp.
        experts: with the axes edp, ep and etp.
        data: all ranks with other sequences and the same part of the dense model.

    Where there are replicas, both meshes begin with an axis `replica`, and dp and edp are the ranks of one.
    """

    layout: Layout
    dense: DeviceMesh
    experts: DeviceMesh
    data: ProcessGroup

    def over_data(self, mesh: DeviceMesh, axis: str) -> DeviceMesh:
        """What `fully_shard` works on: the axis, and that of the replicas."""
        return mesh["replica", axis] if self.layout.replicas > 1 else mesh[axis]


def build_meshes(layout: Layout, device: torch.device) -> Meshes:
    """Collective over all ranks of the default process group; of one layout per process, but for `sequence`."""
    return Meshes(layout, *process_groups(replace(layout, sequence=False), device.type))


@functools.cache
def process_groups(layout: Layout, device_type: str) -> tuple[DeviceMesh, DeviceMesh, ProcessGroup]:
    """The dense and the expert mesh and the data group, over megatron-core's groups; only replicas have their own.

    Raises:
        UserError: megatron-core is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells of parts of its own that are not installed and that we do not use
        try:
            from megatron.core import parallel_state
        except ImportError:
            raise UserError("several processes need the parallel extra: pip install flexpert[parallel]") from None

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=process.timeout / 60,
    )
    ranks, data = torch.arange(layout.num_ranks), parallel_state.get_data_parallel_group()
    if layout.replicas > 1:
        shape = (layout.replicas, layout.data // layout.replicas, layout.tensor)
        dense = DeviceMesh(device_type, ranks.view(shape), mesh_dim_names=("replica", "dp", "tp"))
        shape_E = (layout.replicas, layout.expert_data // layout.replicas, layout.expert, layout.expert_tensor)
        experts = DeviceMesh(device_type, ranks.view(shape_E), mesh_dim_names=("replica", "edp", "ep", "etp"))
        return dense, experts, data
    dense = DeviceMesh.from_group(
        [data, parallel_state.get_tensor_model_parallel_group()],
        device_type,
        ranks.view(layout.data, layout.tensor),
        mesh_dim_names=("dp", "tp"),
    )
    experts = DeviceMesh.from_group(
        [
            parallel_state.get_expert_data_parallel_group(),
            parallel_state.get_expert_model_parallel_group(),
            parallel_state.get_expert_tensor_parallel_group(),
        ],
        device_type,
        ranks.view(layout.expert_data, layout.expert, layout.expert_tensor),
        mesh_dim_names=("edp", "ep", "etp"),
    )
    for mesh in (dense, experts):
        coordinate = mesh.get_coordinate()
        assert coordinate is not None
        for dim in range(mesh.ndim):
            index = tuple(slice(None) if other == dim else at for other, at in enumerate(coordinate))
            assert dist.get_process_group_ranks(mesh.get_group(dim)) == mesh.mesh[index].tolist()
    return dense, experts, data
