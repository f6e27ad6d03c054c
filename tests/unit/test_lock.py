"""One process at a time in a directory, and the next one as soon as it is gone."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from toy import train

from flexpert.config.compose import compose
from flexpert.launch.pipeline import run
from flexpert.lock import exclusive

Refused = Callable[..., AbstractContextManager[None]]
HOLDER = """
import sys, time
from pathlib import Path
from flexpert.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(directory: Path) -> subprocess.Popen[str]:
    """A process that holds the directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_directory_in_use_is_refused_until_its_process_is_gone(tmp_path: Path, refused: Refused) -> None:
    process = hold(tmp_path)
    with refused(f"{tmp_path} is in use by another process (pid {process.pid} on host "), exclusive(tmp_path):
        pass
    process.kill()
    process.wait()
    for _ in range(2):
        with exclusive(tmp_path):
            assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_second_training_in_a_directory_is_refused_and_changes_nothing(
    expert_overrides: list[str], tmp_path: Path, refused: Refused
) -> None:
    overrides = [*expert_overrides, "router.calibration_steps=2", f"output_dir={tmp_path}/run"]
    train("expert", *overrides)
    shutil.rmtree(tmp_path / "run/contribution")
    for held in (tmp_path / "run", tmp_path / "run/calibration"):
        metrics = (held / "metrics.jsonl").stat()
        with exclusive(held), refused(f"{held} is in use"):
            train("expert", *overrides)
        assert (held / "metrics.jsonl").stat() == metrics
    train("expert", *overrides)
    assert {path.name for path in (tmp_path / "run/contribution").iterdir()} == {
        "contribution.json",
        "expert.safetensors",
    }


def test_a_second_pipeline_in_a_directory_is_refused_and_changes_nothing(tmp_path: Path, refused: Refused) -> None:
    process = hold(tmp_path)
    with refused(f"{tmp_path} is in use by another process (pid {process.pid}"):
        run(*compose("pipeline", ["pipeline=smoke", f"output_dir={tmp_path}"]))
    process.kill()
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
