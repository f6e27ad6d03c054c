"""`assembly.json`: which experts an assembled model has, where each came from, and what its files hold."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexpert.checkpoint.layout import Architecture
from flexpert.contribution.record import PUBLIC_ID, ExpertIdentity, check_identity
from flexpert.errors import UserError
from flexpert.fields import FileEntry, require, require_sha256
from flexpert.records import read_record, write_record

ASSEMBLY_KIND = "flexpert.assembly"
RECORD_NAME = "assembly.json"
GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class ExpertEntry:
    """One expert of an assembled model.

    Attributes:
        id: stable; its index in the model is its place in `AssemblyRecord.experts`.
        title: for people.
        license: None where its owner states none.
        contribution: digest of the contribution that it came from; None for the public expert.
        files: the safetensors files that hold its FFNs and nothing else; several where they are large.
    """

    id: str
    title: str
    license: str | None
    contribution: str | None
    files: tuple[FileEntry, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "title": self.title,
            "license": self.license,
            "contribution": self.contribution,
            "files": [file.to_json() for file in self.files],
        }

    @staticmethod
    def from_json(value: Any, where: Path) -> "ExpertEntry":
        if not isinstance(value, dict):
            raise UserError(f"{where}: an entry of an expert is not an object; assemble the model again")
        return ExpertEntry(
            id=require(value, "id", str, where),
            title=require(value, "title", str, where),
            license=None if value.get("license") is None else require(value, "license", str, where),
            contribution=None
            if value.get("contribution") is None
            else require_sha256(value, "contribution", where, prefix="sha256:"),
            files=tuple(FileEntry.from_json(file, where) for file in require(value, "files", list, where)),
        )


@dataclass(frozen=True)
class AssemblyRecord:
    """The content of `assembly.json`. It holds no time and no path: the same inputs give the same bytes.

    Attributes:
        base_digest: the public model.
        architecture: the public model's; with its tensors it says what the model computes.
        active_experts: experts that a token uses (k); also num_experts_per_tok in config.json.
        biased: whether the router has a bias.
        tuned: whether router rows were trained together, so that each depends on every domain of that training.
        router: the file of the routers of all layers.
        trunk: the files of everything that is neither router nor FFN.
        tokenizer: the tokenizer's files.
        generation: `generation_config.json`, where the public model has one; models of before it was listed have None.
        experts: in the order of their indices.
        removed: experts that were removed, where the user asked to keep the number.
    """

    base_digest: str
    architecture: Architecture
    active_experts: int
    biased: bool
    router: FileEntry
    trunk: tuple[FileEntry, ...]
    tokenizer: tuple[FileEntry, ...]
    experts: tuple[ExpertEntry, ...]
    tuned: bool = False
    removed: int = 0
    generation: FileEntry | None = None

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file that is listed."""
        own = (file for expert in self.experts for file in expert.files)
        return (*self.trunk, self.router, *own, *self.tokenizer, *([self.generation] if self.generation else []))

    def to_json(self) -> dict[str, Any]:
        tuned = {"tuned": True} if self.tuned else {}
        removed = {"removed": self.removed} if self.removed else {}
        generation = {"generation": self.generation.to_json()} if self.generation else {}
        return {
            "base_digest": self.base_digest,
            "architecture": self.architecture.to_json(),
            "active_experts": self.active_experts,
            "router": {"bias": self.biased, **tuned, "file": self.router.to_json()},
            "trunk": [file.to_json() for file in self.trunk],
            "tokenizer": [file.to_json() for file in self.tokenizer],
            **generation,
            "experts": [expert.to_json() for expert in self.experts],
            **removed,
        }


def write_assembly(directory: Path, record: AssemblyRecord) -> None:
    write_record(directory / RECORD_NAME, ASSEMBLY_KIND, record.to_json())


def read_assembly(directory: Path) -> AssemblyRecord:
    """Read the record of an assembled model.

    Raises:
        UserError: the record is missing or malformed; `directory` is not an assembled model.
    """
    where = directory / RECORD_NAME
    if not where.is_file():
        raise UserError(f"{directory} holds no {RECORD_NAME}; give a model that `flexpert assemble` wrote")
    record = read_record(where, ASSEMBLY_KIND)
    router = require(record, "router", dict, where)
    experts = tuple(ExpertEntry.from_json(value, where) for value in require(record, "experts", list, where))
    if len({expert.id for expert in experts}) < len(experts):
        raise UserError(f"{where} lists an expert twice; assemble the model again")
    for expert in experts:
        if expert.id != PUBLIC_ID:
            check_identity(ExpertIdentity(expert.id, expert.title, expert.license), where)
    assembly = AssemblyRecord(
        base_digest=require_sha256(record, "base_digest", where, prefix="sha256:"),
        architecture=Architecture.from_json(require(record, "architecture", dict, where), where),
        active_experts=require(record, "active_experts", int, where),
        biased=require(router, "bias", bool, where),
        router=FileEntry.from_json(router.get("file"), where),
        trunk=tuple(FileEntry.from_json(value, where) for value in require(record, "trunk", list, where)),
        tokenizer=tuple(FileEntry.from_json(value, where) for value in require(record, "tokenizer", list, where)),
        experts=experts,
        tuned=require(router, "tuned", bool, where) if "tuned" in router else False,
        removed=require(record, "removed", int, where) if "removed" in record else 0,
        generation=FileEntry.from_json(record["generation"], where) if "generation" in record else None,
    )
    if len({file.name for file in assembly.files}) < len(assembly.files):
        raise UserError(f"{where} lists a file twice; assemble the model again")
    return assembly


def select_experts(present: Sequence[str], exclude: Iterable[str]) -> list[int]:
    """The indices of the experts that stay when those of `exclude` are taken out, in ascending order.

    Args:
        present: ids of the model's experts, in their order.
        exclude: ids of experts.

    Raises:
        UserError: an id is not in the model (the message lists those that are), or no expert would be left.
    """
    excluded = set(exclude)
    for expert in sorted(excluded):
        if expert not in present:
            raise UserError(f"there is no expert {expert!r} in this model; it has {', '.join(present)}")
    if excluded == set(present):
        raise UserError(f"no expert would be left; keep at least one of {', '.join(present)}")
    return [index for index, expert in enumerate(present) if expert not in excluded]
