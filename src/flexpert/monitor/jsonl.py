"""`metrics.jsonl`: one JSON object a line, the truth about a run."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from flexpert.checkpoint.store import fsync_path
from flexpert.testing import reached

#: Rows after which the file is flushed to the disk where no checkpoint asks for it before.
FLUSH_ROWS = 1000
#: Bytes of a file that are read at once, from its end on backwards.
BLOCK = 1 << 16


class MetricsLog:
    """Append rows, which are in the file as soon as they are written.

    A row stays in memory until it is known to be on the disk. What cannot be written, on a full disk or a file system
    that has become read-only, is written with the next row that can; nothing is raised. A write that stops within a
    row is taken back, so that the file consists of whole rows unless a kill comes between.

    Args:
        path: the file.
        last_step: the step that the run resumes from: rows of later steps were written by a part of the run that is
            now repeated, and are dropped, so that each step occurs once. A line cut short by a kill is dropped too.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        #: Bytes of the file that hold rows which stay, and bytes of those that are on the disk.
        self.end = self.synced = end_of_rows(path, last_step)
        self.kept: list[tuple[int, bytes]] = []  # step and line of each row that may not be on the disk
        self.num_written = 0  # of those, how many are in the file
        self.descriptor: int | None = None
        self.error: OSError | None = None  # of the last attempt
        self.sync()

    @property
    def num_pending(self) -> int:
        """Rows that are in memory alone."""
        return len(self.kept) - self.num_written

    def write(self, row: dict[str, Any]) -> None:
        self.kept.append((row["step"], json.dumps(row).encode() + b"\n"))
        self.attempt(durably=len(self.kept) >= FLUSH_ROWS)

    def sync(self) -> bool:
        """Write what is pending; whether every row is on the disk, whatever happens to the machine."""
        return self.attempt(durably=True)

    def close(self) -> None:
        """Try a last time. Rows that are lost are counted in one line; the error is not raised."""
        if not self.sync() and self.num_pending:
            rows = f"{self.num_pending} rows (steps {self.kept[self.num_written][0]} to {self.kept[-1][0]})"
            print(f"note: {rows} could not be written to {self.path} ({self.reason()})", flush=True)
        self.release()

    def attempt(self, durably: bool) -> bool:
        """Write what is pending and, after an error in any case, flush it to the disk; whether that went well."""
        try:
            self.append()
            if durably or self.error is not None:
                self.flush()
        except OSError as error:
            is_new, self.error = self.error is None, error
            if is_new:
                kept = "rows are kept in memory until it can"
                print(f"note: {self.path} cannot be written ({self.reason()}): {kept}", flush=True)
            return False
        if self.error is not None:
            self.error = None
            print(f"note: {self.path} can be written again, and has every row", flush=True)
        return True

    def append(self) -> None:
        if self.descriptor is None:
            self.open()
        assert self.descriptor is not None
        try:
            for step, line in self.kept[self.num_written :]:
                reached("log", step)
                rest = line
                while rest:  # a disk that fills up takes a part, and says why with the next call
                    rest = rest[os.write(self.descriptor, rest) :]
                self.num_written += 1
                self.end += len(line)
        except BaseException:  # a signal's, too
            with contextlib.suppress(OSError):
                self.cut()
            self.release()
            raise

    def open(self) -> None:
        """Open the file, and begin after what is certain to be on the disk: an error may have cost it the rest."""
        self.end, self.num_written = self.synced, 0
        create = 0 if self.end else os.O_CREAT  # a file that has gone comes back with its rows, as with its mount
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | create, 0o666)
        try:
            self.cut()
        except OSError:
            self.release()
            raise

    def flush(self) -> None:
        assert self.descriptor is not None
        try:
            os.fsync(self.descriptor)
            if not self.synced:
                fsync_path(self.path.parent)  # the file may be new
        except OSError:
            self.num_written = 0  # for all that is known
            self.release()
            raise
        self.synced, self.kept, self.num_written = self.end, [], 0

    def cut(self) -> None:
        """Drop what follows the rows that stay."""
        assert self.descriptor is not None
        if os.fstat(self.descriptor).st_size > self.end:
            os.ftruncate(self.descriptor, self.end)

    def release(self) -> None:
        """Close the file: after an error the name may be another file's, as on NFS."""
        if self.descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self.descriptor)
            self.descriptor = None

    def reason(self) -> str:
        assert self.error is not None
        return self.error.strerror or str(self.error)


def end_of_rows(path: Path, last_step: int) -> int:
    """Bytes of a file up to and with its last row of a step that is not after `last_step`.

    Steps grow from row to row, so the file is read from its end, no further than that row. A line that is not a row, as
    the crash of a machine leaves it, is passed over.
    """
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        for line, end in lines_from_the_end(file):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if json.loads(line)["step"] <= last_step:
                    return end
    return 0


def lines_from_the_end(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """The lines that end with a line feed, the last one first, each with the number of bytes up to its end."""
    position = file.seek(0, os.SEEK_END)
    rest = b""  # up to the end of a line whose beginning is yet to be read
    while position > 0:
        size = min(BLOCK, position)
        position -= size
        file.seek(position)
        data = file.read(size) + rest
        first = data.find(b"\n") + 1 if position else 0  # where the first line begins that is here as a whole
        end = data.rfind(b"\n") + 1
        while end > first:
            start = data.rfind(b"\n", first, end - 1) + 1 or first
            yield data[start:end], position + end
            end = start
        rest = data[:first] if first else data


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows; an unfinished last line, as a kill leaves it, is not one."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
