"""Progress of `prepare`: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0


class PrepareProgress:
    """Args: title; total, bytes of the input files (0: not known)."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.started = self.told = time.monotonic()
        self.bar: Progress | None = None
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console())
            self.task = self.bar.add_task(title, total=total or None, note="")
            self.bar.start()

    def update(self, consumed: int, num_documents: int, num_tokens: int) -> None:
        """Args: bytes of the input that have been read; documents and tokens that have been written."""
        now = time.monotonic()
        seconds = now - self.started
        note = f"{num_documents:,} documents  {num_tokens / max(seconds, 1e-9):,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=consumed, note=note)
        elif now - self.told >= LINE_SECONDS:
            self.told = now
            if self.total and consumed:
                share = consumed / self.total
                note += f"  {share:.0%} of the input  {seconds * (1 / share - 1):,.0f} s left"
            print(f"{self.title}  {note}", flush=True)

    def __enter__(self) -> "PrepareProgress":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
