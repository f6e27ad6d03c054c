"""Directories that appear whole or not at all."""

import glob
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flexpert.errors import UserError
from flexpert.testing import reached


def fsync_tree(directory: Path) -> None:
    """Flush every file and directory below `directory` to the disk."""
    for folder, _, files in os.walk(directory):
        for name in [*files, "."]:
            fsync_path(os.path.join(folder, name))


def fsync_path(path: str | Path) -> None:
    """Flush one file, or the names in one directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `final` that takes its name when the block ends without an error.

    The content is flushed before the rename, so a directory under its final name is complete whatever happens to the
    process or the machine. An error or a kill leaves nothing under the final name; what a killed process left under a
    temporary name is swept away by the next one on the same host that writes the same directory.

    Raises:
        UserError: `final` exists already, or its parent cannot be written.
    """
    if final.exists():
        raise UserError(f"{final} exists already; choose another output_dir")
    host = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob(f".{glob.escape(final.name)}.*.partial"):
            writer, _, process_id = leftover.name.removesuffix(".partial").rpartition("-")
            if writer.endswith(f".{host}") and process_id.isdecimal() and not _alive(int(process_id)):
                shutil.rmtree(leftover, ignore_errors=True)
        temporary = final.parent / f".{final.name}.{host}-{os.getpid()}.partial"
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{final.parent} cannot be written: {error.strerror}") from None
    try:
        yield temporary
        fsync_tree(temporary)
        reached("publish")
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(final.parent)


def _alive(process_id: int) -> bool:
    """Whether another process has this id; our own, in a container where ids repeat, is a dead one's."""
    if process_id == os.getpid():
        return False
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
