"""Exact resume: a run that was stopped anywhere goes on, and ends, as the one that was not: bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import SHAPE, train

from flexpert.cli import run_stage
from flexpert.config.compose import compose
from flexpert.errors import UserError
from flexpert.monitor.jsonl import read_metrics
from flexpert.train import expert, pretrain, tune_router
from flexpert.train.callbacks import Callback, Checkpoints
from flexpert.train.loop import Trainer

pytestmark = pytest.mark.slow

STAGES: dict[str, Callable[[Any, str], None]] = {
    "pretrain": pretrain.run,
    "expert": expert.run,
    "tune_router": tune_router.run,
}
#: Case of `whole` → its stage.
STAGE_OF = {"pretrain": "pretrain", "mixture": "pretrain", "expert": "expert", "tune_router": "tune_router"}
#: Sequences of a microbatch; a step has 8.
MICROBATCH = {"whole batch": 8, "accumulation": 2}
STEPS, CALIBRATION_STEPS = 5, 3
TOY = [f"train.steps={STEPS}", "train.batch_tokens=128", "train.sequence_length=16", "optim.lr=1e-2",
       "train.microbatch_sequences=8", "optim.warmup_steps=2", "monitor.wandb=off", "checkpoint.keep=10"]  # fmt: skip

#: What a row says of the machine, and not of the run.
OF_THE_MACHINE = {
    "step_seconds", "data_seconds", "compute_seconds", "optimizer_seconds", "tokens_per_second", "peak_memory_bytes",
    "mfu",
}  # fmt: skip

#: A training loop's directory below the stage's ("." or "calibration"), and a step of it.
Moment = tuple[str, int]


class Stopped(BaseException):
    """In place of a signal."""


def bits(trainer: Trainer) -> dict[str, bytes]:
    """All that a run carries from one step to the next."""
    tensors: dict[str, torch.Tensor] = dict(trainer.model.named_parameters())
    names = {parameter: name for name, parameter in tensors.items()}
    for parameter, state in trainer.optimizer.state.items():
        tensors |= {f"{key} of {names[parameter]}": value for key, value in state.items()}
    counters = [trainer.step, trainer.skipped_steps, trainer.skipped_in_a_row]
    return {name: value.detach().numpy().tobytes() for name, value in tensors.items()} | {"counters": bytes(counters)}


class Run:
    """A training stage in one directory, which can be started again and again.

    Attributes:
        seen: what each training loop carried, as it was restored and after every step of the last start.
        images: where to copy the directory after every step, as a kill would leave it.
        copying: whether to.
        stop: the moment to end at.
        spoiled: steps of the first loop, from 0, whose loss is not finite.
    """

    def __init__(self, stage: str, output: Path, *overrides: str) -> None:
        self.stage, self.output = stage, output
        self.config, self.resolved = compose(stage, [*TOY, *overrides, f"output_dir={output}"])
        self.seen: dict[Moment, dict[str, bytes]] = {}
        self.images, self.copying = output.with_name("images"), False
        self.stop: Moment | None = None
        self.spoiled: set[int] = set()

    def start(self) -> None:
        self.seen.clear()
        initialise = Trainer.__init__

        def watched(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            initialise(trainer, *args, **kwargs)
            trainer.callbacks.append(Watch(self, trainer.output))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "__init__", watched)
            STAGES[self.stage](self.config, self.resolved)

    def image(self, moment: Moment) -> Path:
        return self.images / f"{Path(moment[0]).name}-{moment[1]}"

    def start_from(self, moment: Moment) -> None:
        """Put the directory back to what it was then, in the middle of writing a line, and start."""
        shutil.rmtree(self.output)
        shutil.copytree(self.image(moment), self.output)
        for path in self.output.rglob("metrics.jsonl"):
            with path.open("a") as file:
                file.write('{"step": 3, "lo')
        self.start()

    def result(self) -> dict[str, Any]:
        return result(self.output, "contribution" if self.stage == "expert" else "model")


class Watch(Callback):
    """The last callback of a loop of `Run`."""

    def __init__(self, run: Run, directory: Path) -> None:
        self.run, self.loop = run, str(directory.relative_to(run.output))

    def before_run(self, trainer: Trainer) -> None:
        def spoil(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output * float("nan") if torch.is_grad_enabled() and trainer.step in self.run.spoiled else output

        self.run.seen[self.loop, trainer.step] = bits(trainer)
        if self.run.spoiled:
            trainer.model.norm.register_forward_hook(spoil)

    def after_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        moment = (self.loop, trainer.step)
        self.run.seen[moment] = bits(trainer)
        for callback in trainer.callbacks:
            if isinstance(callback, Checkpoints):
                assert callback.saver.wait() is None  # what is being written
        if self.run.copying:
            shutil.copytree(self.run.output, self.run.image(moment))
        if self.run.stop == moment:
            raise Stopped


def result(output: Path, written: str) -> dict[str, Any]:
    """What a stage wrote: every byte of the model or contribution, and every row but for the machine's part."""
    rows = {
        f"row {number} of {path.relative_to(output)}": {
            key: value for key, value in row.items() if key not in OF_THE_MACHINE
        }
        for path in sorted(output.rglob("metrics.jsonl"))
        for number, row in enumerate(read_metrics(path), start=1)
    }
    assert rows
    return rows | {path.name: path.read_bytes() for path in (output / written).rglob("*") if path.is_file()}


def assert_same(found: dict[str, Any], expected: dict[str, Any], where: object) -> None:
    assert found.keys() == expected.keys(), where
    assert [name for name, value in found.items() if value != expected[name]] == [], where


@pytest.fixture(scope="module")
def overrides(
    road: Path, expert_overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """What each case of `whole` sets."""
    folder = tmp_path_factory.mktemp("assembled")
    public, letters = f"data.dir={road}/data/public", f"data.dir={road}/data/letters"
    for name, data in (("letters", letters), ("others", public)):
        given = [f"base={road}/public/model", data, f"name={name}", "router.init=random", "train.steps=2"]
        train("expert", *given, f"output_dir={folder}/{name}")
    contributions = f"contributions=[{folder}/letters/contribution,{folder}/others/contribution]"
    run_stage("assemble", [f"base={road}/public/model", contributions, f"output_dir={folder}/model"])
    evaluation = ["train.evaluation_interval=2", "train.evaluation_sequences=4"]
    return {
        "pretrain": [*SHAPE, public, *evaluation, "optim.horizon_steps=20"],
        "mixture": [*SHAPE, f"data.dirs={{public:{road}/data/public,letters:{road}/data/letters}}",
                    "data.weights={public:1,letters:2}", "data.intra_document_attention=true"],
        "expert": [*expert_overrides, *evaluation, "router.bias=true", "router.init=discriminant", "public_share=0.25",
                   f"router.calibration_steps={CALIBRATION_STEPS}", "optim.router_lr=5e-2"],
        "tune_router": [f"model={folder}/model", public, "active_experts=2", "optim.schedule=linear"],
    }  # fmt: skip


@dataclass(repr=False)
class Whole:
    """A run that was not stopped, what it carried after every step, and what it wrote."""

    run: Run
    overrides: list[str]
    seen: dict[Moment, dict[str, bytes]]
    result: dict[str, Any]

    @staticmethod
    def of(run: Run, overrides: list[str]) -> "Whole":
        run.copying = True
        run.start()
        run.copying = False
        return Whole(run, overrides, dict(run.seen), run.result())

    def resume_everywhere(self) -> None:
        """Kill the run after each step, and look at what is restored, at every step after it and at the end."""
        moments = list(self.seen)
        for number, moment in enumerate(moments):
            if moment[1] == 0:
                continue
            self.run.start_from(moment)
            before = [] if moment[0] == "." else [(".", STEPS)]  # whose last checkpoint calibration goes on from
            assert list(self.run.seen) == [*before, *moments[number:]]
            for later, seen in self.run.seen.items():
                assert_same(seen, self.seen[later], f"{moment}, then {later}")
            assert_same(self.run.result(), self.result, moment)


@pytest.fixture(scope="module", params=[f"{case}, {batch}" for case in STAGE_OF for batch in MICROBATCH])
def whole(
    request: pytest.FixtureRequest, overrides: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Whole:
    case, batch = request.param.split(", ")
    given = [*overrides[case], f"train.microbatch_sequences={MICROBATCH[batch]}"]
    output = tmp_path_factory.mktemp("whole") / "run"
    return Whole.of(Run(STAGE_OF[case], output, *given, "checkpoint.interval=1"), given)


def test_a_run_killed_after_any_step_goes_on_with_the_same_bits(whole: Whole) -> None:
    assert len(whole.seen) == 1 + STEPS + (1 + CALIBRATION_STEPS if whole.run.stage == "expert" else 0)
    whole.resume_everywhere()


def test_steps_since_the_last_checkpoint_are_repeated_with_the_same_bits(whole: Whole, tmp_path: Path) -> None:
    """One run, stopped after each odd step, with checkpoints of the even ones."""
    run = Run(whole.run.stage, tmp_path / "run", *whole.overrides, "checkpoint.interval=2")
    for run.stop in [moment for moment in whole.seen if moment[1] % 2]:
        with pytest.raises(Stopped):
            run.start()
        loop, step = run.stop
        first = next(begun for where, begun in run.seen if where == loop)
        assert first == max(0, step - 3), "the last even step of the start before"
        for moment, seen in run.seen.items():
            assert_same(seen, whole.seen[moment], f"until {run.stop}: {moment}")
    run.stop = None
    run.start()
    assert_same(run.result(), whole.result, "in the end")


def test_a_run_that_skips_steps_is_resumed_exactly_too(overrides: dict[str, list[str]], tmp_path: Path) -> None:
    """The first step is among the skipped ones: a checkpoint is then written before there is optimiser state."""
    given = [*overrides["pretrain"], "train.microbatch_sequences=2"]
    run = Run("pretrain", tmp_path / "run", *given, "checkpoint.interval=1")
    run.spoiled = {0, 2, 3}
    whole = Whole.of(run, given)
    rows = read_metrics(run.output / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [1, 1, 2, 3, 3]
    assert [row["loss"] is None for row in rows] == [True, False, True, True, False]
    whole.resume_everywhere()
    without_checkpoints = Run("pretrain", tmp_path / "plain", *given, "checkpoint.interval=null")
    without_checkpoints.spoiled = run.spoiled
    without_checkpoints.start()
    assert_same(without_checkpoints.result(), whole.result, "without checkpoints")


def test_a_resumed_run_gives_up_after_the_same_step(overrides: dict[str, list[str]], tmp_path: Path) -> None:
    run = Run("pretrain", tmp_path / "run", *overrides["pretrain"], "checkpoint.interval=1", "train.max_skipped=3")
    run.spoiled, run.copying = {1, 2, 3, 4}, True
    with pytest.raises(UserError, match="3 steps in a row"):
        run.start()
    run.copying = False
    assert list(run.seen) == [(".", step) for step in range(5)]
    for step in (1, 2, 3):
        with pytest.raises(UserError, match="3 steps in a row"):
            run.start_from((".", step))
        assert list(run.seen) == [(".", later) for later in range(step, 5)]


#: Runs a command, and then others one after another, each in a process of its own that has PyTorch loaded already, and
#: a fault planted, or none. Prints how they ended.
COMMANDS = """
import json, os, sys
import wandb
from flexpert.cli import main
from flexpert.testing import Fault, faults

first, *others = json.loads(sys.argv[1])
main(first)
ended = []
for arguments, planted in others:
    process = os.fork()
    if process == 0:
        with faults(*(Fault(**fault) for fault in planted)):
            sys.exit(main(arguments))
    ended.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
print(json.dumps(ended))
"""


def test_commands_killed_in_the_middle_go_on_with_the_same_bits_and_the_same_wandb_run(
    overrides: dict[str, list[str]], tmp_path: Path
) -> None:
    toy = [*TOY, *overrides["expert"], "train.microbatch_sequences=2", "checkpoint.interval=2", "checkpoint.keep=1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def command(output: Path, *more: str) -> list[str]:
        return ["expert", *toy, *more, f"output_dir={output}"]

    tracked = command(killed, "monitor.wandb=offline")

    def kill(phase: str, **where: int) -> list[dict[str, Any]]:
        return [{"action": "kill", "phase": phase, **where}]

    jobs = [
        command(whole),
        (command(killed), kill("staging", step=4)),  # which waits until step 2 is written, as no other place does
        (tracked, kill("commit", step=2, after=0)),  # of calibration
        (command(killed), kill("publish")),
        (tracked, []),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a fork has no other threads
    program = [sys.executable, "-c", COMMANDS, json.dumps(jobs)]
    run = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [-signal.SIGKILL] * 3 + [0], run.stderr
    assert_same(result(killed, "contribution"), result(whole, "contribution"), run.stdout)
    restored = [line.rpartition(" ")[2] for line in run.stdout.splitlines() if line.startswith("resuming")]
    assert restored == ["2", "5", "5", "3"]
    for loop in (killed, killed / "calibration"):
        records = [path.name for path in loop.glob("wandb/offline-run-*")]
        assert len(records) == 2 and len({name.rpartition("-")[2] for name in records}) == 1
