"""Bring a graph to completion: start what is missing once what it needs is there, and record what was made.

How a stage becomes a process, and where, is a launcher's affair.
"""

import time
from dataclasses import dataclass
from typing import Protocol

from flexpert.launch.display import Display
from flexpert.launch.graph import Node, Records, lost

POLL_SECONDS = 0.1


class StageFailed(Exception):
    """A stage exited with an error; `node` is its name, `status` its exit status."""

    def __init__(self, message: str, node: str, status: int) -> None:
        super().__init__(message)
        self.node, self.status = node, status


@dataclass(frozen=True)
class Ended:
    """A node's process that is over.

    Attributes:
        node: whose.
        status: exit status, negative for a signal.
        seconds: that it ran.
        log: where its output is.
        reason: last line of that output.
    """

    node: Node
    status: int
    seconds: float
    log: str
    reason: str


class Launcher(Protocol):
    def has_room(self, node: Node) -> bool:
        """Whether the node may start now; always when nothing runs."""

    def start(self, node: Node) -> str:
        """Start the node's stage; returns where its output can be read."""

    def progress(self) -> dict[str, str]:
        """The newest line of progress of every running node that has told any."""

    def poll(self) -> list[Ended]:
        """What ended since the last call."""

    def stop(self) -> list[Ended]:
        """End everything that still runs, and wait for it; returns what ended since the last call of `poll`."""


class Walk:
    """One walk over a graph. A stage that fails stops nothing that does not need it; what needs it is not started.

    Args:
        nodes: in an order in which each comes after what it needs.
        complete: names of nodes that are complete already, together with all that they need.
    """

    def __init__(self, nodes: list[Node], records: Records, launcher: Launcher, complete: set[str]) -> None:
        self.graph = {node.name: node for node in nodes}
        self.records, self.launcher = records, launcher
        self.done = set(complete)
        self.waiting = [node for node in nodes if node.name not in complete]
        self.running: set[str] = set()
        self.ended: list[Ended] = []
        self.failed: list[StageFailed] = []

    def run(self) -> None:
        """Bring every node to completion.

        Raises:
            UserError: an output was made from other inputs than it would be now.
            StageFailed: a stage failed that the last one cannot do without; the others that could run have.
            Stopped: told to stop; running stages were stopped and will go on in the next run.
        """
        self.tell_complete()
        try:
            with Display() as display:
                while self.step():
                    display.update(self.launcher.progress)
                    time.sleep(POLL_SECONDS)
        finally:
            # Also what ended well while this was interrupted, or is interrupted in hashing, has its record.
            self.ended += self.launcher.stop()
            self.ended = [ended for ended in self.ended if ended.status == 0]
            self.finish()
        if self.failed and next(reversed(self.graph)) not in self.done:
            raise self.failed[0]
        if self.failed:
            print(f"  done without {', '.join(failure.node for failure in self.failed)}, which failed", flush=True)

    def tell_complete(self) -> None:
        """One line about what an earlier run has made."""
        names = [name for name in self.graph if name in self.done]
        if len(names) == sum(not node.always for node in self.graph.values()):
            print(f"  all {len(names)} stages are complete", flush=True)
        elif names:
            print(f"  complete: {', '.join(names)}", flush=True)

    def step(self) -> bool:
        """Record what ended, start what can start; returns whether there is more to wait for."""
        self.ended += self.launcher.poll()
        self.finish()
        for node in self.ready():
            if self.records.is_complete(node, self.graph):
                self.waiting.remove(node)
                self.done.add(node.name)
                print(f"  {node.name}: complete", flush=True)
            elif self.launcher.has_room(node):
                self.waiting.remove(node)
                self.records.begin(node, self.graph)
                log = self.launcher.start(node)
                self.running.add(node.name)
                if not node.always:
                    print(f"  {node.name}: started (log {log})", flush=True)
        return bool(self.running or self.ready())

    def ready(self) -> list[Node]:
        settled = self.done | self.lost()
        return [n for n in self.waiting if self.done.issuperset(n.needs) and settled.issuperset(n.wants)]

    def lost(self) -> set[str]:
        """What has failed in this run, and what cannot be made without it."""
        return lost(self.graph, {failure.node for failure in self.failed})

    def finish(self) -> None:
        """Record what ended. An interrupt leaves in `ended` what has no record yet."""
        while self.ended:
            ended = self.ended[0]
            name = ended.node.name
            self.records.end(ended.node, ended.status)
            if ended.status == 0:
                self.done.add(name)
                what = "written" if ended.node.always else f"done in {ended.seconds:.0f} s"
                print(f"  {name}: {what}", flush=True)
            else:
                message = f"{name} failed (status {ended.status}, log {ended.log}): {ended.reason}"
                self.failed.append(StageFailed(message, name, ended.status))
                print(f"  {message}", flush=True)
            self.running.discard(name)
            self.ended.pop(0)
