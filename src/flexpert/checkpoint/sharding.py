"""Which part of a parameter this rank holds, and how the whole is put together from all ranks' parts."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

#: Mesh axes over which `fully_shard` splits what the other axes have left.
DATA_AXES = ("dp", "edp")


def assign(parameter: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of `whole` into the parameter."""
    part, place = local_part(parameter)
    part.copy_(whole[place])


def local_part(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """This rank's memory of a parameter, and where in the whole it belongs; an empty part has an empty slice.

    Tensor and expert axes split first, data axes split what is left: so a rank's part is one block.
    """
    whole = tuple(slice(0, size) for size in parameter.shape)
    if not isinstance(parameter, DTensor):
        return parameter, whole
    mesh, bounds = parameter.device_mesh, [(0, size) for size in parameter.shape]
    names = mesh.mesh_dim_names
    coordinate = mesh.get_coordinate()
    assert names is not None and coordinate is not None
    for axis in sorted(range(mesh.ndim), key=lambda axis: names[axis] in DATA_AXES):
        # `fully_shard` has a class of its own, no `Shard`, for splitting what is split already
        dim: int | None = getattr(parameter.placements[axis], "dim", None)
        if dim is not None:
            first, last = bounds[dim]
            part = -(-(last - first) // mesh.size(axis))
            begin = min(first + part * coordinate[axis], last)
            bounds[dim] = (begin, min(begin + part, last))
    local: Tensor = parameter.to_local()
    slices = tuple(slice(first, last) for first, last in bounds)
    assert tuple(local.shape) == tuple(s.stop - s.start for s in slices), (parameter.placements, local.shape, slices)
    return local, slices


@torch.no_grad()
def gather_to_first(parameter: Tensor, index: tuple[int, ...] = ()) -> Tensor:
    """`parameter[index]`, whole and bit for bit, on rank 0; elsewhere what is returned means nothing.

    Every rank must ask for the same parameters in the same order. One tensor is held whole at a time.
    """
    if not isinstance(parameter, DTensor):
        return parameter[index]
    part, place = local_part(parameter)
    whole = torch.zeros(parameter.shape[len(index) :], dtype=parameter.dtype, device=part.device)
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    # Of the ranks that hold the same part, the first gives it.
    copies = [at for at, placement in zip(coordinate, parameter.placements, strict=True) if placement.is_replicate()]
    if not any(copies) and all(held.start <= at < held.stop for at, held in zip(index, place, strict=False)):
        for at, held in zip(index, place, strict=False):
            part = part[at - held.start]
        whole[place[len(index) :]] = part
    # The sum of the bits of one and of zeros elsewhere is exact; that of floats would lose the sign of a zero.
    dist.reduce(whole.view(torch.int32 if whole.element_size() == 4 else torch.uint8), 0)
    return whole
