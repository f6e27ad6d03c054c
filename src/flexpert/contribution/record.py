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
from flexpert.config.groups import EXPERT_ID
from flexpert.errors import UserError
from flexpert.fields import FileEntry
from flexpert.records import canonical_json, sha256_hex

CONTRIBUTION_KIND = "flexpert.contribution"
RECORD_NAME = "contribution.json"
TENSORS_NAME = "expert.safetensors"

#: How the names of the files of a large expert end; as ids, they could name another expert's file.
PART_OF_SEVERAL = re.compile(r"-\d{5}-of-\d{5}$")

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


def contribution_digest(expert_id: str, base_digest: str, tensors: Mapping[str, TensorDigest]) -> str:
    """The identity of a contribution: its id, its base and its tensors, however they are spread over files."""
    entries = {name: digest.to_json() for name, digest in tensors.items()}
    content = {"id": expert_id, "base_digest": base_digest, "tensors": entries}
    return "sha256:" + sha256_hex(canonical_json(content))


@dataclass(frozen=True)
class Contribution:
    """The content of `contribution.json`.

    Attributes:
        directory: where it lies.
        identity: whose it is.
        base_digest: the public model that it was trained against.
        architecture: the public model's, which is the expert's too.
        dtype: of every tensor; one of `STORED_DTYPES`.
        router: "bias" (bool) and "init" (how the rows started).
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
        return contribution_digest(self.identity.id, self.base_digest, self.tensors)

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.identity.id,
            "title": self.identity.title,
            "license": self.identity.license,
            "base_digest": self.base_digest,
            "architecture": self.architecture.to_json(),
            "dtype": self.dtype,
            "router": dict(self.router),
            "training": dict(self.training),
            "files": [file.to_json() for file in self.files],
            "tensors": {name: digest.to_json() for name, digest in self.tensors.items()},
            "digest": self.digest,
        }
