"""The processes of a stage: one, or those that torchrun or srun started, which know each other by the environment."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from flexpert.checkpoint.store import atomic_directory
from flexpert.errors import UserError

T = TypeVar("T")

#: What `torchrun` sets. Under `srun`, Slurm's own variables say the same.
NUM_RANKS, RANK, LOCAL_RANK = "WORLD_SIZE", "RANK", "LOCAL_RANK"
#: Seconds after which a collective that a rank does not join fails.
TIMEOUT = 600


def num_ranks() -> int:
    return int(os.environ.get(NUM_RANKS, "1"))


def rank() -> int:
    return int(os.environ.get(RANK, "0"))


def is_first() -> bool:
    """Whether this is the process that writes records and prints."""
    return rank() == 0


def join_ranks(device: torch.device) -> torch.device:
    """Join the other processes, where there are any; returns this one's device.

    Raises:
        UserError: they cannot be reached.
    """
    if num_ranks() == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get(LOCAL_RANK, "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT))
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
            reason = str(error).splitlines()[0]
            raise UserError(f"rank {rank()} of {num_ranks()} cannot reach the others at {where}: {reason}") from None
    return device


def on_first(function: Callable[[], T]) -> T:
    """Run `function` on rank 0; every rank gets its result.

    Raises:
        UserError: as `function`, on every rank.
    """
    if num_ranks() == 1:
        return function()
    outcome: list[tuple[T | None, str | None]] = [(None, None)]
    if is_first():
        try:
            outcome = [(function(), None)]
        except UserError as error:
            outcome = [(None, str(error))]
    dist.broadcast_object_list(outcome, 0)
    result, message = outcome[0]
    if message is not None:
        raise UserError(message, told=not is_first())
    return result  # type: ignore[return-value]


@contextmanager
def directory_of_all(final: Path) -> Iterator[Path]:
    """`atomic_directory` that all ranks write into: it takes its name when all have."""
    with ExitStack() as stack:
        yield on_first(lambda: stack.enter_context(atomic_directory(final)))
        barrier()
    barrier()


def barrier() -> None:
    if num_ranks() > 1:
        dist.barrier()
