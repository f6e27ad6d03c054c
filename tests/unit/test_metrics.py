"""What a run records and tells: each step once in `metrics.jsonl`, W&B runs that say how they ended, progress.

What happens to them when a disk, a server or a process fails is in tests/faults/test_outside.py.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from toy import train

from flexpert.config.groups import MonitorConfig
from flexpert.errors import UserError
from flexpert.monitor.devices import peak_of
from flexpert.monitor.jsonl import MetricsLog, end_of_rows, read_metrics
from flexpert.monitor.wandb import WandbRun
from flexpert.testing import Fault, faults


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


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 16])
def test_rows_are_found_from_the_end_whatever_is_read_at_once(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexpert.monitor.jsonl.BLOCK", block)
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "note": "{"x" * (step % 3 * 20)}"}}\n' for step in range(2, 9)]
    for tail in ("", '{"st', '{"step": 9}', "\0" * 50, "\0\n", "3\n", "[]\n", "{}\n", '{"step": null}\n'):
        path.write_text("".join(lines) + tail)
        for last in range(10):
            assert end_of_rows(path, last) == len("".join(lines[: max(0, last - 1)])), (tail, last)
    path.write_text("")
    assert end_of_rows(path, 9) == end_of_rows(tmp_path / "none", 9) == 0


def test_of_a_large_file_only_the_end_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # which no disk here holds, and nobody reads
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + b"".join(b'{"step": %d}\n' % step for step in range(1, 9)))
    MetricsLog(path, 5).close()
    assert path.stat().st_size == (1 << 40) + 1 + 5 * len(b'{"step": 1}\n')


def test_an_exception_from_outside_neither_loses_nor_doubles_a_row(tmp_path: Path) -> None:
    """As a signal's handler raises it, before a row is written; the row is written with the next."""
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1})
    with faults(Fault("error", "log", step=2)), pytest.raises(RuntimeError, match="planted"):
        log.write({"step": 2})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_rows_are_flushed_though_nobody_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run without checkpoints kept all its rows in memory."""
    monkeypatch.setattr("flexpert.monitor.jsonl.FLUSH_ROWS", 4)
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    kept = []
    for step in range(1, 11):
        log.write({"step": step})
        kept.append(len(log.kept))
    assert kept == [1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 11))


def test_a_run_without_metrics_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


class WandbRecorder:
    """In place of W&B: remembers what it was given."""

    def __init__(self, **given: Any) -> None:
        self.stage, self.id, self.config = given["job_type"], given["id"], given["config"]
        self.resume, self.steps, self.rows = given["resume"], list[int](), list[dict[str, Any]]()
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str) -> None:
        pass

    def log(self, row: dict[str, Any], step: int) -> None:
        self.steps.append(step)
        self.rows.append(row)

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


def test_a_run_that_was_moved_goes_on_under_its_identity(wandb_runs: list[WandbRecorder], tmp_path: Path) -> None:
    flat = {"name": "letters", "seed": 3}
    first = WandbRun(MonitorConfig(), "offline", "expert", tmp_path / "here", flat)
    moved = WandbRun(MonitorConfig(), "offline", "expert", tmp_path / "there", flat, first.id)
    other = WandbRun(MonitorConfig(), "offline", "expert", tmp_path / "there", flat)
    for run in (first, moved, other):
        run.close()
    assert [recorded.id for recorded in wandb_runs] == [first.id, first.id, other.id]
    assert moved.id == first.id != other.id


@pytest.mark.parametrize("breaks", ["log", "finish"])
def test_an_error_of_wandb_is_one_line_and_ends_it_alone(
    breaks: str, expert_overrides: list[str], wandb_runs: list[WandbRecorder], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fails(self: WandbRecorder, *given: Any, **named: Any) -> None:
        raise TypeError("what W&B did not expect\nand its details")

    monkeypatch.setattr(WandbRecorder, breaks, fails)
    train("expert", *expert_overrides, "monitor.wandb=offline", f"output_dir={tmp_path}/run")
    told = [line for line in capsys.readouterr().out.splitlines() if "W&B" in line]
    assert told == ["note: W&B ended (what W&B did not expect): nothing more is sent, and metrics.jsonl has every row"]
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == 6


def test_wandb_without_its_key_is_one_line(
    expert_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"W&B: .*; monitor\.wandb=offline goes on without its server"):
        train("expert", *expert_overrides, "monitor.wandb=online", f"output_dir={tmp_path}/run")


def test_a_run_that_fails_does_not_look_finished_in_wandb(
    expert_overrides: list[str], wandb_runs: list[WandbRecorder], tmp_path: Path
) -> None:
    with faults(Fault("error", "optimizer", step=2)), pytest.raises(RuntimeError, match="a fault was planted"):
        train("expert", *expert_overrides, "monitor.wandb=offline", f"output_dir={tmp_path}/run")
    assert [run.exit_code for run in wandb_runs] == [1]


def test_progress_tells_the_learning_rate(
    expert_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("expert", *expert_overrides, "optim.schedule=constant", "train.steps=2", f"output_dir={tmp_path}/run")
    line = next(line for line in capsys.readouterr().out.splitlines() if "step 2/2" in line)
    assert line.startswith(f"expert {tmp_path}/run  step 2/2  loss ") and "  lr 1.0e-02  " in line


def test_utilisation_is_the_share_of_the_device_that_the_model_needs(
    expert_overrides: list[str], wandb_runs: list[WandbRecorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("flexpert.train.callbacks.peak_flops", lambda device: 1e12)
    train("expert", *expert_overrides, "monitor.wandb=offline", "train.steps=2", f"output_dir={tmp_path}/run")
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    # Forward: 2 layers of attention, two FFNs and two rows, and the head, of toy.SHAPE. Nothing below the first expert
    # is trained.
    attention, ffn, scores, head = 4 * 24 * 24, 3 * 24 * 40, 2 * 24 * 16, 384 * 24
    forward = 2 * (2 * (attention + 2 * ffn + scores + 2 * 24) + head)
    first = 2 * (ffn + 2 * ffn // 3 + 2 * 24)
    second = 2 * (attention + 2 * scores + 3 * ffn + 2 * 2 * 24)
    for row in rows:
        flops = 128 * (forward + first + second + 2 * head)
        assert row["mfu"] == pytest.approx(flops / row["step_seconds"] / 1e12, rel=1e-9)
        parts = [row[f"{part}_seconds"] for part in ("data", "compute", "optimizer")]
        assert min(parts) > 0 and sum(parts) <= row["step_seconds"]
    assert "  mfu " in capsys.readouterr().out
    assert [row["mfu"] for row in wandb_runs[0].rows] == [row["mfu"] for row in rows]


def test_utilisation_of_an_unknown_device_is_null(
    expert_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("expert", *expert_overrides, "train.steps=1", f"output_dir={tmp_path}/run")
    assert [row["mfu"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [None]
    assert "  mfu n/a" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "tera_flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_devices_are_known_by_the_names_that_cuda_gives(name: str, tera_flops: float | None) -> None:
    assert peak_of(name) == (None if tera_flops is None else pytest.approx(tera_flops * 1e12))


@pytest.mark.slow
def test_a_run_that_is_started_again_goes_on_in_the_same_wandb_run(
    expert_overrides: list[str], wandb_runs: list[WandbRecorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*expert_overrides, "monitor.wandb=offline", f"output_dir={tmp_path}/run"]
    log = MetricsLog.write

    def dies(self: MetricsLog, row: dict[str, Any]) -> None:
        log(self, row)
        if row["step"] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricsLog, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        train("expert", *overrides)
    monkeypatch.setattr(MetricsLog, "write", log)
    train("expert", *overrides, "monitor.log_interval=1", "checkpoint.keep=1")  # which is no other run
    assert [(run.id, run.steps, run.exit_code) for run in wandb_runs] == [
        (wandb_runs[0].id, [1, 2, 3, 4], 1),
        (wandb_runs[0].id, [5, 6], 0),
    ]
    train("expert", *expert_overrides, "monitor.wandb=offline", f"output_dir={tmp_path}/other")
    assert wandb_runs[2].id != wandb_runs[0].id
