"""Write a trained expert as a contribution."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexpert.assembly.files import new_directory
from flexpert.assembly.tensors import Piece, TensorSource, write_tensors
from flexpert.checkpoint.digest import dtype_name, tensor_bytes
from flexpert.checkpoint.layout import STORED_DTYPES, Architecture
from flexpert.contribution.record import (
    CONTRIBUTION_KIND,
    RECORD_NAME,
    TENSORS_NAME,
    Contribution,
    ExpertIdentity,
    check_identity,
    expert_shapes,
)
from flexpert.records import write_record

if TYPE_CHECKING:
    import torch


def pack(
    output: Path,
    *,
    tensors: Mapping[str, "torch.Tensor"],
    identity: ExpertIdentity,
    base_digest: str,
    architecture: Architecture,
    router: Mapping[str, Any],
    training: Mapping[str, Any],
) -> Path:
    """Write the contribution directory `output`, whole or not at all.

    Args:
        output: must not exist yet.
        tensors: exactly the names and shapes of `expert_shapes`, all of one dtype, router rows relative to the public
            one. Each is asked for when its turn comes to be written, so a mapping that gathers on access never holds
            the whole expert.
        identity: whose expert it is.
        base_digest: `checkpoint.digest.base_digest` of the public model that was frozen beside it.
        architecture: that of the public model.
        router: "bias" (bool), "init" (str, how the rows started) and the rest of `Contribution.router`.
        training: facts worth keeping, such as steps and tokens.

    Returns:
        `output`.

    Raises:
        UserError: the id is invalid, `output` exists, a tensor holds NaN or infinity, or the disk is full.
    """
    check_identity(identity, output)
    shapes = expert_shapes(architecture, router["bias"])
    assert tensors.keys() == shapes.keys(), f"not an expert's tensors: {sorted(tensors.keys() ^ shapes.keys())}"
    dtype = dtype_name(tensors[next(iter(shapes))])
    assert dtype in STORED_DTYPES, f"experts are stored as one of {STORED_DTYPES}, not as {dtype}"

    def pieces(name: str) -> Iterator[Piece]:
        tensor = tensors[name]
        # A bias may come as a scalar; it is stored with shape [1].
        assert (tuple(tensor.shape) or (1,)) == shapes[name], f"{name} has the shape {tuple(tensor.shape)}"
        assert dtype_name(tensor) == dtype, f"{name} is {tensor.dtype}, other tensors are {dtype}"
        yield tensor_bytes(tensor)

    def source(name: str) -> TensorSource:
        return TensorSource(name, dtype, shapes[name], lambda: pieces(name), f"the expert {identity.id}: {name}")

    with new_directory(output) as directory:
        file = write_tensors(directory / TENSORS_NAME, map(source, shapes))
        contribution = Contribution(
            output, identity, base_digest, architecture, dtype, router, training, (file.entry,), file.tensors
        )
        write_record(directory / RECORD_NAME, CONTRIBUTION_KIND, contribution.to_json())
    return output
