"""Whether a node is fit for a stage: what slurm/check_nodes.sh asks before a script starts one.

    srun --ntasks-per-node=2 … python -P -m flexpert.launch.health STAGE key=value …

Two tasks of each node look at its memory, at the disks behind TMPDIR and output_dir and at the GPUs that Slurm gave,
and add a number of each by a collective. Where all is well, the first prints the node's name. Where it is not,
`NODE: reason` goes to standard error and the status is `UNFIT`. A node that cannot even say so prints no name either:
whoever asks takes it for unfit, too.
"""

import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from flexpert.config.compose import compose
from flexpert.config.tree import take_config_dir
from flexpert.errors import UserError

#: Exit status of the tasks of a node that is not fit.
UNFIT = 4
#: Seconds for each check, and for loading PyTorch, which hundreds of nodes may read from one file system at a time.
LIMIT, LOADING_LIMIT = 60.0, 300.0
#: A stage's process takes that much before it has a model (PyTorch, CUDA's context, libraries).
MIN_MEMORY_BYTES = 2 << 30
#: Of the memory that Slurm gave, what has to be there: its count of a node's memory is no exact one.
MEMORY_SHARE = 0.5
#: Less is what a disk has that is about to be full: logs, metrics and compiled kernels alone need some of it.
MIN_FREE_BYTES = 1 << 30
#: Written to each disk and read again: more than one stripe or block of usual file systems.
DISK_BYTES = 4 << 20
#: Of a square matrix; the sums in a product of small whole numbers stay below 2^24, so float32 and TF32 are exact.
MATRIX_SIZE = 2048
#: Values that are added: 16 MiB go by the way of large messages.
NUM_VALUES = 4 << 20


class Unfit(Exception):
    """What is wrong with this node."""


def node() -> str:
    """Slurm's name of it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def task() -> int:
    """0 or 1, within the node. Both check the same, or one would wait in vain for the other; the first says it."""
    return int(os.environ.get("SLURM_LOCALID", "0"))


def tell(reason: str) -> None:
    print(f"{node()}: {reason}", file=sys.stderr, flush=True)


@contextmanager
def within(seconds: float, what: str, told_by: tuple[int, ...] = (0,)) -> Iterator[None]:
    """End this process where the block takes longer, whatever it waits for; those tasks say so.

    Raises:
        Unfit: the block raised an error of the system's or of PyTorch's.
    """

    def end() -> None:
        if task() in told_by:
            tell(f"{what}: no end within {seconds:.0f} s")
        os._exit(UNFIT)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except OSError as error:
        raise Unfit(f"{what}: {error.strerror or error}") from None
    except RuntimeError as error:  # PyTorch's: of CUDA, NCCL and gloo
        raise Unfit(f"{what}: {str(error).splitlines()[0]}") from None
    finally:
        timer.cancel()


def check_memory() -> None:
    """Raises `Unfit` where others have left too little of it."""
    with open("/proc/meminfo", encoding="ascii") as file:
        found = dict(line.split(":") for line in file)
    available = int(found["MemAvailable"].split()[0]) << 10
    given = int(os.environ.get("SLURM_MEM_PER_NODE", "0")) << 20
    if available < max(MIN_MEMORY_BYTES, MEMORY_SHARE * given):
        promised = f" of the {given / 2**30:.1f} GiB that Slurm gave" if given else ""
        raise Unfit(f"{available / 2**30:.1f} GiB of memory are available{promised}")


def check_disk(name: str, directory: Path) -> None:
    """Raises `Unfit` where the disk has no room, or does not keep what it is given."""
    with within(LIMIT, f"{name}={directory}"):
        free = shutil.disk_usage(directory).free
        if free < MIN_FREE_BYTES:
            raise Unfit(f"{name}={directory}: {free / 2**20:.0f} MiB are free, {MIN_FREE_BYTES >> 20} are needed")
        with tempfile.TemporaryFile(dir=directory) as file:  # without a name: nothing is left of it, also by a kill
            content = os.urandom(DISK_BYTES)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # or memory would answer for the disk
            file.seek(0)
            if file.read() != content:
                raise Unfit(f"{name}={directory}: what was written was read as something else")


def num_gpus() -> int:
    """GPUs that Slurm gave this task."""
    given = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return len(visible.split(",")) if given and visible else given


def check_gpus() -> None:
    """Raises `Unfit` where PyTorch does not see all GPUs, or one does not multiply two matrices rightly."""
    given = num_gpus()
    if not given:
        return
    import torch

    seen = torch.cuda.device_count()
    if seen < given:
        raise Unfit(f"Slurm gives {given} GPUs, and PyTorch sees {seen}")
    torch.backends.cuda.matmul.allow_tf32 = True
    a, b = torch.randint(-3, 4, (2, MATRIX_SIZE, MATRIX_SIZE)).float()
    wanted = a @ b
    for index in range(given):
        with within(LIMIT, f"GPU {index}"):
            found = (a.to(f"cuda:{index}") @ b.to(f"cuda:{index}")).cpu()
            if not torch.equal(found, wanted):
                raise Unfit(f"GPU {index}: it multiplies two matrices wrongly")


def check_link(directory: Path) -> None:
    """A collective of the node's two tasks: NCCL where there are two GPUs, gloo elsewhere.

    Args:
        directory: that both of them see; they meet at a file in it.

    Raises:
        Unfit: the sum is wrong, or the collective fails.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    key = "-".join([*(os.environ.get(name, "0") for name in names), node()])
    is_nccl = num_gpus() > 1
    with within(LIMIT, "a collective of its two tasks", told_by=(0, 1)):
        store = FileStore(str(directory / f".flexpert-{key}"), 2)
        patience = timedelta(seconds=2 * LIMIT)  # `within` is to end the waiting, and says why
        dist.init_process_group("nccl" if is_nccl else "gloo", store=store, rank=task(), world_size=2, timeout=patience)
        value = torch.full((NUM_VALUES,), 1.0 + task(), device=f"cuda:{task()}" if is_nccl else "cpu")
        dist.all_reduce(value)
        is_right = bool((value == 3).all())
        dist.destroy_process_group()
    if not is_right:
        raise Unfit("a collective of its two tasks: the sum is wrong")


def check(output: Path | None) -> None:
    """Raises `Unfit`.

    Args:
        output: where the stage will write; need not exist. None: nowhere of its own.
    """
    check_memory()
    temporary = Path(os.environ.get("TMPDIR", "/tmp"))
    check_disk("TMPDIR", temporary)
    if output is not None:
        existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
        check_disk("output_dir", existing)
    with within(LOADING_LIMIT, "loading PyTorch"):
        import torch.distributed  # noqa: F401
    check_gpus()
    check_link(temporary)


def main() -> None:
    try:
        stage, *words = take_config_dir(sys.argv[1:])
        config, _ = compose(stage, words)
        output = getattr(config, "output_dir", None)
        check(None if output is None else Path(output))
    except UserError as error:
        print(f"flexpert: {error}", file=sys.stderr)
        sys.exit(2)
    except Unfit as error:
        if task() == 0:
            tell(str(error))
        sys.exit(UNFIT)
    if task() == 0:
        print(node())


if __name__ == "__main__":
    main()
