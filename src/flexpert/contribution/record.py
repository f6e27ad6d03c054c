"""What a contribution is: one owner's expert for one public model, as a directory of two files.

`contribution.json` says what `expert.safetensors` holds and what it was trained against. Shape letters:
D hidden size, F FFN width.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexpert.assembly.tensors import TensorDigest
from flexpert.checkpoint.layout import Architecture
from flexpert.config.options import EXPERT_ID
from flexpert.errors import UserError
from flexpert.fields import FileEntry
from flexpert.records import canonical_json, sha256_hex

CONTRIBUTION_KIND = "flexpert.contribution"
RECORD_NAME = "contribution.json"
TENSORS_NAME = "expert.safetensors"

#: How the names of the files of a large expert end; as ids, they could name another expert's file.
PART_OF_SEVERAL = re.compile(r"-\d{5}-of-\d{5}$")

#: What a contribution's digest covers; the rest is for people, and how the tensors lie in files.
DIGESTED = ("id", "title", "license", "base_digest", "architecture", "tensors")

#: The id of the public model's own FFN in an assembled model.
PUBLIC_ID = "public"


@dataclass(frozen=True)
class ExpertIdentity:
    """Who an expert is.

    Attributes:
        id: stable and unique in a model; the index of the expert in a model is something else.
        title: for people.
        license: an SPDX expression or any other text, or None where the owner states none.
    """

    id: str
    title: str
    license: str | None = None


def check_identity(identity: ExpertIdentity, where: Path | str) -> None:
    """Refuse ids and titles that cannot be used.

    Raises:
        UserError: the id is malformed or reserved, or a text does not fit on one line.
    """
    if not EXPERT_ID.fullmatch(identity.id):
        raise UserError(
            f"{where}: the expert id {identity.id!r} is invalid; use a-z, 0-9 and '-', a letter first, "
            "at most 64 characters"
        )
    if PART_OF_SEVERAL.search(identity.id):
        raise UserError(f"{where}: the expert id {identity.id!r} ends as a part of a large file; choose another id")
    if identity.id == PUBLIC_ID:
        raise UserError(f"{where}: the expert id {PUBLIC_ID!r} is reserved for the public model; choose another id")
    for name, text in (("title", identity.title), ("license", identity.license or "")):
        if not text.isprintable():
            raise UserError(f"{where}: the {name} of the expert {identity.id} must be one line of printable text")


def expert_shapes(architecture: Architecture, bias: bool) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a contribution, in the order in which they are stored.

    The router row is relative to the public expert's, which is the zero vector: softmax does not change when the same
    vector is taken from every row. So a contribution carries one row per layer, and a bias if the router has one.
    """
    D, F = architecture.hidden_size, architecture.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(architecture.num_hidden_layers):
        shapes[f"layers.{layer}.gate_proj.weight"] = (F, D)
        shapes[f"layers.{layer}.up_proj.weight"] = (F, D)
        shapes[f"layers.{layer}.down_proj.weight"] = (D, F)
        shapes[f"layers.{layer}.router.weight"] = (D,)
        if bias:
            shapes[f"layers.{layer}.router.bias"] = (1,)
    return shapes


def contribution_digest(record: Mapping[str, Any]) -> str:
    """What a contribution is: whose, for which public model, which tensors, however they are spread over files."""
    return "sha256:" + sha256_hex(canonical_json({key: record[key] for key in DIGESTED}))


@dataclass(frozen=True)
class Contribution:
    """The content of `contribution.json`.

    Attributes:
        directory: where it lies.
        identity: whose it is.
        base_digest: the public model that it was trained against.
        architecture: the public model's, which is the expert's too.
        dtype: of every tensor; one of `STORED_DTYPES`.
        router: "bias" (bool) and "init" (how the rows started); for people also "embedding" (its kind), "projection",
            "documents" (how many of the owner's were read for it) and "public_text" (whether that was read).
        training: facts about the training, such as steps and tokens; for people.
        files: the safetensors files.
        tensors: name → digest.
    """

    directory: Path
    identity: ExpertIdentity
    base_digest: str
    architecture: Architecture
    dtype: str
    router: Mapping[str, Any]
    training: Mapping[str, Any]
    files: tuple[FileEntry, ...]
    tensors: Mapping[str, TensorDigest]

    @property
    def has_bias(self) -> bool:
        return bool(self.router["bias"])

    @property
    def digest(self) -> str:
        return contribution_digest(self._content())

    @property
    def contents(self) -> list[str]:
        """What leaves the owner with it, for people to read."""
        shape = self.architecture
        L, D, F = shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size
        lines = [
            f"{TENSORS_NAME}: trained weights of the feed-forward network, {L} x 3 x {D} x {F} numbers ({self.dtype})",
            f"{TENSORS_NAME}: trained router rows, {L} x {D} numbers, {self._row_origin()}",
            f"{RECORD_NAME}: id, title and licence; digest and architecture of the public model; hashes of the tensors",
            f"{RECORD_NAME}: how the router rows started; of the training: {', '.join(self.training) or 'nothing'}",
        ]
        if self.has_bias:
            lines.insert(2, f"{TENSORS_NAME}: trained router biases, {L} numbers")
        return lines

    def _row_origin(self) -> str:
        count = self.router.get("documents")
        match self.router.get("embedding"):
            case "stream":
                return f"started from means over {count} of the owner's documents, as the public model reads them"
            case "sentence-transformers":
                return f"started from means over {count} of the owner's documents' sentence embeddings"
            case "file":
                return "started from a vector that the owner gave"
        return f"started as: {self.router['init']}"

    def to_json(self) -> dict[str, Any]:
        return self._content() | {"digest": self.digest}

    def _content(self) -> dict[str, Any]:
        return {
            "id": self.identity.id,
            "title": self.identity.title,
            "license": self.identity.license,
            "contents": self.contents,
            "base_digest": self.base_digest,
            "architecture": self.architecture.to_json(),
            "dtype": self.dtype,
            "router": dict(self.router),
            "training": dict(self.training),
            "files": [file.to_json() for file in self.files],
            "tensors": {name: digest.to_json() for name, digest in self.tensors.items()},
        }
