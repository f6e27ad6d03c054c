"""Parts that records share: typed access to fields that someone else wrote, and the entry of one file.

Contributions and assembled models travel between owners, so nothing in their JSON is taken on trust: a field of
another type, or a file name that leaves its directory, is the sender's mistake and reads as one line.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flexpert.errors import UserError

Field = TypeVar("Field")

_SHA256 = re.compile(r"[0-9a-f]{64}")


def require(record: Mapping[str, Any], key: str, kind: type[Field], where: Path | str) -> Field:
    """The value of `key`, which must be of type `kind` (a bool is no int).

    Raises:
        UserError: the key is missing or its value has another type.
    """
    value = record.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}: the field {key!r} is missing or not of type {kind.__name__}; write the record again")
    return value


def require_sha256(record: Mapping[str, Any], key: str, where: Path | str, prefix: str = "") -> str:
    """A SHA-256 in hexadecimal, after `prefix` ("sha256:" for digests of a whole)."""
    value = require(record, key, str, where)
    if not value.startswith(prefix) or not _SHA256.fullmatch(value.removeprefix(prefix)):
        raise UserError(f"{where}: the field {key!r} is not a SHA-256; write the record again")
    return value


def plain_name(name: str, where: Path | str) -> str:
    """`name`, if it is the name of a visible file and not a path: a record may not point outside its directory.

    Raises:
        UserError: the name holds a separator or what cannot be printed, or starts with a dot.
    """
    if not name or name.startswith(".") or not name.isprintable() or any(separator in name for separator in "/\\"):
        raise UserError(f"{where} lists the file {name!r}; only plain names of files beside it are read")
    return name


@dataclass(frozen=True)
class FileEntry:
    """One file as records list it: its plain name, its size in bytes, and the SHA-256 of its bytes."""

    name: str
    bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.bytes, "sha256": self.sha256}

    @staticmethod
    def from_json(value: Any, where: Path | str) -> "FileEntry":
        """Read what `to_json` wrote.

        Raises:
            UserError: a field is missing or malformed, or the name is not plain.
        """
        if not isinstance(value, dict):
            raise UserError(f"{where}: an entry of a file is not an object; write the record again")
        name = plain_name(require(value, "name", str, where), where)
        return FileEntry(name, require(value, "bytes", int, where), require_sha256(value, "sha256", where))
