"""One process at a time in a directory.

The lock is the kernel's (`flock`), so it ends with the process that holds it, whatever ends that, and nothing stale is
ever in the way. Its file stays: were it deleted, two processes could each lock a file of that name.

Between machines it is as good as the file system. NFS passes it on to the server; mounted with `nolock` or
`local_lock=flock`, each machine has a lock of its own, and two machines can still meet in one directory.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flexpert.errors import UserError

LOCK_NAME = ".lock"


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold an existing directory while the block runs.

    Raises:
        UserError: another process holds it, or the directory cannot be written.
    """
    try:
        file = open(directory / LOCK_NAME, "a+", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{directory} is in use by another process ({file.read()}): wait for it, or choose another output_dir"
            ) from None
        except OSError as error:  # Lustre without `-o flock`, for one
            print(f"note: {directory} cannot be locked ({error.strerror}): start nothing else in it", flush=True)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on host {socket.gethostname()}")
        file.flush()
        yield
