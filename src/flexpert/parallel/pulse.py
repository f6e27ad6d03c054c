"""Who is still there: each process of a stage says so every second, and all learn which of them has ended.

A collective that a rank does not join fails with the name of a socket, or waits for minutes. The store that the ranks
met at knows more: rank 0 watches everyone's pulse, all watch rank 0's, and who ends by an error leaves the reason.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from flexpert.signals import LOST

#: Seconds between two beats; without one for so many, a rank has ended, or its machine has; after so many more, whoever
#: still waits in a collective is ended.
BEAT, SILENCE, GRACE = 1.0, 15.0, 30.0
#: Seconds that rank 0 stays for the others at its end, so that they read in its store what has happened.
STAY = 3.0
#: Exit status where another process has ended by the user's mistake.
MISTAKE = 2


class Pulse(threading.Thread):
    """Args:
    address, port: of the store that the ranks met at.
    rank, num_ranks: of this process, and of how many.
    """

    def __init__(self, address: str, port: int, rank: int, num_ranks: int) -> None:
        super().__init__(name="pulse", daemon=True)
        self.rank, self.num_ranks = rank, num_ranks
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=SILENCE))
        # torchrun may keep the store when it starts all ranks again.
        self.store = PrefixStore(f"flexpert/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self.watched = [other for other in (range(num_ranks) if rank == 0 else [0]) if other != rank]
        self.counts: dict[int, tuple[bytes, float]] = {}  # of a watched rank, its last beat and when it was new
        self.lost: str | None = None
        self.status = LOST  # to end with
        self.found = threading.Event()  # there is a lost rank
        self.over = threading.Event()
        self.store.set(f"where/{rank}", f"{socket.gethostname()}, process {os.getpid()}")
        self.store.set(f"pulse/{rank}", "0")

    def run(self) -> None:
        beat = 0
        while not self.over.wait(BEAT):
            beat += 1
            try:
                self.store.set(f"pulse/{self.rank}", str(beat))
                lost = self.look()
                if lost is not None:
                    self.store.set(f"knows/{self.rank}", "")
            except RuntimeError:  # the store is in rank 0, or in torchrun, which ends all ranks itself
                lost = f"rank 0 of {self.num_ranks}, or the torchrun that started it, does not answer"
            if lost is not None:
                self.lost = lost
                self.found.set()
                if not self.over.wait(GRACE):
                    self.say(lost)
                    os._exit(self.status)
                return

    def look(self) -> str | None:
        """Which rank is lost; None: as far as this one sees, none."""
        if self.store.check(["lost"]):
            status, _, lost = self.store.get("lost").decode().partition(" ")
            self.status = int(status)
            return lost
        now = time.monotonic()
        for other in self.watched:
            count = self.store.get(f"pulse/{other}") if self.store.check([f"pulse/{other}"]) else b""
            if self.counts.get(other, (None, now))[0] != count:
                self.counts[other] = count, now
            silent = now - self.counts[other][1] > SILENCE
            if silent or self.store.check([f"ended/{other}"]):
                lost = self.describe(other)
                self.store.set("lost", f"{self.status} {lost}")
                return lost
        return None

    def describe(self, other: int) -> str:
        where = self.store.get(f"where/{other}").decode() if self.store.check([f"where/{other}"]) else "never seen"
        lost = f"rank {other} of {self.num_ranks} ({where})"
        if self.store.check([f"ended/{other}"]):
            status, _, reason = self.store.get(f"ended/{other}").decode().partition(" ")
            self.status = int(status)
            return f"{lost} has ended: {reason}"
        return f"{lost} has ended, or has not answered for {SILENCE:.0f} s"

    def say(self, lost: str) -> None:
        """One of those that are left does: rank 0, or rank 1 where it is the lost one, and has not said so itself."""
        is_firsts = lost.startswith("rank 0 ")
        if self.rank == int(is_firsts) and not (is_firsts and self.status == MISTAKE):
            advice = "" if self.status == MISTAKE else "; start the stage again, it goes on"
            print(f"flexpert: {lost}{advice}", file=sys.stderr, flush=True)

    def tell(self, reason: str, status: int = LOST) -> None:
        """That this rank ends by an error, and with which status the others shall."""
        self.over.set()
        with contextlib.suppress(RuntimeError):
            self.store.set(f"ended/{self.rank}", f"{status} {reason}")
            self.store.set(f"knows/{self.rank}", "")

    def leave(self) -> None:
        """Before this rank ends after another, or after `tell`: rank 0 waits until the others know why."""
        self.over.set()
        deadline, others = time.monotonic() + STAY, [f"knows/{other}" for other in range(1, self.num_ranks)]
        with contextlib.suppress(RuntimeError):
            while self.rank == 0 and not self.store.check(others) and time.monotonic() < deadline:
                time.sleep(BEAT / 10)

    def stop(self) -> None:
        self.over.set()
        self.join()
