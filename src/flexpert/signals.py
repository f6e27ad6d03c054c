"""Being told to stop: SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 mean the same, for schedulers differ in what they send.

Most of a stage ends at once, by way of the blocks that clean up: nothing half-written, no child, no open W&B run stays.
A training loop finishes its step, saves and ends then: it runs inside of `deferred` and asks `requested`.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from flexpert.parallel.environment import is_first

#: Exit status of what was told to stop, and goes on when it is started again; sysexits.h calls it EX_TEMPFAIL.
REQUEUE = 75
#: Exit status where another process of the stage was lost.
LOST = 3
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

_deferred = False
_received: signal.Signals | None = None


class Stopped(SystemExit):
    """The stage was told to stop."""

    def __init__(self) -> None:
        super().__init__(REQUEUE)


def install() -> None:
    """Handle the signals; `deferred` says how."""
    global _deferred, _received
    _deferred, _received = False, None
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell starts what it runs in the background
            signal.signal(number, receive)


def receive(number: int, frame: FrameType | None) -> None:
    global _received
    is_second = _received == number == signal.SIGINT
    _received = signal.Signals(number)
    if _deferred and not is_second:
        return
    stop(_received)


def stop(received: signal.Signals) -> NoReturn:
    if is_first():
        goes_on = "started again, a pipeline goes on, and training from its last checkpoint; other stages begin anew"
        with contextlib.suppress(OSError):  # not `print`, which may be what is interrupted here
            os.write(2, f"flexpert: stopped by {received.name}; {goes_on}\n".encode())
    raise Stopped


def requested() -> bool:
    """Whether this process was told to stop."""
    return _received is not None


def interrupted() -> bool:
    """Whether the last that it was told was Ctrl-C."""
    return _received == signal.SIGINT


@contextmanager
def deferred() -> Iterator[None]:
    """While the block runs, a signal ends nothing by itself.

    Raises:
        Stopped: at the end of a block that ended well, where there was one nevertheless.
    """
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
    if _received is not None:
        stop(_received)
