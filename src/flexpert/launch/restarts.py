"""Whether a job of Slurm's is worth starting once more: not after three starts in a row that made no checkpoint.

Jobs ask before they start a stage, for Slurm itself requeues what loses its node, and again before they are requeued. A
file beside the checkpoints says since which start there is the newest of them, so nothing is written where there is
none, and a stage without checkpoints is started three times in all.
"""

import contextlib
import os
import re
from pathlib import Path

from flexpert.checkpoint import envelope
from flexpert.config.compose import compose
from flexpert.errors import UserError
from flexpert.records import write_atomic

#: Starts in a row that may leave no new checkpoint.
LIMIT = 3
RECORD_NAME = ".restarts"
RECORD = re.compile(r"job (\S+): step (\d+) and calibration's (\d+) since restart (\d+)\n")


def newest(output: Path) -> tuple[int, int]:
    """Steps of the newest checkpoint of training, and of the calibration that follows it; 0: there is none."""
    first, second = (max(envelope.steps(path / "checkpoints"), default=0) for path in (output, output / "calibration"))
    return first, second


def in_vain(output: Path, job: str, restarts: int) -> int:
    """How many of the job's starts, the last ones before restart number `restarts`, have made no checkpoint."""
    steps = newest(output)
    if steps == (0, 0):
        return restarts
    path = output / "checkpoints" / RECORD_NAME
    known = RECORD.fullmatch(path.read_text(encoding="utf-8")) if path.exists() else None
    if known is not None and known[1] == job and (int(known[2]), int(known[3])) >= steps:
        return restarts - int(known[4])
    with contextlib.suppress(OSError):  # a full disk is no reason to stop: the stage can wait for room
        write_atomic(path, f"job {job}: step {steps[0]} and calibration's {steps[1]} since restart {restarts}\n")
    return 0


def check_restarts(restarts: int, stage: str, overrides: list[str]) -> None:
    """Raises `UserError` when the job should not be started again, or the stage's command is wrong."""
    config, _ = compose(stage, overrides)
    output = getattr(config, "output_dir", None)
    # A stage without a directory of its own has no checkpoints.
    count = restarts if output is None else in_vain(Path(output), os.environ["SLURM_JOB_ID"], restarts)
    if count >= LIMIT:
        raise UserError(
            f"{stage}: {count} starts of this job in a row made no new checkpoint{f' in {output}' if output else ''}: "
            "it is not started again; see above for what ended them, and submit it again"
        )
