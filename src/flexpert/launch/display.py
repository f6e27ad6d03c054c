"""How far the running stages are: redrawn below the other lines on a terminal, printed now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.live import Live
from rich.text import Text

REDRAW_SECONDS = 0.5
PRINT_SECONDS = 15.0


class Display:
    """A context: on a terminal, what is printed within it appears above the lines that are redrawn."""

    def __init__(self) -> None:
        # Redrawn by `update` alone: a thread of rich's own would live beside the forks that start stages.
        self.live = Live(auto_refresh=False, transient=True) if sys.stdout.isatty() else None
        self.seconds = PRINT_SECONDS if self.live is None else REDRAW_SECONDS
        self.next_time = time.monotonic() + self.seconds
        self.told: dict[str, str] = {}

    def __enter__(self) -> "Display":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def update(self, progress: Callable[[], dict[str, str]]) -> None:
        """Args: progress: asks for each running node's newest line; not called before there is something due."""
        if time.monotonic() < self.next_time:
            return
        self.next_time = time.monotonic() + self.seconds
        lines = progress()
        if self.live is not None:
            text = "\n".join(f"  {name}: {line}" for name, line in lines.items())
            self.live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
            return
        for name, line in lines.items():
            if self.told.get(name) != line:
                print(f"  {name}: {line}", flush=True)
        self.told = lines
