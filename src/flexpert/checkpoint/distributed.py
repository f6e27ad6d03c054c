"""Training checkpoints: torch distributed checkpoint inside step directories that are written whole and verified.

    checkpoints/step-000000200/{*.distcp, .metadata, checkpoint.json}

`.metadata` is a pickle, so no file is opened before its SHA-256 has been compared with `checkpoint.json`.
"""

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from flexpert.checkpoint.store import atomic_directory
from flexpert.errors import UserError
from flexpert.model.transformer import Transformer
from flexpert.records import read_record, sha256_file, write_record

STEP_NAME = re.compile(r"step-(\d{9})")


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
        write_record(temporary / "checkpoint.json", "flexpert.checkpoint", {"step": step, "files": files, **extra})


def steps(directory: Path) -> list[int]:
    """Steps that have a committed checkpoint, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(match[1]) for path in directory.iterdir() if (match := STEP_NAME.fullmatch(path.name)))


def load(directory: Path, step: int, model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore model and optimiser in place from `directory/step-N`, and return its record.

    Raises:
        UserError: a file is missing or is not the one that was written.
    """
    path = directory / f"step-{step:09d}"
    record = read_record(path / "checkpoint.json", "flexpert.checkpoint")
    for name, digest in record["files"].items():
        if not (path / name).is_file() or sha256_file(path / name) != digest:
            raise UserError(f"{path / name} is missing or altered: delete {path} to resume from the step before")
    state = trained_state(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state_dict_loader.load(state, checkpoint_id=path, no_dist=True)
        options = StateDictOptions(ignore_frozen_params=True)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    return record


def retain(directory: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints."""
    for step in steps(directory)[:-keep]:
        shutil.rmtree(directory / f"step-{step:09d}")
