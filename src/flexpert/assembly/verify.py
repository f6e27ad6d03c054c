"""Check the files of an assembled model against `assembly.json`: while they are copied, or on their own."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event

from flexpert.assembly.files import FILES_AT_A_TIME
from flexpert.assembly.record import RECORD_NAME, AssemblyRecord, read_assembly
from flexpert.assembly.tensors import FileRecord, SafetensorsFile, TensorInfo, TensorSource, make_header, write_tensors
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.errors import UserError
from flexpert.fields import FileEntry
from flexpert.records import sha256_file, sha256_hex


def verify_model(directory: Path) -> AssemblyRecord:
    """Check every file of an assembled model that its record lists, down to the last byte.

    Two have no hash. The index must be true to the headers of the files. config.json must call for the tensors that are
    there and agree with the record on the experts and the architecture; k, and what else it holds, is its own.

    Raises:
        UserError: as `read_assembly` and `ModelDirectory.open`, or a file was altered.
    """
    record = read_assembly(directory)
    ModelDirectory.open(directory)
    with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
        found = pool.map(sha256_file, [directory / entry.name for entry in record.files])
        for entry, sha256 in zip(record.files, found, strict=True):
            if sha256 != entry.sha256:
                raise _altered(directory / entry.name)
    return record


def copy_file(source: Path, target: Path, name: str) -> FileEntry:
    """Copy a small file from one directory to another and hash what is copied.

    Raises:
        UserError: it is missing, not a file, or cannot be read.
    """
    if not (source / name).is_file():
        raise UserError(f"{source / name} does not exist or is not a file; fetch the model again")
    try:
        content = (source / name).read_bytes()
    except OSError as error:
        raise UserError(f"{source / name} cannot be read ({error.strerror}); fetch the model again") from None
    (target / name).write_bytes(content)
    return FileEntry(name, len(content), sha256_hex(content))


def copy_checked(model: Path, directory: Path, file: FileEntry) -> FileEntry:
    """As `copy_file`; the copy must be what the entry says."""
    copy = copy_file(model, directory, file.name)
    if copy != file:
        raise _altered(model / file.name)
    return copy


def read_small(model: Path, entry: FileEntry) -> tuple[Mapping[str, TensorInfo], dict[str, bytes]]:
    """The tensors of a small file, as its header and as bytes.

    Raises:
        UserError: the file is missing, malformed or altered.
    """
    path = model / entry.name
    with SafetensorsFile.open(path) as file:
        tensors = {name: b"".join(file.read_pieces(name)) for name in file.tensors}
    if sha256_hex(b"".join([file.header, *tensors.values()])) != entry.sha256:
        raise _altered(path)
    return file.tensors, tensors


def copy_tensors(
    model: Path, directory: Path, entry: FileEntry, new_names: Mapping[str, str] | None, stop: Event | None = None
) -> FileRecord:
    """Write a file of the model again.

    Args:
        model: where it lies.
        directory: where it goes.
        entry: the file.
        new_names: a new name for every tensor that it may hold; None: the names stay.
        stop: as `write_tensors`'s.

    Raises:
        UserError: the file is missing, malformed or altered, or holds NaN or infinity, or a tensor that has no new
            name: it is not the file of the expert that the record says it is.
    """
    path = model / entry.name
    with SafetensorsFile.open(path) as file:
        renamed = {name: name for name in file.tensors} if new_names is None else new_names
        for name in file.tensors:
            if name not in renamed:
                raise UserError(
                    f"{path} holds {name!r}, which is not of the expert that {RECORD_NAME} lists the file for; "
                    "assemble the model again"
                )
        content = hashlib.sha256(file.header)

        def read_hashed(name: str) -> Iterator[bytes]:
            for piece in file.read_pieces(name):
                content.update(piece)
                yield piece

        def sources(read: Callable[[str], Iterator[bytes]]) -> list[TensorSource]:
            return [
                TensorSource(renamed[name], i.dtype, i.shape, partial(read, name), f"{path}: {name!r}")
                for name, i in file.tensors.items()
            ]

        # Under the same header, the hash of the copy is that of what was read.
        same = make_header(sources(file.read_pieces)) == file.header
        copy = write_tensors(directory / entry.name, sources(file.read_pieces if same else read_hashed), stop)
    if (copy.sha256 if same else content.hexdigest()) != entry.sha256:
        raise _altered(path)
    return copy


def _altered(path: Path) -> UserError:
    return UserError(f"{path} was altered (its SHA-256 differs from {RECORD_NAME}); fetch or assemble the model again")
