"""`metrics.jsonl`: one JSON object a line, the truth about a run."""

import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Append rows, flushed as they are written.

    Args:
        path: the file.
        last_step: the step that the run resumes from: rows of later steps were written by a part of the run that is
            now repeated, and are dropped, so that each step occurs once. A line cut short by a kill is dropped too.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        rows = [row for row in read_metrics(path) if row["step"] <= last_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, path)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows; an unfinished last line, as a kill leaves it, is not one."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
