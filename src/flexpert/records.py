"""JSON records: every JSON file that leaves a stage carries its kind and a schema version.

A reader accepts the version that it knows. An older one is refused unless a migration for it is written here, and a
newer one is refused with the advice to upgrade: silently dropping fields that a newer writer thought necessary (a
licence, a signature) would be worse than an error.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexpert.errors import UserError

#: Current schema version of each kind of record.
SCHEMA_VERSIONS = {
    "flexpert.data": 1,
    "flexpert.contribution": 2,
    "flexpert.verified": 1,
    "flexpert.assembly": 2,
    "flexpert.evaluation": 1,
    "flexpert.checkpoint": 2,
    "flexpert.stage": 1,
    "flexpert.job": 1,
    "flexpert.end": 1,
}


def _expert_files(record: dict[str, Any]) -> dict[str, Any]:
    """Until version 1, an expert of an assembled model had one file."""

    def entry(expert: Any) -> Any:
        if not isinstance(expert, dict) or "file" not in expert:
            return expert
        return {**{key: value for key, value in expert.items() if key != "file"}, "files": [expert["file"]]}

    experts = record.get("experts")
    return record | {"experts": [entry(expert) for expert in experts]} if isinstance(experts, list) else record


#: Kind and version of an older record → what makes it one of the next version.
MIGRATIONS: dict[tuple[str, int], Callable[[dict[str, Any]], dict[str, Any]]] = {
    ("flexpert.assembly", 1): _expert_files,
}


def canonical_json(value: Any) -> bytes:
    """Bytes that depend on the value alone: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path, buffer_bytes: int = 16 << 20) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(buffer_bytes):
            digest.update(piece)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        UserError: the file is missing, is not JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number too long
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__} where an object is expected")
    return value


def write_atomic(path: Path, text: str) -> None:
    """Write through a temporary file, so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one JSON object, as `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_record(path: Path, kind: str) -> dict[str, Any]:
    """Read a record of this kind and version.

    Raises:
        UserError: as `read_json`, or it is another kind of record or another version.
    """
    record = read_json(path)
    if record.get("kind") != kind:
        raise UserError(f"{path} is not a {kind} record (its kind is {record.get('kind')!r})")
    version, known = record.get("schema_version"), SCHEMA_VERSIONS[kind]
    while isinstance(version, int) and (kind, version) in MIGRATIONS:
        record = MIGRATIONS[kind, version](record)
        version += 1
    if not isinstance(version, int) or version < known:
        raise UserError(f"{path} has schema version {version!r}; this Flexpert reads version {known}: write it again")
    if version > known:
        raise UserError(f"{path} has schema version {version}, newer than {known}: upgrade Flexpert to read it")
    return record


def write_record(path: Path, kind: str, content: dict[str, Any]) -> None:
    write_json(path, {"kind": kind, "schema_version": SCHEMA_VERSIONS[kind], **content})
