"""Training checkpoints: torch distributed checkpoint inside step directories that are written whole and verified.

    checkpoints/step-000000200/{*.distcp, .metadata, checkpoint.json}

`checkpoint.json` lists every file with its SHA-256, and none is opened before that was compared. This finds damage, and
nothing more: who alters a file can alter the list. What PyTorch writes are pickles; so that they cannot run code,
whoever wrote them, they may name only PyTorch's own records of a checkpoint (`.metadata`), tensors and plain values.
"""

import io
import pickle
import re
import shutil
import warnings
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from flexpert.checkpoint.store import atomic_directory
from flexpert.errors import UserError
from flexpert.fields import require
from flexpert.model.transformer import Transformer
from flexpert.records import read_record, sha256_file, write_record

STEP_NAME = re.compile(r"step-(\d{9})")
RECORD_NAME = "checkpoint.json"

#: What `.metadata` is made of, beside `torch.dtype`s and paths.
METADATA_PARTS: dict[tuple[str, str], Any] = {
    (part.__module__, part.__qualname__): part
    for part in (
        metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta, metadata.BytesStorageMetadata,
        metadata.TensorStorageMetadata, metadata.ChunkStorageMetadata, metadata.TensorProperties,
        metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo, torch.Size, torch.serialization._get_layout,
    )
}  # fmt: skip


def trained_state(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Trained parameters and their optimiser state; what is frozen is the base's, and is not saved again."""
    is_untouched = not optimizer.state
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = StateDictOptions(ignore_frozen_params=True)
        optimizer_state = get_optimizer_state_dict(model, optimizer, options=options)
    if is_untouched:  # PyTorch has filled it, by a step that moves nothing and that AdamW counts all the same
        for state in optimizer.state.values():
            state["step"].zero_()
    parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {"model": parameters, "optimizer": optimizer_state}


def save(
    directory: Path, step: int, model: Transformer, optimizer: torch.optim.Optimizer, extra: dict[str, Any]
) -> None:
    """Write `directory/step-N`. `extra` must be JSON: counters that the run needs to go on."""
    final = directory / f"step-{step:09d}"
    if final.exists():
        return
    with atomic_directory(final) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "torch.distributed is unavailable": one process is meant
        state_dict_saver.save(trained_state(model, optimizer), checkpoint_id=temporary, no_dist=True)
        files = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
        write_record(temporary / RECORD_NAME, "flexpert.checkpoint", {"step": step, "files": files, **extra})


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
    record = check_files(path)
    state = trained_state(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            state_dict_loader.load(state, storage_reader=Reader(path), planner=LoadPlanner(), no_dist=True)
        except (pickle.UnpicklingError, CheckpointException) as error:
            causes = (
                [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
            )
            if not any(isinstance(cause, pickle.UnpicklingError) for cause in causes):
                raise
            raise UserError(f"{path} is no checkpoint of ours, and is not loaded: delete it") from error
        options = StateDictOptions(ignore_frozen_params=True)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
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


class LoadPlanner(DefaultLoadPlanner):
    """PyTorch's, which unpickles what is no tensor (such as a learning rate) whatever it names; here it may not."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def retain(directory: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints."""
    for step in steps(directory)[:-keep]:
        shutil.rmtree(directory / f"step-{step:09d}")
