"""The processes of a stage: one, or those that torchrun or srun started, which know each other by the environment."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from flexpert.errors import UserError
from flexpert.parallel.environment import ADDRESS, LOCAL_RANK, PORT, is_first, num_ranks, rank
from flexpert.parallel.pulse import GRACE, LOST_RANK, SILENCE, Pulse

T = TypeVar("T")

_pulse: Pulse | None = None


def join_ranks(device: torch.device, timeout: float) -> torch.device:
    """Join the other processes, where there are any; returns this one's device.

    Args:
        timeout: seconds, to meet them and for each collective.

    Raises:
        UserError: they cannot be reached.
    """
    global _pulse
    if num_ranks() == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get(LOCAL_RANK, "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        address, port = os.environ.get(ADDRESS, "?"), os.environ.get(PORT, "?")
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
            _pulse = Pulse(address, int(port), rank(), num_ranks())
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"rank {rank()} of {num_ranks()} cannot meet the others at {address}:{port}: {reason}"
            ) from None
        _pulse.start()
    return device


def leave_ranks() -> None:
    """At the end of a stage: wait for the others, which may need this one until then."""
    global _pulse
    if _pulse is not None:
        dist.barrier()
        _pulse.stop()
        dist.barrier()
        dist.destroy_process_group()
        _pulse = None


@contextmanager
def among_ranks() -> Iterator[None]:
    """Around a stage: ends when all have ended. An error here is told to the others; where it comes of a rank that was
    lost, that is said instead.

    Raises:
        SystemExit: status `LOST_RANK`, where another rank was lost.
    """
    try:
        yield
    except BaseException as error:
        if _pulse is not None:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in reason):
                _pulse.found.wait(SILENCE + GRACE)
                if _pulse.lost is not None:
                    _pulse.over.set()
                    _pulse.say(_pulse.lost)
                    raise SystemExit(LOST_RANK) from None
            _pulse.tell(reason)
        raise
    leave_ranks()


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


def barrier() -> None:
    if num_ranks() > 1:
        dist.barrier()
