"""One process at a time in a directory.

The lock is the kernel's (`flock`), so it ends with the process that holds it, whatever ends that. Its file stays: were
it deleted, two processes could each lock a file of that name.

Between machines it is as good as the file system: NFS passes it on to the server, but mounted with `nolock` or
`local_lock=flock`, each machine has a lock of its own. So whoever holds the directory also counts in the file, every
few seconds, and says there when it is done. Who gets the lock, and finds that a process of another host has not said
so, watches whether it still counts. It counts what it sees and for how long itself: no clocks are compared.

This heartbeat is the weaker of the two. Two machines that begin within the same moment do not see each other, and one
that stands still, or is cut off from the file system, for longer than the others watch is taken for dead.
"""

import contextlib
import fcntl
import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from flexpert.errors import UserError

LOCK_NAME = ".lock"
#: Seconds between two beats, and how many in a row may be missed: one is late where a checkpoint keeps NFS busy, or a
#: long call the interpreter; who starts again elsewhere after a crash should not wait for long.
BEAT, PATIENCE = 3.0, 4
#: Bytes of a record, which is always written whole: readers see one or the next, never parts of two.
LENGTH = 128
RECORD = re.compile(r"(pid \d+ on host (\S+)), (beat \d+|released) *\n")


class Record(NamedTuple):
    """Of the lock's file; `state` is "beat N" or "released"."""

    holder: str
    host: str
    state: str


class Heartbeat(threading.Thread):
    """Writes a record at once and every `BEAT` seconds, until it is released.

    Where it cannot be written, on a full disk or a file system that has become read-only, the lock holds without it.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(name="lock", daemon=True)
        self.file, self.over = file, threading.Event()
        self.write("beat 0")

    def run(self) -> None:
        for beat in itertools.count(1):
            if self.over.wait(BEAT) or self.file.closed:  # closed alone: a second Ctrl-C, while the first unwinds
                return
            self.write(f"beat {beat}")

    def release(self) -> None:
        self.over.set()
        self.join()
        self.write("released")

    def write(self, state: str) -> None:
        line = f"pid {os.getpid()} on host {socket.gethostname()}, {state}"
        with contextlib.suppress(OSError):
            os.pwrite(self.file.fileno(), (line.ljust(LENGTH - 1) + "\n").encode(), 0)
            os.fdatasync(self.file.fileno())  # an NFS client may keep for half a minute what it was given


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold an existing directory while the block runs.

    Where a process of another machine has held it and not released it, this takes `PATIENCE` beats.

    Raises:
        UserError: another process holds it, or the directory cannot be written.
    """
    try:  # not for appending, as by "a+": such a file's `pwrite` appends, wherever it is told to write
        descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from None
    with open(descriptor, "r+b", buffering=0) as file:
        is_locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise in_use(directory, read(directory)) from None
        except OSError as error:  # Lustre without `-o flock`, for one
            print(f"note: {directory} cannot be locked ({error.strerror}): start nothing else in it", flush=True)
            is_locked = False
        found = read(directory)
        if found is not None and found.state != "released" and not (is_locked and found.host == socket.gethostname()):
            watch(directory, found)
        heartbeat = Heartbeat(file)
        try:
            heartbeat.start()
            yield
        finally:
            heartbeat.release()


def read(directory: Path) -> Record | None:
    """The record as it is now; None: there is none, as after an older version or on a full disk.

    The file is opened each time: that is when an NFS client asks the server what others have written.
    """
    try:
        found = RECORD.match((directory / LOCK_NAME).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return None if found is None else Record(*found.groups())


def is_held(directory: Path) -> bool:
    """Whether a process holds the directory, here or elsewhere: whether it has counted within the last moments."""
    found = read(directory)
    if found is None or found.state == "released":
        return False
    return time.time() - (directory / LOCK_NAME).stat().st_mtime < BEAT * PATIENCE


def watch(directory: Path, found: Record) -> None:
    """Return when `found` is the record of a dead process, or is released.

    Raises:
        UserError: it is alive.
    """
    print(
        f"{directory} was not released by another process ({found.holder}): "
        f"waiting {BEAT * PATIENCE:.0f} s to see whether it still runs",
        flush=True,
    )
    for _ in range(PATIENCE):
        time.sleep(BEAT)
        now = read(directory)
        if now is not None and now.state == "released":
            return
        if now != found:
            raise in_use(directory, now or found)
    print(f"note: that process gives no sign of life: {directory} is taken over", flush=True)


def in_use(directory: Path, found: Record | None) -> UserError:
    who = "" if found is None or found.state == "released" else f" ({found.holder})"
    return UserError(f"{directory} is in use by another process{who}: wait for it, or choose another output_dir")
