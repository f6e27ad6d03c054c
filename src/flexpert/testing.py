"""Fault injection: what befalls a process at a named place, at a step of a rank; the same each time.

Production code says where it is by `reached`, which does nothing unless a fault was planted:

    with faults(Fault("kill", "shard", step=4, rank=1)):
        ...                        # and in processes that are forked here

or, in a process that is started, by the environment: FLEXPERT_FAULTS='[{"action": "kill", "phase": "shard"}]'.
"""

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

VARIABLE = "FLEXPERT_FAULTS"
#: Where production code calls `reached`, in the order in which a run comes by.
PHASES = (
    "startup", "restore", "data", "forward", "backward", "optimizer", "evaluation", "log", "staging", "shard",
    "manifest", "commit", "committed", "retention", "publish", "assembly",
)  # fmt: skip
SIGNALS = {
    "kill": signal.SIGKILL,
    **{name: signal.Signals[f"SIG{name}"] for name in ("TERM", "INT", "USR1", "USR2", "STOP")},
}
ERRORS = {"full": errno.ENOSPC, "readonly": errno.EROFS}
ACTIONS = (*SIGNALS, *ERRORS, "sleep", "hang", "error")


@dataclass
class Fault:
    """Attributes:
    action: of `ACTIONS`: a signal to the process itself, an OSError, a RuntimeError, a pause.
    phase: of `PHASES`.
    step, rank: where; None: any.
    after: how often the place is passed before.
    times: how often it happens; -1: always.
    seconds: of a pause.
    """

    action: str
    phase: str
    step: int | None = None
    rank: int | None = None
    after: int = 0
    times: int = 1
    seconds: float = 0.0

    def __post_init__(self) -> None:
        assert self.action in ACTIONS and self.phase in PHASES, self

    def strike(self) -> None:
        if self.action in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.action])
        elif self.action in ERRORS:
            raise OSError(ERRORS[self.action], os.strerror(ERRORS[self.action]))
        elif self.action == "sleep":
            time.sleep(self.seconds)
        elif self.action == "hang":
            threading.Event().wait()
        else:
            raise RuntimeError(f"a fault was planted in {self.phase}")


_planted: list[Fault] = [Fault(**fault) for fault in json.loads(os.environ.get(VARIABLE, "[]"))]


def reached(phase: str, step: int | None = None) -> None:
    """Say that this process is at a place; some places know no step."""
    for fault in _planted:
        is_here = fault.phase == phase and fault.step in (None, step)
        if is_here and fault.times and fault.rank in (None, int(os.environ.get("RANK", "0"))):
            if fault.after:
                fault.after -= 1
                continue
            fault.times -= 1
            fault.strike()


@contextmanager
def faults(*planted: Fault) -> Iterator[None]:
    """While the block runs, these befall this process and those that it forks."""
    _planted.extend(planted)
    try:
        yield
    finally:
        for fault in planted:
            _planted.remove(fault)
