"""Assemble a public model and contributions into one mixture of experts (FlexOlmo, arXiv 2507.07024).

No weight is computed: FFNs become experts, router rows are stacked below the public row, which is zero, and everything
else is the public model's, bit for bit. One pass reads, checks, hashes and writes every tensor, several files at a
time; the model appears under its final name when all of it has been verified.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexpert.assembly.files import ModelWriter, Pending, new_directory, written
from flexpert.assembly.record import GENERATION_FILE, AssemblyRecord, ExpertEntry, write_assembly
from flexpert.assembly.tensors import (
    INDEX_FILE,
    ITEM_BYTES,
    FileRecord,
    TensorDigest,
    TensorSet,
    TensorSource,
    open_model,
    write_tensors,
)
from flexpert.assembly.verify import copy_file
from flexpert.checkpoint.digest import TOKENIZER_FILES, digest_of, tokenizer_digest
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.checkpoint.layout import (
    PROJECTIONS,
    assembled_config,
    check_shapes,
    expert_name,
    ffn_name,
    model_config,
    model_shapes,
    router_name,
)
from flexpert.config.stages import MAX_FILE_BYTES
from flexpert.contribution.record import PUBLIC_ID
from flexpert.contribution.verify import OpenContribution, check_against_base, open_contribution
from flexpert.errors import UserError
from flexpert.fields import FileEntry
from flexpert.records import write_json

TRUNK = "trunk"
ROUTER_FILE = "router.safetensors"

#: `rows[layer][expert]` is the raw bytes of a row.
Rows = Sequence[Sequence[bytes]]


def assemble(
    base: Path,
    contributions: Sequence[Path],
    output: Path,
    *,
    active_experts: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> AssemblyRecord:
    """Write the model of a public model and contributions, as a Hugging Face directory.

    The same inputs give the same bytes, and so does a base that is sharded in another way.

    Args:
        base: directory of an Olmo2ForCausalLM.
        contributions: directories; their order is the order of the experts, after the public one.
        output: must not exist yet.
        active_experts: experts that a token uses (k); None: all.
        max_file_bytes: the trunk and each expert are split into files of at most so many bytes of weights.

    Returns:
        The content of the model's `assembly.json`.

    Raises:
        UserError: an input is missing, malformed or altered, holds NaN or infinity, or does not fit the others, or the
            disk is full. Nothing is then left under `output`.
    """
    with ExitStack() as opened:
        model = ModelDirectory.open(base)
        if model.experts:
            raise UserError(f"{base} is a mixture: give the public model, or model={base} to add to this one")
        weights = opened.enter_context(open_model(base))
        experts = [opened.enter_context(open_contribution(path)) for path in contributions]
        for expert in experts:
            check_against_base(expert.record, model)
        tokenizer_digest(base)  # so that an error names the base; the digest that counts is of the copy
        check_together(experts)
        biased = any(expert.record.has_bias for expert in experts)
        num_experts = 1 + len(experts)
        active = check_active(num_experts if active_experts is None else active_experts, num_experts)

        directory = opened.enter_context(new_directory(output))
        writer = opened.enter_context(ModelWriter(directory))
        writing_trunk, writing_public = _begin_base(writer, model, weights, max_file_bytes)
        writing = [begin_expert(writer, index, expert, max_file_bytes) for index, expert in enumerate(experts, start=1)]
        router = _write_routers(directory, model, experts, biased)
        tokenizer = tuple(copy_file(base, directory, name) for name in TOKENIZER_FILES if (base / name).exists())
        has_generation = (base / GENERATION_FILE).exists()
        generation = copy_file(base, directory, GENERATION_FILE) if has_generation else None

        trunk, public = written(writing_trunk), written(writing_public)
        base_digest = _digest_of_written(trunk, public, model.config.num_layers, tokenizer_digest(directory))
        for expert in experts:
            check_against_base(expert.record, model, base_digest)
        own = [finish_expert(files, i, e) for i, (e, files) in enumerate(zip(experts, writing, strict=True), start=1)]
        for tensors in [weights, *(expert.tensors for expert in experts)]:
            tensors.assert_each_read_once()

        shape = replace(model.config, num_experts=num_experts, active_experts=active, router_bias=biased)
        files = [*trunk, router, *public, *(file for files in own for file in files)]
        write_config_and_index(directory, assembled_config(model.raw, shape), files, base)
        record = AssemblyRecord(
            base_digest=base_digest,
            architecture=model.architecture,
            active_experts=active,
            biased=biased,
            router=router.entry,
            trunk=entries(trunk),
            tokenizer=tokenizer,
            generation=generation,
            experts=(
                ExpertEntry(PUBLIC_ID, "Public", None, None, entries(public)),
                *(expert_entry(expert, files) for expert, files in zip(experts, own, strict=True)),
            ),
        )
        write_assembly(directory, record)
    return record


def check_together(experts: Sequence[OpenContribution]) -> None:
    """Check the contributions against each other."""
    records = [expert.record for expert in experts]
    first = {record.identity.id: record for record in reversed(records)}
    for record in records:
        other = first[record.identity.id]
        if other is not record:
            raise UserError(
                f"{other.directory} and {record.directory} are both the expert {record.identity.id!r}; give one of them"
            )
        if record.has_bias != records[0].has_bias:
            raise UserError(
                f"{records[0].directory} and {record.directory} differ in router.bias; train all with it or none"
            )


def check_active(active: int, num_experts: int) -> int:
    if not 1 <= active <= num_experts:
        raise UserError(f"active_experts={active} is not between 1 and the number of experts, {num_experts}")
    return active


def _begin_base(
    writer: ModelWriter, model: ModelDirectory, weights: TensorSet, max_file_bytes: int
) -> tuple[Pending, Pending]:
    """Begin to write the trunk and the public expert."""
    ffn = _public_names(model.config.num_layers)
    trunk = [weights.source(name, name) for name in model_shapes(model.config) if name not in ffn]
    public = [weights.source(name, target) for name, target in ffn.items()]
    return (
        writer.write(TRUNK, trunk, max_file_bytes),
        writer.write(expert_stem(PUBLIC_ID), public, max_file_bytes),
    )


def _public_names(num_layers: int) -> dict[str, str]:
    """The names of the FFNs in a public model, and what they are called as expert 0."""
    layers = range(num_layers)
    return {ffn_name(layer, part): expert_name(layer, 0, part) for layer in layers for part in PROJECTIONS}


def _digest_of_written(
    trunk: Sequence[FileRecord], public: Sequence[FileRecord], num_layers: int, tokenizer: str
) -> str:
    """The base digest of what was written as trunk and as public expert."""
    expert = {name: digest for file in public for name, digest in file.tensors.items()}
    digests = {name: digest for file in trunk for name, digest in file.tensors.items()}
    return digest_of(digests | {name: expert[new] for name, new in _public_names(num_layers).items()}, tokenizer)


def _own_names(expert: OpenContribution, index: int) -> dict[str, str]:
    """The names of the FFNs in a contribution, and in the model where it is the expert `index`."""
    layers = range(expert.record.architecture.num_hidden_layers)
    return {
        f"layers.{layer}.{part}.weight": expert_name(layer, index, part) for layer in layers for part in PROJECTIONS
    }


def begin_expert(writer: ModelWriter, index: int, expert: OpenContribution, max_file_bytes: int) -> Pending:
    """Begin to write a contribution's FFNs as the expert `index`."""
    sources = [expert.tensors.source(name, target) for name, target in _own_names(expert, index).items()]
    return writer.write(expert_stem(expert.record.identity.id), sources, max_file_bytes)


def finish_expert(writing: Pending, index: int, expert: OpenContribution) -> tuple[FileRecord, ...]:
    """Wait for the files of the expert `index`; what was written must have the hashes of the contribution's record."""
    files = written(writing)
    digests = {name: digest for file in files for name, digest in file.tensors.items()}
    for name, target in _own_names(expert, index).items():
        expert.check_sha256(name, digests[target].sha256)
    return files


def _write_routers(directory: Path, model: ModelDirectory, experts: list[OpenContribution], biased: bool) -> FileRecord:
    """Stack the contributions' rows below the public row, which is zero (`expert_shapes` says why)."""
    dtype = model.stored_dtype()
    item = ITEM_BYTES[dtype]
    layers = range(model.config.num_layers)

    def stack(part: str, row_bytes: int) -> Rows:
        own = [[expert.read_checked(f"layers.{layer}.router.{part}") for expert in experts] for layer in layers]
        return [[bytes(row_bytes), *rows] for rows in own]

    weights = stack("weight", model.config.hidden_size * item)
    biases = stack("bias", item) if biased else None
    return write_routers(directory, dtype, weights, biases)


def write_routers(directory: Path, dtype: str, weights: Rows, biases: Rows | None) -> FileRecord:
    """Write the router of every layer into one file: weights [E, D] and, where there are any, biases [E]."""

    def source(name: str, shape: tuple[int, ...], rows: Sequence[bytes]) -> TensorSource:
        return TensorSource(name, dtype, shape, lambda: rows, name)

    sources = []
    for layer, rows in enumerate(weights):
        E, D = len(rows), len(rows[0]) // ITEM_BYTES[dtype]
        sources.append(source(router_name(layer, "weight"), (E, D), rows))
        if biases is not None:
            sources.append(source(router_name(layer, "bias"), (E,), biases[layer]))
    return write_tensors(directory / ROUTER_FILE, sources)


def entries(files: Sequence[FileRecord]) -> tuple[FileEntry, ...]:
    return tuple(file.entry for file in files)


def expert_entry(expert: OpenContribution, files: Sequence[FileRecord]) -> ExpertEntry:
    identity = expert.record.identity
    return ExpertEntry(identity.id, identity.title, identity.license, expert.record.digest, entries(files))


def expert_stem(expert_id: str) -> str:
    """The name of an expert's file, before what `part_names` adds."""
    return f"expert-{expert_id}"


def write_config_and_index(directory: Path, config: dict[str, Any], files: Sequence[FileRecord], source: Path) -> None:
    """Write `config.json` and the index of the files that were written, which must hold what the config calls for.

    Raises:
        UserError: a tensor is missing, left over, there twice, or has another shape; the message names `source`, the
            model that the files were made from.
    """
    digests: dict[str, TensorDigest] = {}
    weight_map: dict[str, str] = {}
    for file in files:
        for name, digest in file.tensors.items():
            if name in digests:
                raise UserError(f"{source} has {name!r} in {weight_map[name]} and in {file.name}; assemble it again")
            digests[name] = digest
            weight_map[name] = file.name
    shapes = {name: digest.shape for name, digest in digests.items()}
    check_shapes(shapes, model_config(config, source / "config.json"), source)
    write_json(directory / "config.json", config)
    total = sum(digest.num_bytes for digest in digests.values())
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
