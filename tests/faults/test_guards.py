"""Steps whose loss or gradient cannot be right are skipped as if they had not been, and named; too many end the run."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from storm_runs import Job, Run, differences, make_jobs

from flexpert.checkpoint import envelope
from flexpert.checkpoint.sharding import local_part
from flexpert.cli import run_stage
from flexpert.errors import UserError
from flexpert.lock import Heartbeat
from flexpert.signals import REQUEUE
from flexpert.testing import Fault
from flexpert.train.callbacks import Callback
from flexpert.train.loop import Trainer

pytestmark = pytest.mark.slow


class Spoil(Callback):
    """Spoils steps of a run, and looks at what they leave behind.

    Args:
        factors: step → by what its last hidden state is multiplied, which changes its loss and gradient,
        rank: on this rank alone; None: on all.
    """

    def __init__(self, factors: dict[int, float], rank: int | None = None) -> None:
        self.factors = factors if rank in (None, int(os.environ.get("RANK", "0"))) else dict.fromkeys(factors, 1.0)
        self.tokens: dict[int, Tensor] = {}  # of a step, [B, S]
        self.guard: dict[str, list[float]] = {}

    def before_run(self, trainer: Trainer) -> None:
        self.before = bits(trainer)

        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                before = self.tokens.get(trainer.step + 1, inputs[0][:0])
                self.tokens[trainer.step + 1] = torch.cat([before, inputs[0]])

        def spoil(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output * self.factors.get(trainer.step + 1, 1.0) if torch.is_grad_enabled() else output

        trainer.model.register_forward_pre_hook(keep)
        trainer.model.norm.register_forward_hook(spoil)

    def after_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        after = bits(trainer)
        if trainer.step in self.factors:
            # A checkpoint gives AdamW the state that it begins with, where there was none: zeros.
            assert {name: self.before.get(name, bytes(len(value))) for name, value in after.items()} == after
        else:
            assert after["head.weight"] != self.before["head.weight"]
        self.before, self.guard = after, trainer.guard.state()


def bits(trainer: Trainer) -> dict[str, bytes]:
    """Parameters and optimiser state."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    tensors: dict[str, Tensor] = dict(trainer.model.named_parameters())
    for parameter, state in trainer.optimizer.state.items():
        tensors |= {f"{key} of {names[parameter]}": value for key, value in state.items()}
    return {name: local_part(value)[0].detach().numpy().tobytes() for name, value in tensors.items()}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_jobs(tmp_path_factory.mktemp("guards"))[0]


def spoiling(patch: pytest.MonkeyPatch, factors: dict[int, float], rank: int | None = None) -> list[Spoil]:
    """Have runs spoiled from now on; the list holds what was done to each."""
    initialise, all_of_them = Trainer.__init__, []

    def watched(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        initialise(trainer, *args, **kwargs)
        all_of_them.append(Spoil(factors, rank))
        trainer.callbacks.append(all_of_them[-1])

    patch.setattr(Trainer, "__init__", watched)
    return all_of_them


def skipped(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.output / "skipped.jsonl").read_text().splitlines()]


def test_a_skipped_step_leaves_no_trace_but_its_documents(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(job, 1, tmp_path / "run")
    spoils = spoiling(monkeypatch, {1: math.nan, 4: 1e4, 5: math.inf})
    run_stage(job.stage, job.words(run.output)[1:])
    (spoil,) = spoils
    told = skipped(run)
    assert [line["step"] for line in told] == [1, 4, 5]
    assert told[0]["reason"] == told[2]["reason"] == "loss or gradient is not finite"
    assert told[1]["reason"].startswith("loss ") and " robust standard deviations above " in told[1]["reason"]
    rows = run.result()
    assert [rows[f"row {step} of ."]["skipped_steps"] for step in range(1, 9)] == [1, 1, 1, 2, 3, 3, 3, 3]
    for line in told:
        for tokens, origin in zip(spoil.tokens[line["step"]].numpy(), line["sequences"], strict=True):
            assert_from(tokens, origin)


def assert_from(tokens: np.ndarray, origin: str) -> None:
    """The tokens begin in the first of the documents that are named; the target of the last one is in the last."""
    path, what, numbers = origin.rsplit(" ", 2)
    first, last = map(int, numbers.split("-"))
    assert what == "documents" and path.endswith("data/public/train.bin")
    data = IndexedDataset(path.removesuffix(".bin"))  # what it gives is its memory, not ours
    documents = [data[number].copy() for number in range(first, last + 1)]
    text, length = np.concatenate(documents), len(tokens)
    places = [place for place in range(len(text) - length) if (text[place : place + length] == tokens).all()]
    assert any(place < len(documents[0]) and place + length >= len(text) - len(documents[-1]) for place in places)


def test_too_many_in_a_row_stop_the_run_with_a_checkpoint_and_it_goes_on_alike(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoils = spoiling(monkeypatch, {3: math.nan, 4: 1e4, 5: math.nan, 6: 1e4})
    whole, run = Run(job, 1, tmp_path / "whole"), Run(job, 1, tmp_path / "run")
    run_stage(job.stage, job.words(whole.output)[1:])
    strict = job.but("train.max_skipped=3").words(run.output)[1:]
    for step, number in ((5, 3), (6, 4)):
        with pytest.raises(UserError, match=f"^{number} steps in a row were skipped: .*skipped.jsonl"):
            run_stage(job.stage, strict)
        assert envelope.steps(run.output / "checkpoints")[-1] == step
    run_stage(job.stage, strict)
    assert differences(run.result(), whole.result()) == []
    assert skipped(run) == skipped(whole)
    assert spoils[-1].guard == spoils[0].guard


def test_stopped_in_the_evaluation_of_a_skipped_step_the_run_names_it_when_it_goes_on(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiling(monkeypatch, {4: math.nan})
    whole, run = Run(job, 1, tmp_path / "whole"), Run(job, 1, tmp_path / "run")
    assert whole.start().statuses == [0]
    assert run.start(Fault("TERM", "evaluation", step=4)).statuses == [REQUEUE]
    assert run.committed() == {".": 4} and not (run.output / "skipped.jsonl").exists()
    assert run.start().statuses == [0]
    assert differences(run.result(), whole.result()) == []
    assert [line["step"] for line in skipped(run)] == [4] and skipped(run) == skipped(whole)


def test_a_loss_that_is_wrong_on_one_rank_stops_all(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 says it, also where it learns that the other has ended before it has ended itself."""
    spoiling(monkeypatch, {2: math.nan, 3: math.nan}, rank=1)
    release = Heartbeat.release

    def slowly(heartbeat: Heartbeat) -> None:
        time.sleep(1)
        release(heartbeat)

    monkeypatch.setattr(Heartbeat, "release", slowly)
    run = Run(job.but("train.max_skipped=2"), 2, tmp_path / "run")
    ended = run.start()
    assert ended.statuses == [2, 2], ended.said
    assert [said.count("flexpert: 2 steps in a row were skipped: ") for said in ended.said] == [1, 0]
    assert run.committed() == {".": 3} and [line["step"] for line in skipped(run)] == [2, 3]
