"""Take experts out of an assembled model.

The result is what `assemble` would have written without them, byte for byte: their files are dropped, their router
rows are left out, and the experts behind them move up. Nothing is masked: a zeroed router row can still be chosen.
Files are checked against `assembly.json` while they are copied.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flexpert.assembly.assemble import copy_file, write_config_and_index, write_routers
from flexpert.assembly.base import expert_name, model_class, router_name
from flexpert.assembly.record import AssemblyRecord, read_assembly, select_experts, write_assembly
from flexpert.assembly.tensors import FileRecord, SafetensorsFile, TensorSource, write_tensors
from flexpert.checkpoint.store import atomic_directory
from flexpert.contribution.record import PROJECTIONS, PUBLIC_ID
from flexpert.errors import UserError
from flexpert.fields import FileEntry, require
from flexpert.records import read_json


def remove(model: Path, experts: Sequence[str], output: Path, *, record_removed: bool = False) -> AssemblyRecord:
    """Write an assembled model without some of its experts.

    k becomes the smaller of the k in the model's config.json and the number of experts left.

    Args:
        model: directory that `assemble` or `remove` wrote.
        experts: ids to take out; "public" may be one of them.
        output: must not exist yet.
        record_removed: keep in `assembly.json` how many experts were removed; never which.

    Returns:
        The content of the new `assembly.json`.

    Raises:
        UserError: an id is not in the model, no expert would be left, or a file of the model is missing or altered.
            Nothing is then left under `output`.
    """
    record = read_assembly(model)
    if not experts:
        raise UserError(f"no expert to remove from {model} is named; give one id or more")
    kept = select_experts(record.to_json(), experts)
    left = [record.experts[index] for index in kept]
    # The public expert's bias is always 0, so when it alone is left there is none to keep.
    biased = record.biased and any(expert.id != PUBLIC_ID for expert in left)
    config = _read_config(model, record)
    active = min(config["num_experts_per_tok"], len(kept))
    num_layers = config["num_hidden_layers"]
    config |= {"num_experts": len(kept), "num_experts_per_tok": active, **model_class(biased)}

    with atomic_directory(output) as directory:
        tokenizer = tuple(_copy_checked(model, directory, file) for file in record.tokenizer)
        if (model / "generation_config.json").exists():
            copy_file(model, directory, "generation_config.json")
        trunk = [_copy_tensors(model, directory, file, {}) for file in record.trunk]
        router = _write_routers(model, directory, record, kept, num_layers, biased)
        own = [
            _copy_tensors(model, directory, record.experts[before].file, _new_names(num_layers, before, after))
            for after, before in enumerate(kept)
        ]
        write_config_and_index(directory, config, [*trunk, router, *own], model)
        result = replace(
            record,
            active_experts=active,
            biased=biased,
            router=router.entry,
            trunk=tuple(file.entry for file in trunk),
            tokenizer=tokenizer,
            experts=tuple(replace(expert, file=file.entry) for expert, file in zip(left, own, strict=True)),
            removed=record.removed + len(record.experts) - len(kept) if record_removed else 0,
        )
        write_assembly(directory, result)
    return result


def _read_config(model: Path, record: AssemblyRecord) -> dict[str, Any]:
    """The model's config.json, where k may have been changed by hand; the rest must agree with `assembly.json`."""
    where = model / "config.json"
    config = read_json(where)
    require(config, "num_hidden_layers", int, where)
    num_experts, active = require(config, "num_experts", int, where), require(config, "num_experts_per_tok", int, where)
    if num_experts != len(record.experts) or config.get("model_type") != model_class(record.biased)["model_type"]:
        raise UserError(f"{where} and assembly.json disagree on the experts; assemble the model again")
    if not 1 <= active <= num_experts:
        raise UserError(f"{where}: num_experts_per_tok={active} is not between 1 and num_experts={num_experts}")
    return config


def _new_names(num_layers: int, before: int, after: int) -> dict[str, str]:
    """The names of the tensors of the expert that moves from one index to another."""
    return {
        expert_name(layer, before, part): expert_name(layer, after, part)
        for layer in range(num_layers)
        for part in PROJECTIONS
    }


def _altered(path: Path) -> UserError:
    return UserError(f"{path} was altered (its SHA-256 differs from assembly.json); fetch or assemble the model again")


def _copy_checked(model: Path, directory: Path, file: FileEntry) -> FileEntry:
    copy = copy_file(model, directory, file.name)
    if copy != file:
        raise _altered(model / file.name)
    return copy


@contextmanager
def _open_checked(path: Path, entry: FileEntry) -> Iterator[tuple[SafetensorsFile, Callable[[str], Iterator[bytes]]]]:
    """Open a safetensors file whose tensors will all be read, in the order of the file, by the function that comes
    with it; when the block ends, the file's hash must be the entry's.

    Raises:
        UserError: the file is missing, malformed or altered.
    """
    with SafetensorsFile.open(path) as file:
        content = hashlib.sha256(file.header)

        def read(name: str) -> Iterator[bytes]:
            for piece in file.read_pieces(name):
                content.update(piece)
                yield piece

        yield file, read
        if content.hexdigest() != entry.sha256:
            raise _altered(path)


def _copy_tensors(model: Path, directory: Path, entry: FileEntry, new_names: Mapping[str, str]) -> FileRecord:
    """Write a file of the model again, with new names for some of its tensors."""
    path = model / entry.name
    with _open_checked(path, entry) as (file, read):
        sources = [
            TensorSource(
                new_names.get(name, name), info.dtype, info.shape, partial(read, name), f"{path}: the tensor {name!r}"
            )
            for name, info in file.tensors.items()
        ]
        return write_tensors(directory / entry.name, sources)


def _write_routers(
    model: Path, directory: Path, record: AssemblyRecord, kept: list[int], num_layers: int, biased: bool
) -> FileRecord:
    """Write the routers with the rows of the experts that are left."""
    path = model / record.router.name
    with _open_checked(path, record.router) as (file, read):
        tensors = {name: b"".join(read(name)) for name in file.tensors}

    num_experts = len(record.experts)

    def rows(layer: int, part: str) -> list[bytes]:
        name = router_name(layer, part)
        if name not in tensors or file.tensors[name].shape[:1] != (num_experts,):
            raise UserError(f"{path} has no tensor {name!r} of {num_experts} rows; assemble the model again")
        row_bytes = len(tensors[name]) // num_experts
        return [tensors[name][index * row_bytes : (index + 1) * row_bytes] for index in kept]

    weights = [rows(layer, "weight") for layer in range(num_layers)]
    biases = [rows(layer, "bias") for layer in range(num_layers)] if biased else None
    return write_routers(directory, file.tensors[router_name(0, "weight")].dtype, weights, biases)
