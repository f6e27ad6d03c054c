"""Check the files of an assembled model against `assembly.json`: while they are copied, or on their own."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from flexpert.assembly.record import RECORD_NAME, AssemblyRecord, read_assembly
from flexpert.assembly.tensors import FileRecord, SafetensorsFile, TensorSource, write_tensors
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.errors import UserError
from flexpert.fields import FileEntry
from flexpert.records import sha256_file


def verify_model(directory: Path) -> AssemblyRecord:
    """Check an assembled model down to its last byte.

    Raises:
        UserError: as `read_assembly` and `ModelDirectory.open`, or a file was altered.
    """
    record = read_assembly(directory)
    ModelDirectory.open(directory)
    for entry in record.files:
        if sha256_file(directory / entry.name) != entry.sha256:
            raise _altered(directory / entry.name)
    return record


def copy_file(source: Path, target: Path, name: str) -> FileEntry:
    """Copy a small file from one directory to another and hash the copy.

    Raises:
        UserError: it is missing, or not a file.
    """
    if not (source / name).is_file():
        raise UserError(f"{source / name} does not exist or is not a file; fetch the model again")
    shutil.copyfile(source / name, target / name)
    return FileEntry(name, (target / name).stat().st_size, sha256_file(target / name))


def copy_checked(model: Path, directory: Path, file: FileEntry) -> FileEntry:
    """As `copy_file`; the copy must be what the entry says."""
    copy = copy_file(model, directory, file.name)
    if copy != file:
        raise _altered(model / file.name)
    return copy


@contextmanager
def open_checked(path: Path, entry: FileEntry) -> Iterator[tuple[SafetensorsFile, Callable[[str], Iterator[bytes]]]]:
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


def copy_tensors(model: Path, directory: Path, entry: FileEntry, new_names: Mapping[str, str]) -> FileRecord:
    """Write a file of the model again, with new names for some of its tensors, as `open_checked` reads it."""
    path = model / entry.name
    with open_checked(path, entry) as (file, read):
        sources = [
            TensorSource(
                new_names.get(name, name), info.dtype, info.shape, partial(read, name), f"{path}: the tensor {name!r}"
            )
            for name, info in file.tensors.items()
        ]
        return write_tensors(directory / entry.name, sources)


def _altered(path: Path) -> UserError:
    return UserError(f"{path} was altered (its SHA-256 differs from {RECORD_NAME}); fetch or assemble the model again")
