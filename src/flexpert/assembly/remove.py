"""Take experts out of an assembled model.

The result is what `assemble` would have written without them, byte for byte: their files are dropped, their router
rows are left out, and the experts behind them move up. Nothing is masked: a zeroed router row can still be chosen.
Files are checked against `assembly.json` while they are copied.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexpert.assembly.assemble import write_config_and_index, write_routers
from flexpert.assembly.record import AssemblyRecord, read_assembly, select_experts, write_assembly
from flexpert.assembly.tensors import FileRecord
from flexpert.assembly.verify import copy_checked, copy_file, copy_tensors, open_checked
from flexpert.checkpoint.directory import check_config
from flexpert.checkpoint.layout import PROJECTIONS, expert_name, model_class, model_config, router_name
from flexpert.checkpoint.store import atomic_directory
from flexpert.contribution.record import PUBLIC_ID
from flexpert.errors import UserError
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
    kept = select_experts([expert.id for expert in record.experts], experts)
    where = model / "config.json"
    raw = read_json(where)
    config = model_config(raw, where)
    check_config(record, config, where)
    # The public expert's bias is always 0, so when it alone is left there is none to keep.
    biased = record.biased and any(record.experts[index].id != PUBLIC_ID for index in kept)
    active = min(config.active_experts, len(kept))
    changed = replace(
        record,
        active_experts=active,
        biased=biased,
        removed=record.removed + len(record.experts) - len(kept) if record_removed else 0,
    )
    return write_changed(
        model,
        output,
        changed,
        kept,
        raw | {"num_experts": len(kept), "num_experts_per_tok": active, **model_class(biased)},
        lambda directory: _write_routers(model, directory, record, kept, config.num_layers, biased),
    )


def write_changed(
    model: Path,
    output: Path,
    record: AssemblyRecord,
    kept: Sequence[int],
    config: dict[str, Any],
    write_router: Callable[[Path], FileRecord],
) -> AssemblyRecord:
    """Write an assembled model again, with other routers and perhaps fewer experts.

    Args:
        model: directory of an assembled model; what is copied from it is checked.
        output: must not exist yet.
        record: what is to be recorded, with the files and all the experts of `model`.
        kept: indices of the experts that stay.
        config: the new config.json.
        write_router: writes the routers' file into the directory that it is given.

    Returns:
        The content of the new `assembly.json`.

    Raises:
        UserError: a file of the model is missing or altered. Nothing is then left under `output`.
    """
    num_layers = record.architecture.num_hidden_layers
    with atomic_directory(output) as directory:
        tokenizer = tuple(copy_checked(model, directory, file) for file in record.tokenizer)
        if (model / "generation_config.json").exists():
            copy_file(model, directory, "generation_config.json")
        trunk = [copy_tensors(model, directory, file, {}) for file in record.trunk]
        router = write_router(directory)
        own = [
            copy_tensors(model, directory, record.experts[before].file, _new_names(num_layers, before, after))
            for after, before in enumerate(kept)
        ]
        write_config_and_index(directory, config, [*trunk, router, *own], model)
        result = replace(
            record,
            router=router.entry,
            trunk=tuple(file.entry for file in trunk),
            tokenizer=tokenizer,
            experts=tuple(
                replace(record.experts[index], file=file.entry) for index, file in zip(kept, own, strict=True)
            ),
        )
        write_assembly(directory, result)
    return result


def _new_names(num_layers: int, before: int, after: int) -> dict[str, str]:
    """The names of the tensors of the expert that moves from one index to another."""
    return {
        expert_name(layer, before, part): expert_name(layer, after, part)
        for layer in range(num_layers)
        for part in PROJECTIONS
    }


def _write_routers(
    model: Path, directory: Path, record: AssemblyRecord, kept: list[int], num_layers: int, biased: bool
) -> FileRecord:
    """Write the routers with the rows of the experts that are left."""
    path = model / record.router.name
    with open_checked(path, record.router) as (file, read):
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
