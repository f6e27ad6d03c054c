"""Whoever is told to stop, and when: all ranks save, end with the status that means "again", and go on bit for bit."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from storm_runs import Ended, Job, Run, Start, Whole, hashes, leftovers, make_jobs

from flexpert.model.transformer import Transformer
from flexpert.signals import LOST, REQUEUE
from flexpert.testing import Fault

pytestmark = pytest.mark.slow

STEPS, EVALUATION, INTERVAL = 40, 4, 2
#: Phase → at which steps it comes by, how many steps later the run is saved, at least and at
#: most, and whether rank 0 alone passes it. All ranks ask each other near the end of a step, before `optimizer`, and
#: within an evaluation; a shard is written while steps go on, until the next is to be saved.
PHASES = {
    "data": (1, -1, 0, False), "forward": (1, 0, 0, False), "backward": (1, 0, 0, False),
    "optimizer": (1, 0, 1, False), "evaluation": (EVALUATION, 0, 0, False), "log": (1, 1, 1, True),
    "staging": (INTERVAL, 1, 1, False), "shard": (INTERVAL, 1, 3, False), "manifest": (INTERVAL, 1, 3, True),
    "commit": (INTERVAL, 1, 3, True), "committed": (INTERVAL, 1, 3, True), "retention": (INTERVAL, 1, 3, True),
}  # fmt: skip
SIGNALS = ["TERM", "INT", "USR1", "USR2"]


@pytest.fixture(scope="module", autouse=True)
def heeding() -> Iterator[None]:
    """A shell starts what it runs in the background with SIGINT ignored, and its children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("signals")


@pytest.fixture(scope="module")
def jobs(folder: Path) -> dict[str, Job]:
    """Stage → job; what they need is in `folder`."""
    jobs = {job.stage: job for job in make_jobs(folder)}
    assert f"checkpoint.interval={INTERVAL}" in jobs["pretrain"].overrides
    return jobs | {"pretrain": jobs["pretrain"].but(f"train.steps={STEPS}", f"train.evaluation_interval={EVALUATION}")}


def stop_in(run: Run, phases: list[str]) -> None:
    """Start the run for each phase, in which a signal comes to one rank."""
    saved = 0
    for number, phase in enumerate(phases):
        every, least, most, is_of_first = PHASES[phase]
        step = (saved // every + 1) * every + (phase == "data")  # prefetched: not the first one
        where = None if phase == "retention" else step  # of retention, it is that of the old checkpoint
        rank = 0 if is_of_first else run.num_ranks - 1
        ended = run.start(Fault(SIGNALS[number % len(SIGNALS)], phase, where, rank))
        assert ended.statuses == [REQUEUE] * run.num_ranks, (phase, ended.said)
        assert list(ended.resumed.values()) == ([saved] if saved else []), phase
        saved = run.committed()["."]
        assert step + least <= saved <= step + most, phase
        line = f"flexpert: told to stop; saved step {saved}; started again, it goes on"
        assert [said.count(line) for said in ended.said] == [1] + [0] * (run.num_ranks - 1), phase
        num_rows = run.records()["."].count(b"\n")
        assert num_rows == (saved - 1 if saved % EVALUATION == 0 else saved), "an evaluation is not gone through with"


def finish(run: Run, whole: Whole) -> None:
    run.survive([], whole)
    assert run.problems == []


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_rank_signalled_in_any_phase_of_training_stops_all_which_save_and_go_on(
    jobs: dict[str, Job], tmp_path: Path, num_ranks: int
) -> None:
    whole = Whole.of(Run(jobs["pretrain"], num_ranks, tmp_path / "whole"))
    run = Run(jobs["pretrain"], num_ranks, tmp_path / "run")
    for phase in ("startup", "restore"):  # at once
        ended = run.start(Fault("TERM", phase, rank=num_ranks - 1))
        assert ended.statuses == [REQUEUE] * num_ranks and run.committed() == {".": 0}, ended.said
    stop_in(run, list(PHASES))
    # Too late for another step: all is saved, and the model is written by the next start.
    for fault in (Fault("USR1", "log", STEPS, 0), Fault("INT", "publish", rank=0)):
        ended = run.start(fault)
        assert ended.statuses == [REQUEUE] * num_ranks, ended.said
        assert run.committed() == {".": STEPS}
        assert leftovers(run.output) == [] and not (run.output / "model").exists()
    finish(run, whole)


def test_of_three_ranks_one_is_enough(jobs: dict[str, Job], tmp_path: Path) -> None:
    job = jobs["pretrain"].but("train.batch_tokens=96", "train.steps=8")
    whole = Whole.of(Run(job, 3, tmp_path / "whole"))
    run = Run(job, 3, tmp_path / "run")
    stop_in(run, ["shard", "evaluation"])
    finish(run, whole)


def test_stopped_in_calibration_an_expert_job_goes_on(jobs: dict[str, Job], tmp_path: Path) -> None:
    whole = Whole.of(Run(jobs["expert"], 1, tmp_path / "whole"))
    run = Run(jobs["expert"], 1, tmp_path / "run")
    assert run.start(Fault("USR2", "forward", step=3)).statuses == [REQUEUE]
    assert run.start(Fault("TERM", "forward", step=3)).statuses == [REQUEUE]  # training is beyond its step 3
    assert run.committed() == {".": jobs["expert"].loops["."], "calibration": 3}
    finish(run, whole)


def test_a_second_interrupt_does_not_wait_for_the_step(jobs: dict[str, Job], tmp_path: Path) -> None:
    run = Run(jobs["pretrain"], 1, tmp_path / "run")
    ended = run.start(Fault("INT", "forward", 2), Fault("INT", "forward", 2), Fault("hang", "forward", 2))
    assert ended.statuses == [REQUEUE]
    assert run.committed() == {".": 0} and "flexpert: stopped by SIGINT; " in ended.said[0]


def run_once(words: list[str], num_ranks: int, logs: Path, *planted: Fault) -> Ended:
    return Start(words, num_ranks, logs, planted).end()


def test_told_to_stop_while_it_compiles_it_has_not_failed(jobs: dict[str, Job], tmp_path: Path) -> None:
    """As by Slurm, which sends a signal to the compiler, too."""
    cache, words = tmp_path / "compiled", jobs["pretrain"].but("train.compile=true").words(tmp_path / "run")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    with subprocess.Popen(
        [sys.executable, "-m", "flexpert", *words], env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        assert any("the first step takes longer" in line for line in process.stdout)
        while process.poll() is None and not compilers(process.pid):
            time.sleep(0.02)
        assert process.poll() is None, "it has compiled nothing"
        os.killpg(process.pid, signal.SIGUSR1)
        said = process.stderr.read()
    assert process.returncode == REQUEUE, said
    assert said.startswith("flexpert: told to stop within a step, which ended with ") and said.count("\n") == 1


def compilers(session: int) -> list[int]:
    """The C++ compilers that processes of a session have started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().partition("(")[2].rpartition(")")
            if name == "cc1plus" and int(rest.split()[3]) == session:
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("name", ["TERM", "INT", "USR1", "USR2"])
def test_preparing_and_assembling_end_at_once_and_leave_nothing(
    jobs: dict[str, Job], folder: Path, tmp_path: Path, name: str
) -> None:
    documents, tokenizer = f"data.documents={folder}/letters_texts/*.txt", f"tokenizer={folder}/data/public/tokenizer"
    contributions = f"contributions=[{folder}/contribution]"
    if not (folder / "contribution").exists():
        Run(jobs["expert"], 1, tmp_path / "expert").start()
        (tmp_path / "expert/contribution").rename(folder / "contribution")
    for words, phase in (
        (["prepare", documents, tokenizer], "publish"),
        (["assemble", f"base={folder}/public/model", contributions], "assembly"),
    ):
        place = tmp_path / words[0]
        place.mkdir()
        ended = run_once([*words, f"output_dir={place}/output"], 1, tmp_path, Fault(name, phase))
        assert ended.statuses == [REQUEUE] and f"flexpert: stopped by SIG{name}; " in ended.said[0]
        assert list(place.iterdir()) == []


def test_an_evaluation_ends_at_once_on_all_ranks_and_can_be_made_again(
    jobs: dict[str, Job], folder: Path, tmp_path: Path
) -> None:
    calls = []

    def stop(module: nn.Module, inputs: Any) -> None:
        """In the second batch that rank 1 scores."""
        if isinstance(module, Transformer):
            calls.append(module)
            if len(calls) == 2 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)

    words = ["evaluate", f"model={folder}/public/model", f"data.dirs={{letters:{folder}/data/letters}}",
             "batch_sequences=2", f"output_dir={tmp_path}/output"]  # fmt: skip
    hook = register_module_forward_pre_hook(stop)
    ended = run_once(words, 2, tmp_path)
    hook.remove()
    assert ended.statuses == [REQUEUE, REQUEUE], ended.said
    assert hashes(tmp_path / "output").keys() == {"resolved.yaml"}
    assert run_once(words, 2, tmp_path).statuses == [0, 0]
    assert (tmp_path / "output/evaluation.json").exists()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_step_that_hangs_ends_with_the_stacks_of_all_threads(
    jobs: dict[str, Job], tmp_path: Path, num_ranks: int
) -> None:
    job = jobs["pretrain"].but("train.step_timeout=8")
    ended = Run(job, num_ranks, tmp_path / "run").start(Fault("hang", "forward", step=3, rank=num_ranks - 1))
    assert ended.statuses[-1] == -signal.SIGALRM, ended.said
    assert {*ended.statuses} <= {-signal.SIGALRM, LOST}, "rank 0, whose own time ends a moment later"
    said = ended.said[num_ranks - 1]
    assert said.count("Timeout (0:00:0") == 1 and "most recent call first" in said
    assert said.count("Thread 0x") == 3 and " in losses\n" in said and " in _worker\n" in said  # the latter reads data
    others = {0: "/lock.py", 1: "/pulse.py"}
    assert others[num_ranks - 1] in said
