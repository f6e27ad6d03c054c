"""Take experts out of an assembled model.

The result is what `assemble` would have written without them, byte for byte: their files are dropped, their router
rows are left out, and the experts behind them move up. Nothing is masked: a zeroed router row can still be chosen.
Files are checked against `assembly.json` while they are copied.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexpert.assembly.assemble import (
    begin_expert,
    entries,
    expert_entry,
    finish_expert,
    write_config_and_index,
    write_routers,
)
from flexpert.assembly.files import ModelWriter, Pending, new_directory, written
from flexpert.assembly.record import (
    GENERATION_FILE,
    AssemblyRecord,
    ExpertEntry,
    read_assembly,
    select_experts,
    write_assembly,
)
from flexpert.assembly.tensors import ITEM_BYTES, FileRecord
from flexpert.assembly.verify import copy_checked, copy_file, copy_tensors, read_small
from flexpert.checkpoint.directory import check_config
from flexpert.checkpoint.layout import PROJECTIONS, expert_name, model_class, model_config, router_name
from flexpert.config.stages import MAX_FILE_BYTES
from flexpert.contribution.record import PUBLIC_ID
from flexpert.contribution.verify import OpenContribution
from flexpert.errors import UserError
from flexpert.fields import FileEntry
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
        lambda directory: write_rows(model, directory, record, kept, biased),
    )


def write_changed(
    model: Path,
    output: Path,
    record: AssemblyRecord,
    experts: Sequence[int | OpenContribution],
    config: dict[str, Any],
    write_router: Callable[[Path], FileRecord],
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> AssemblyRecord:
    """Write an assembled model again, with other routers and perhaps other experts.

    Args:
        model: directory of an assembled model; what is copied from it is checked, and keeps its split into files.
        output: must not exist yet.
        record: what is to be recorded, with the files and all the experts of `model`.
        experts: those of the new model: indices in `model`, and contributions that were checked against it.
        config: the new config.json.
        write_router: writes the routers' file into the directory that it is given.
        max_file_bytes: as `assemble`'s, for contributions.

    Returns:
        The content of the new `assembly.json`.

    Raises:
        UserError: a file of the model is missing or altered, as is a contribution's, or the disk is full. Nothing is
            then left under `output`.
    """
    num_layers = record.architecture.num_hidden_layers
    with new_directory(output) as directory, ModelWriter(directory) as writer:

        def copy(files: Sequence[FileEntry], new_names: Mapping[str, str] | None) -> Pending:
            return [writer.submit(copy_tensors, model, directory, file, new_names) for file in files]

        def begin(index: int, expert: int | OpenContribution) -> Pending:
            if isinstance(expert, int):
                return copy(record.experts[expert].files, _new_names(num_layers, expert, index))
            return begin_expert(writer, index, expert, max_file_bytes)

        def finish(index: int, expert: int | OpenContribution, writing: Pending) -> ExpertEntry:
            if isinstance(expert, int):
                return replace(record.experts[expert], files=entries(written(writing)))
            return expert_entry(expert, finish_expert(writing, index, expert))

        writing_trunk = copy(record.trunk, None)
        writing = [begin(index, expert) for index, expert in enumerate(experts)]
        tokenizer = tuple(copy_checked(model, directory, file) for file in record.tokenizer)
        generation = record.generation
        if generation is not None:
            copy_checked(model, directory, generation)
        elif (model / GENERATION_FILE).exists():
            generation = copy_file(model, directory, GENERATION_FILE)
        router = write_router(directory)
        trunk = written(writing_trunk)
        own = [finish(*numbered, files) for numbered, files in zip(enumerate(experts), writing, strict=True)]
        files = [*trunk, router, *(file for pending in writing for file in written(pending))]
        write_config_and_index(directory, config, files, model)
        result = replace(
            record,
            router=router.entry,
            trunk=entries(trunk),
            tokenizer=tokenizer,
            generation=generation,
            experts=tuple(own),
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


def write_rows(
    model: Path, directory: Path, record: AssemblyRecord, experts: Sequence[int | OpenContribution], biased: bool
) -> FileRecord:
    """Write the routers with the rows of these experts, which are as `write_changed`'s.

    Raises:
        UserError: the routers' file of `model` is missing, altered, or has another number of rows than there are
            experts, or a contribution's row was altered.
    """
    infos, tensors = read_small(model, record.router)
    num_experts = len(record.experts)

    def row(layer: int, part: str, expert: int | OpenContribution) -> bytes:
        if not isinstance(expert, int):
            return expert.read_checked(f"layers.{layer}.router.{part}")
        name = router_name(layer, part)
        if part == "bias" and not record.biased:  # only the public expert can meet others with a bias; its own is 0
            return bytes(ITEM_BYTES[infos[router_name(layer, "weight")].dtype])
        if name not in tensors or infos[name].shape[:1] != (num_experts,):
            path = model / record.router.name
            raise UserError(f"{path} has no tensor {name!r} of {num_experts} rows; assemble the model again")
        row_bytes = len(tensors[name]) // num_experts
        return tensors[name][expert * row_bytes : (expert + 1) * row_bytes]

    def rows(part: str) -> list[list[bytes]]:
        layers = range(record.architecture.num_hidden_layers)
        return [[row(layer, part, expert) for expert in experts] for layer in layers]

    weights, biases = rows("weight"), rows("bias") if biased else None
    return write_routers(directory, infos[router_name(0, "weight")].dtype, weights, biases)
