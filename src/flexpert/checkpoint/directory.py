"""Model directories, checked without reading a weight.

This is the one reader of config.json, of the index, of the weights' headers and of what `assembly.json` says about
them; it needs no torch. Whoever opens a directory here knows that no file is missing or cut short, that the tensors are
those that the config calls for, and which expert is which. What the bytes are is for the hashes to say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexpert.assembly.record import RECORD_NAME, AssemblyRecord, read_assembly
from flexpert.assembly.tensors import open_model
from flexpert.checkpoint.layout import (
    PROJECTIONS,
    STORED_DTYPES,
    Architecture,
    check_shapes,
    expert_name,
    model_config,
)
from flexpert.config.groups import ModelConfig
from flexpert.errors import UserError
from flexpert.records import read_json

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ModelDirectory:
    """A checked Hugging Face directory.

    Attributes:
        path: where it lies.
        config: the model's shape, all experts included.
        experts: expert ids in the directory's order; empty for a dense model.
        raw: config.json as it is.
        files: tensor name → file that holds it.
        dtypes: tensor name → safetensors' name of its type.
    """

    path: Path
    config: ModelConfig
    experts: tuple[str, ...]
    raw: Mapping[str, Any]
    files: Mapping[str, Path]
    dtypes: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> "ModelDirectory":
        """Open a dense or an assembled model.

        Raises:
            UserError: the directory is missing, holds another architecture or a feature that we do not compute, a
                weight file is missing, cut short or malformed, or config.json, index, files and `assembly.json`
                disagree.
        """
        where = path / "config.json"
        if not where.is_file():
            raise UserError(f"{path} is not a model directory: it has no config.json")
        raw = read_json(where)
        config = model_config(raw, where)
        with open_model(path) as weights:
            check_shapes({name: info.shape for name, info in weights.tensors.items()}, config, path)
            files = {name: weights.path_of(name) for name in weights.tensors}
            dtypes = {name: info.dtype for name, info in weights.tensors.items()}
        experts: tuple[str, ...] = ()
        if (path / RECORD_NAME).is_file():
            record = read_assembly(path)
            check_config(record, config, where)
            _check_files(record, config, path, files)
            experts = tuple(expert.id for expert in record.experts)
        elif config.num_experts:
            experts = ("public", *(f"expert-{index}" for index in range(1, config.num_experts)))
        return cls(path, config, experts, raw, files, dtypes)

    @property
    def architecture(self) -> Architecture:
        return Architecture.of(self.config)

    def stored_dtype(self) -> str:
        """Safetensors' name of the one type that every tensor has, BF16 or F32.

        Raises:
            UserError: the types differ, or are another one.
        """
        found = {dtype: name for name, dtype in self.dtypes.items()}
        if len(found) > 1 or next(iter(found)) not in STORED_DTYPES:
            types = ", ".join(f"{dtype} ({name})" for dtype, name in found.items())
            raise UserError(f"{self.path} is stored as {types}; convert it to all BF16 or all F32 first")
        return next(iter(found))

    def require_one_dtype(self) -> "torch.dtype":
        """As `stored_dtype`, for PyTorch."""
        import torch

        return {"BF16": torch.bfloat16, "F32": torch.float32}[self.stored_dtype()]


def check_config(record: AssemblyRecord, config: ModelConfig, where: Path) -> None:
    """Compare `assembly.json` with the config.json beside it, where k alone may have been changed by hand.

    Raises:
        UserError: they disagree.
    """
    if config.num_experts != len(record.experts) or config.router_bias != record.biased:
        raise UserError(f"{where} and {RECORD_NAME} disagree on the experts; assemble the model again")
    record.architecture.check_equal(Architecture.of(config), RECORD_NAME, str(where), "assemble the model again")


def _check_files(record: AssemblyRecord, config: ModelConfig, path: Path, files: Mapping[str, Path]) -> None:
    """Every listed file has its size, weights are in listed files alone, and each expert's are in its own."""
    for entry in record.files:
        entry_path = path / entry.name
        if not entry_path.is_file():
            raise UserError(f"{entry_path} is listed in {RECORD_NAME} but missing; fetch or assemble the model again")
        if (size := entry_path.stat().st_size) != entry.bytes:
            raise UserError(
                f"{entry_path} has {size} bytes, {RECORD_NAME} says {entry.bytes}; fetch or assemble the model again"
            )
    for file in set(files.values()) - {path / entry.name for entry in record.files}:
        raise UserError(f"{file} holds weights but is not listed in {RECORD_NAME}; assemble the model again")
    for index, expert in enumerate(record.experts):
        own = [entry.name for entry in expert.files]
        for layer in range(config.num_layers):
            for projection in PROJECTIONS:
                name = expert_name(layer, index, projection)
                if files[name].name not in own:
                    raise UserError(
                        f"{path / RECORD_NAME}: the expert {expert.id!r} is number {index}, whose {name} is in "
                        f"{files[name].name} and not in {' or '.join(own)}; assemble the model again"
                    )
