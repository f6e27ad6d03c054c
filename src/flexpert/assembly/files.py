"""The files of a new model: several are written at a time, the large ones in parts, and all of them or none."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Self

from flexpert.assembly.tensors import FileRecord, TensorSource, write_tensors
from flexpert.checkpoint.store import atomic_directory
from flexpert.errors import UserError
from flexpert.testing import reached

#: Each has two threads and two pieces of `BUFFER_BYTES` in hand, so eight stay far below 512 MiB.
FILES_AT_A_TIME = min(8, max(2, os.cpu_count() or 1))

#: The parts of one file of a model, which are being written.
Pending = Sequence[Future[FileRecord]]


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """As `atomic_directory`, for a block that writes no other files and turns read errors into `UserError` itself.

    Raises:
        UserError: as `atomic_directory`, or the disk is full or fails.
    """
    try:
        with atomic_directory(output) as directory:
            yield directory
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror}); free some space, or choose another output_dir"
        ) from None


def part_names(stem: str, num_parts: int) -> list[str]:
    """The names of a file's parts, numbered as transformers does where there are several."""
    if num_parts == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{num_parts:05d}.safetensors" for number in range(1, num_parts + 1)]


def split(sources: Iterable[TensorSource], max_bytes: int) -> list[list[TensorSource]]:
    """Tensors in their order, in parts of at most `max_bytes`; one that is larger is a part of its own.

    Headers do not count: their length depends on the index of an expert, and removal keeps the parts as they are while
    experts move up.
    """
    parts: list[list[TensorSource]] = []
    room = 0
    for source in sources:
        if not parts or source.num_bytes > room:
            parts.append([])
            room = max_bytes
        parts[-1].append(source)
        room -= source.num_bytes
    return parts


class ModelWriter:
    """Writes files into a new directory, `FILES_AT_A_TIME`.

    When its block ends, nothing is being written any more. If an error ended it, files that were begun are given up at
    their next piece and the others are not begun.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._pool = ThreadPoolExecutor(FILES_AT_A_TIME)
        self._stop = Event()

    def write(self, stem: str, sources: Iterable[TensorSource], max_bytes: int) -> Pending:
        """Begin to write tensors as a file, or as parts where they exceed `max_bytes`."""
        parts = split(sources, max_bytes)
        names = part_names(stem, len(parts))
        return [self.submit(write_tensors, self.directory / n, part) for n, part in zip(names, parts, strict=True)]

    def submit(self, write: Callable[..., FileRecord], *arguments: object) -> Future[FileRecord]:
        """Begin to write one file by a function that looks at its last argument, an `Event`, before each piece."""
        reached("assembly")
        return self._pool.submit(write, *arguments, self._stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._stop.set()
        self._pool.shutdown(cancel_futures=error is not None)


def written(pending: Pending) -> tuple[FileRecord, ...]:
    """Wait until the files are there; raises what writing them raised."""
    return tuple(future.result() for future in pending)
