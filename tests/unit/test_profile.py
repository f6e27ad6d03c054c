"""The profiler's window and the memory snapshot: what they write, and what they say where they cannot."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy import train

from flexpert.config.compose import compose
from flexpert.errors import UserError
from flexpert.train.callbacks import diagnostics

pytestmark = pytest.mark.slow


def steps_in(trace: Path) -> list[str]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any(event["name"] == "aten::mm" for event in events)
    return sorted(event["name"] for event in events if event["name"].startswith("step "))


def run(expert_overrides: list[str], output: Path, *overrides: str) -> list[str]:
    train("expert", *expert_overrides, f"output_dir={output}", *overrides)
    return sorted(str(path.relative_to(output)) for path in output.glob("profile/*"))


def test_the_trace_holds_the_steps_of_the_window(expert_overrides: list[str], tmp_path: Path) -> None:
    assert run(expert_overrides, tmp_path, "monitor.profile_steps=[3,4]") == ["profile/steps-3-4.json.gz"]
    assert steps_in(tmp_path / "profile/steps-3-4.json.gz") == ["step 3", "step 4"]


def test_a_run_that_ends_within_the_window_keeps_what_it_traced(expert_overrides: list[str], tmp_path: Path) -> None:
    assert run(expert_overrides, tmp_path, "monitor.profile_steps=[5,90]") == ["profile/steps-5-6.json.gz"]
    assert steps_in(tmp_path / "profile/steps-5-6.json.gz") == ["step 5", "step 6"]


def test_a_window_that_the_run_does_not_reach_is_said(
    expert_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(expert_overrides, tmp_path, "monitor.profile_steps=[10,13]", "train.steps=2") == []
    note = "note: monitor.profile_steps=[10,13] is not traced: this run makes steps 1 to 2"
    assert capsys.readouterr().out.splitlines().count(note) == 1


def test_a_memory_snapshot_on_a_cpu_is_one_note(
    expert_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(expert_overrides, tmp_path, "monitor.memory_snapshot=true", "train.steps=2") == []
    note = "note: monitor.memory_snapshot needs CUDA: nothing is recorded"
    assert capsys.readouterr().out.splitlines().count(note) == 1


def test_profiling_does_not_change_the_run(expert_overrides: list[str], tmp_path: Path) -> None:
    run(expert_overrides, tmp_path / "plain")
    run(expert_overrides, tmp_path / "profiled", "monitor.profile_steps=[2,3]")
    first, second = (tmp_path / name / "contribution/expert.safetensors" for name in ("plain", "profiled"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("steps", ["[3]", "[0,2]", "[4,3]", "[1,2,3]", "[]"])
def test_a_window_that_is_none_is_refused(steps: str) -> None:
    needed = ["base=/b", "data.dir=/d", "train.steps=1", "router.init=random", "name=math"]
    with pytest.raises(UserError, match=r"monitor.profile_steps=.* must be \[FIRST,LAST\]"):
        compose("expert", [*needed, f"monitor.profile_steps={steps}"])


class FakeMemory:
    """In place of PyTorch's record of CUDA memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        monkeypatch.setattr("torch.cuda.memory._record_memory_history", self.record)
        monkeypatch.setattr("torch.cuda.memory._dump_snapshot", self.dump)

    def record(self, enabled: str | None = "all", max_entries: int = 0) -> None:
        self.events.append("record" if enabled else "stop")

    def dump(self, path: str) -> None:
        self.events.append(Path(path).name)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [([], 3), (["profile_steps=[1,4]"], 4), (["profile_steps=[1,9]"], 5)],
    ids=["three steps", "the window", "a failure in the window"],
)
def test_a_memory_snapshot_covers_the_first_steps(
    overrides: list[str], steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = FakeMemory(monkeypatch)
    given = [f"monitor.{override}" for override in ["memory_snapshot=true", *overrides]]
    config, _ = compose("pretrain", ["data.dir=/d", "train.steps=9", *given])
    callback = diagnostics(config.monitor, tmp_path)[0]
    trainer: Any = SimpleNamespace(step=0, num_steps=9, device=torch.device("cuda"))
    callback.before_run(trainer)
    for trainer.step in range(1, 6):
        memory.events.append(str(trainer.step))
        callback.after_step(trainer, {})
    callback.after_run(trainer, failed=True)
    written = ["memory.pickle", "stop"]
    first, rest = [str(step) for step in range(1, steps + 1)], [str(step) for step in range(steps + 1, 6)]
    assert memory.events == ["record", *first, *written, *rest]
