"""Training checkpoints: torch distributed checkpoint inside step directories that are written whole and verified.

    checkpoints/step-000000200/{*.distcp, .metadata, checkpoint.json}

`checkpoint.json` lists every file with its SHA-256, and none is opened before that was compared. This finds damage, and
nothing more: who alters a file can alter the list. What PyTorch writes are pickles; so that they cannot run code,
whoever wrote them, they may name only PyTorch's own records of a checkpoint (`.metadata`), tensors and plain values.
"""

import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PosixPath
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from flexpert.checkpoint.sharding import local_part
from flexpert.checkpoint.store import atomic_directory
from flexpert.errors import UserError
from flexpert.fields import require
from flexpert.model.transformer import Transformer
from flexpert.parallel.environment import num_ranks, rank
from flexpert.parallel.process import barrier, on_first
from flexpert.records import read_record, sha256_file, write_record

STEP_NAME = re.compile(r"step-(\d{9})")
RECORD_NAME = "checkpoint.json"

#: What `.metadata` is made of, beside `torch.dtype`s and paths. We save tensors alone: what is none, PyTorch would
#: unpickle whatever it names.
METADATA_PARTS: dict[tuple[str, str], Any] = {
    (part.__module__, part.__qualname__): part
    for part in (
        metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta, metadata.TensorStorageMetadata,
        metadata.ChunkStorageMetadata, metadata.TensorProperties,
        metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo, torch.Size, torch.serialization._get_layout,
    )
}  # fmt: skip


@contextmanager
def directory_of_all(final: Path) -> Iterator[Path]:
    """`atomic_directory` that all ranks write into: it takes its name when all have."""
    with ExitStack() as stack:
        yield on_first(lambda: stack.enter_context(atomic_directory(final)))
        barrier()
    barrier()


def trained_state(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Trained parameters and their optimiser state; what is frozen is the base's, and is not saved again.

    Before the first update AdamW has no state: it is given the one that it begins with, to be saved or loaded into.
    """
    parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=local_part(parameter)[0].device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
    return {"model": parameters, "optimizer": {name: optimizer.state[p] for name, p in parameters.items()}}


def save(
    directory: Path, step: int, model: Transformer, optimizer: torch.optim.Optimizer, extra: dict[str, Any]
) -> None:
    """Write `directory/step-N`, of several processes each its part; `extra` must be JSON: what a run needs to go on."""
    final = directory / f"step-{step:09d}"
    if on_first(final.exists):
        return
    with directory_of_all(final) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "torch.distributed is unavailable": one process is meant
        alone = not dist.is_initialized()
        state_dict_saver.save(trained_state(model, optimizer), checkpoint_id=temporary, no_dist=alone)

        # Every rank hashes what it wrote, `__RANK_*.distcp`; the first also `.metadata`, which is there when all are.
        own = {path.name: sha256_file(path) for path in temporary.glob(f"__{rank()}_*")}
        parts: list[dict[str, str]] = [own] * num_ranks()
        if not alone:
            dist.all_gather_object(parts, own)

        def record() -> None:
            files = {".metadata": sha256_file(temporary / ".metadata")}
            for part in parts:
                files |= part
            files = dict(sorted(files.items()))
            assert files.keys() == {path.name for path in temporary.iterdir()}
            write_record(temporary / RECORD_NAME, "flexpert.checkpoint", {"step": step, "files": files, **extra})

        on_first(record)


def steps(directory: Path) -> list[int]:
    """Steps that have a committed checkpoint, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(match[1]) for path in directory.iterdir() if (match := STEP_NAME.fullmatch(path.name)))


def load(directory: Path, step: int, model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore model and optimiser in place from `directory/step-N`, and return its record.

    Raises:
        UserError: a file is missing, is not the one that was written or was put there, or asks for code to be run.
    """
    path = directory / f"step-{step:09d}"
    record = on_first(lambda: check_files(path))
    state = trained_state(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            alone = not dist.is_initialized()
            state_dict_loader.load(state, storage_reader=Reader(path), no_dist=alone)
        except (pickle.UnpicklingError, CheckpointException) as error:
            causes = (
                [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
            )
            if not any(isinstance(cause, pickle.UnpicklingError) for cause in causes):
                raise
            raise UserError(f"{path} is no checkpoint of ours, and is not loaded: delete it") from error
    return record


def check_files(path: Path) -> dict[str, Any]:
    """The record of a checkpoint whose files are those that it lists, and no others.

    Raises:
        UserError: they are not.
    """
    record = read_record(path / RECORD_NAME, "flexpert.checkpoint")
    files = require(record, "files", dict, path / RECORD_NAME)
    remedy = f"delete {path} to resume from the step before"
    for name in sorted({file.name for file in path.iterdir()} - {RECORD_NAME} - files.keys()):
        raise UserError(f"{path / name} is not listed in {RECORD_NAME}: {remedy}")
    for name, digest in files.items():
        if not (path / name).is_file() or sha256_file(path / name) != digest:
            raise UserError(f"{path / name} is missing or altered: {remedy}")
    return record


class MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata`, and refuses a pickle that names anything else than that is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if part := METADATA_PARTS.get((module, name)):
            return part
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module in ("pathlib", "pathlib._local") and name == "PosixPath":  # Python 3.13 calls it the latter
            return PosixPath
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's metadata")


class Reader(filesystem.FileSystemReader):
    """PyTorch's, with `.metadata` read by `MetadataUnpickler`, at once; tensors it reads with `weights_only` anyway.

    Raises:
        pickle.UnpicklingError: `.metadata` is something else.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with open(path / ".metadata", "rb") as file:
            self._metadata: metadata.Metadata = MetadataUnpickler(file).load()
        if not isinstance(self._metadata, metadata.Metadata):
            raise pickle.UnpicklingError("it holds no metadata")

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        return self._metadata


def retain(directory: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints."""
    for step in steps(directory)[:-keep]:
        shutil.rmtree(directory / f"step-{step:09d}")
