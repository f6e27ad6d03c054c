"""Progress on the terminal: a bar where there is a terminal, plain lines where there is none."""

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """Args: title (stage and output directory), first step, last step, steps between two plain lines."""

    def __init__(self, title: str, start: int, total: int, interval: int) -> None:
        self.title, self.total, self.interval = title, total, interval
        self.bar: Progress | None = None
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self.bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console())
            self.task = self.bar.add_task(title, total=total, completed=start, note="")
            self.bar.start()

    def update(self, row: dict[str, Any]) -> None:
        note = f"loss {row['loss']:.4f}  lr {row['lr']:.1e}  {row['tokens_per_second']:,.0f} tokens/s"
        note += "  mfu n/a" if row["mfu"] is None else f"  mfu {row['mfu']:.1%}"
        if "valid_loss" in row:
            note += f"  valid {row['valid_loss']:.4f}"
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], note=note)
        elif row["step"] % self.interval == 0 or row["step"] == self.total or "valid_loss" in row:
            print(f"{self.title}  step {row['step']}/{self.total}  {note}", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
