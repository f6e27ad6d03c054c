"""What a run records and tells: each step once in `metrics.jsonl`, W&B runs that say how they ended, progress."""

from pathlib import Path
from typing import Any

import pytest
from toy import train

from flexpert.errors import UserError
from flexpert.monitor.jsonl import MetricsLog, read_metrics


def write(path: Path, steps: range, last_step: int, note: str) -> None:
    log = MetricsLog(path, last_step)
    for step in steps:
        log.write({"step": step, "note": note, "loss": None})
    log.close()


def test_rows_are_on_disk_as_they_are_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1, "loss": 2.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
    log.close()


def test_rows_after_the_checkpoint_are_repeated_and_not_doubled(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8), 0, "first")
    write(path, range(6, 11), 5, "second")
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 11))
    assert [row["note"] for row in read_metrics(path)] == ["first"] * 5 + ["second"] * 5


def test_a_line_cut_by_a_kill_is_dropped_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4), 0, "first")
    whole = path.read_bytes()
    for cut in range(whole.rindex(b"\n", 0, -1) + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert [row["step"] for row in read_metrics(path)] == [1, 2]
        write(path, range(3, 5), 3, "second")
        assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_without_metrics_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


class WandbRecorder:
    """In place of W&B: remembers what it was given."""

    def __init__(self, **given: Any) -> None:
        self.stage, self.id, self.config = given["job_type"], given["id"], given["config"]
        self.steps: list[int] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str) -> None:
        pass

    def log(self, row: dict[str, Any], step: int) -> None:
        self.steps.append(step)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[WandbRecorder]:
    runs: list[WandbRecorder] = []

    def init(**given: Any) -> WandbRecorder:
        runs.append(WandbRecorder(**given))
        return runs[-1]

    monkeypatch.setattr("wandb.init", init)
    return runs


def test_calibration_is_a_wandb_run_of_its_own_with_its_own_recipe(
    expert_overrides: list[str], wandb_runs: list[WandbRecorder], tmp_path: Path
) -> None:
    calibration = ["router.calibration_steps=3", "router.calibration_lr=0.5"]
    train("expert", *expert_overrides, *calibration, "monitor.wandb=offline", f"output_dir={tmp_path}/run")
    assert [(run.stage, run.steps, run.exit_code) for run in wandb_runs] == [
        ("expert", [1, 2, 3, 4, 5, 6], 0),
        ("calibrate", [1, 2, 3], 0),
    ]
    first, second = (run.config for run in wandb_runs)
    assert (first["optim.lr"], first["optim.schedule"], first["train.steps"]) == (1e-2, "cosine", 6)
    assert (second["optim.lr"], second["optim.schedule"], second["train.steps"]) == (0.5, "linear", 3)
    assert first.keys() == second.keys() and second["name"] == "letters"
    assert wandb_runs[0].id != wandb_runs[1].id


def test_a_run_that_fails_does_not_look_finished_in_wandb(
    expert_overrides: list[str], wandb_runs: list[WandbRecorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexpert.train.loop.MAX_SKIPPED", 0)  # the first step is one too many
    with pytest.raises(UserError, match="without a finite loss"):
        train("expert", *expert_overrides, "monitor.wandb=offline", f"output_dir={tmp_path}/run")
    assert [run.exit_code for run in wandb_runs] == [1]


def test_progress_tells_the_learning_rate(
    expert_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("expert", *expert_overrides, "optim.schedule=constant", "train.steps=2", f"output_dir={tmp_path}/run")
    line = next(line for line in capsys.readouterr().out.splitlines() if "step 2/2" in line)
    assert line.startswith(f"expert {tmp_path}/run  step 2/2  loss ") and "  lr 1.0e-02  " in line
