"""The processes of a stage: one, or those that torchrun or srun started, which know each other by the environment."""

import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from flexpert.errors import UserError
from flexpert.parallel.environment import ADDRESS, LOCAL_RANK, PORT, is_first, num_ranks, rank
from flexpert.parallel.pulse import GRACE, SILENCE, Pulse
from flexpert.signals import LOST, REQUEUE, Stopped, deferred

T = TypeVar("T")

#: Seconds between two looks at what rank 0 has done.
POLL = 0.02

timeout = 600.0  # of collectives, seconds
_pulse: Pulse | None = None
_turn = 0  # calls of `on_first`, which all ranks make in the same order


def join_ranks(device: torch.device, seconds: float) -> torch.device:
    """Join the other processes, where there are any; returns this one's device.

    Args:
        seconds: to meet them, and for each collective.

    Raises:
        UserError: they cannot be reached.
    """
    global _pulse, timeout
    timeout = seconds
    if num_ranks() == 1:
        return device
    if device.type == "cuda":
        index, count = int(os.environ.get(LOCAL_RANK, "0")), torch.cuda.device_count()
        if count > 1 and index >= count:
            raise UserError(f"this machine has {count} GPUs and more processes than that: start {count} on each")
        device = torch.device("cuda", index if count > 1 else 0)  # srun may show each task its own GPU alone
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
                f"rank {rank()} of {num_ranks()} cannot meet the others at {address}:{port}: {reason}",
                status=LOST,  # it may be that one was killed before
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
        SystemExit: status `LOST`, where another rank was lost, or `REQUEUE`, where it was told to stop.
    """
    try:
        yield
    except BaseException as error:
        if _pulse is None:
            raise
        with deferred():  # who has started the ranks may tell those that are left to stop
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if isinstance(error, Stopped):
                _pulse.tell("it was told to stop", REQUEUE)
            elif isinstance(error, UserError):  # also where all make the same mistake, and another was quicker to tell
                _pulse.tell(reason, error.status)
            elif _pulse.found.wait(SILENCE + GRACE if is_of_others(error) else 0.0) and _pulse.lost is not None:
                _pulse.say(_pulse.lost)
                _pulse.leave()
                raise SystemExit(_pulse.status) from None
            else:
                _pulse.tell(reason)
            _pulse.leave()
            raise
    leave_ranks()


def is_of_others(error: BaseException) -> bool:
    """Whether an error may come of another process's end."""
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))


def on_first(function: Callable[[], T]) -> T:
    """Run `function` on rank 0; every rank gets its result.

    Raises:
        UserError: as `function`, on every rank.
    """
    global _turn
    if num_ranks() == 1:
        return function()
    _turn += 1
    store, key = dist.distributed_c10d._get_default_store(), f"on_first/{_turn}"
    if is_first():
        outcome: tuple[T | None, str | None]
        try:
            outcome = function(), None
        except UserError as error:
            outcome = None, str(error)
        store.set(key, pickle.dumps(outcome))  # type: ignore[arg-type]
    else:
        while not store.check([key]):  # not in a collective, whose time is bounded: this may be the copying of a model
            if _pulse is not None and _pulse.found.is_set():
                raise dist.DistError("rank 0 has not answered")
            time.sleep(POLL)
        outcome = pickle.loads(store.get(key))
    result, message = outcome
    if message is not None:
        raise UserError(message, told=not is_first())
    return result  # type: ignore[return-value]


def barrier() -> None:
    if num_ranks() > 1:
        dist.barrier()
