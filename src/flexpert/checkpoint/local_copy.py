"""A copy of a model's weights on a disk of the node: its first process makes it, and all that run there read it.

Starts of a hundred nodes, and of several jobs on each, then ask the shared file system once a node. The copy stays for
the next start. It is found by the path of the model and by the names, sizes and times of its files, so a model that
was changed has another one; the older one is deleted when that is made.

Who makes or deletes copies of a model holds a lock alone, and who reads one holds it with the others that do. It is the
kernel's (`flock`), and ends with its process. No copy is better than a wrong one: whoever finds none that is whole
reads the model where it is. Of a copy only the sizes are looked at; its content is for the base digest to prove.
"""

import errno
import fcntl
import glob
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from flexpert.assembly.files import FILES_AT_A_TIME
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.checkpoint.store import fsync_path, fsync_tree
from flexpert.parallel.environment import LOCAL_RANK, num_ranks
from flexpert.parallel.process import POLL, on_first
from flexpert.records import canonical_json, sha256_hex

#: Left free on the node's disk, which is not ours alone, bytes.
SPARE_BYTES = 1 << 30


@dataclass(frozen=True)
class LocalCopy:
    """Attributes:
    folder: this user's, which holds copies and locks.
    prefix, content: of the copy's name: which model it is of, and what that holds.
    sizes: file of the model's weights → bytes.
    """

    folder: Path
    prefix: str
    content: str
    sizes: dict[Path, int]

    @classmethod
    def of(cls, model: Path, files: Iterable[Path], directory: Path) -> "LocalCopy":
        """That of a model whose weights are in `files`; it need not be there."""
        found = {file: file.stat() for file in sorted(set(files))}
        content = [[file.name, status.st_size, status.st_mtime_ns] for file, status in found.items()]
        where = model.resolve()
        return cls(
            directory / f"flexpert-{os.getuid()}",
            f"{where.name}-{sha256_hex(str(where).encode())[:12]}-",
            sha256_hex(canonical_json(content))[:16],
            {file: status.st_size for file, status in found.items()},
        )

    @property
    def path(self) -> Path:
        return self.folder / (self.prefix + self.content)

    def is_whole(self) -> bool:
        copies = [(self.path / file.name, size) for file, size in self.sizes.items()]
        return all(copy.is_file() and copy.stat().st_size == size for copy, size in copies)

    @contextmanager
    def locked(self, kind: int) -> Iterator[None]:
        """Hold the lock of all copies of this model, alone (LOCK_EX) or with others (LOCK_SH); waits for it.

        Raises:
            OSError: the folder is missing, or is another user's, who could put other weights into it.
        """
        status = self.folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise PermissionError(errno.EPERM, f"{self.folder} is another user's")
        with open(self.folder / f"{self.prefix}lock", "ab") as file:
            fcntl.flock(file, kind)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a child that was forked has the file, too

    def make(self) -> None:
        """Raises OSError where there is no room, or the disk or the model's fails; then nothing is left of the copy."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self.locked(fcntl.LOCK_SH):
            if self.is_whole():
                return
        with self.locked(fcntl.LOCK_EX):
            if self.is_whole():  # another job has made it meanwhile
                return
            for old in self.folder.glob(f"{glob.escape(self.prefix)}*/"):  # and what a kill left
                shutil.rmtree(old)
            if shutil.disk_usage(self.folder).free < sum(self.sizes.values()) + SPARE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            partial = self.folder / f"{self.prefix}partial"
            try:
                partial.mkdir()
                with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
                    list(pool.map(lambda file: shutil.copyfile(file, partial / file.name), self.sizes))
                fsync_tree(partial)  # or a crash could leave the sizes without the content
                os.rename(partial, self.path)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            fsync_path(self.folder)


@contextmanager
def read_locally(model: ModelDirectory, directory: str | None) -> Iterator[ModelDirectory]:
    """The model, with a copy's files in the place of its own, which stays as it is while the block runs.

    Every rank is to come here. Where a node has no copy, its ranks get the model as it is, and its first one says why.

    Args:
        directory: on a disk of the node; None: no copies.
    """
    if directory is None:
        yield model
        return
    copy = LocalCopy.of(model.path, model.files.values(), Path(directory))
    if os.environ.get(LOCAL_RANK, "0") == "0":
        try:
            copy.make()
        except OSError as error:
            where, why = f"{directory} on {socket.gethostname()}", error.strerror or error
            print(f"note: {model.path} cannot be copied to {where} ({why}): it is read where it is", flush=True)
    meet()
    with ExitStack() as holding:
        try:
            holding.enter_context(copy.locked(fcntl.LOCK_SH))
            is_whole = copy.is_whole()
        except OSError:
            is_whole = False
        if is_whole:
            model = replace(model, files={name: copy.path / file.name for name, file in model.files.items()})
        yield model


def meet() -> None:
    """Wait for every rank, however long it takes: that of a collective is bounded, and this may be a large model."""
    if num_ranks() == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    store.add("local_copy", 1)

    def wait() -> None:
        while store.add("local_copy", 0) < num_ranks():
            time.sleep(POLL)

    on_first(wait)
