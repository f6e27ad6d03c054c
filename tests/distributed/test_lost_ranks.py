"""Processes that the others lose, or never meet: everyone ends, and one line says who it was."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.core.parallel_state  # noqa: F401 (the ranks are forked from here)
import pytest
from toy import SHAPE, with_toy

from flexpert import signals
from flexpert.cli import main
from flexpert.errors import UserError
from flexpert.parallel import pulse
from flexpert.parallel.environment import free_port
from flexpert.train.loop import Trainer

pytestmark = pytest.mark.slow


def environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip


def run_main(
    number: int, words: list[str], folder: Path, stopped: int = 0, seconds: float = 60.0
) -> tuple[list[int | None], list[str]]:
    """The command in several processes, of which some stop: exit statuses, and what each has said on stderr."""
    port, context = free_port(), multiprocessing.get_context("fork")

    def rank(index: int) -> None:
        os.environ |= environment(index, number, port)
        errors = os.open(folder / f"errors-{index}", os.O_WRONLY | os.O_CREAT)
        os.dup2(errors, 2)
        sys.stderr = os.fdopen(errors, "w")
        main(words)

    ranks = [context.Process(target=rank, args=(index,)) for index in range(number)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + seconds
    while sum(process.is_alive() for process in ranks) > stopped and time.monotonic() < deadline:
        time.sleep(0.1)
    statuses = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return statuses, [(folder / f"errors-{index}").read_text() for index in range(number)]


def said(errors: list[str]) -> list[str]:
    return [line for text in errors for line in text.splitlines() if line.startswith("flexpert: ")]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT", 0.1), ("SILENCE", 6.0), ("GRACE", 3.0)):
        monkeypatch.setattr(pulse, name, seconds)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise ZeroDivisionError("a defect")


@pytest.mark.parametrize(
    ("how", "lost", "status", "line"),
    [
        (kill, 1, -signal.SIGKILL, "flexpert: rank 1 of 3 (HOST, process "),
        (kill, 0, -signal.SIGKILL, "flexpert: rank 0 of 3, or the torchrun that started it, does not answer; "),
        (stop, 2, None, "flexpert: rank 2 of 3 (HOST, process "),
        (fail, 2, 1, "has ended: ZeroDivisionError: a defect; "),
    ],
    ids=["killed", "the first one killed", "stopped", "failed"],
)
def test_a_rank_that_is_lost_is_named_and_the_others_end(
    road: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch,
    how: Callable[[], None], lost: int, status: int | None, line: str,
) -> None:  # fmt: skip
    optimizer_step = Trainer.optimizer_step

    def step(trainer: Trainer) -> dict[str, Any]:
        if trainer.step == 2 and os.environ["RANK"] == str(lost):
            how()
        return optimizer_step(trainer)

    monkeypatch.setattr(Trainer, "optimizer_step", step)
    words = ["pretrain", *with_toy(*SHAPE, f"data.dir={road}/data/public", f"output_dir={tmp_path}/run",
             "train.microbatch_sequences=1", "train.batch_tokens=96")]  # fmt: skip
    statuses, errors = run_main(3, words, tmp_path, stopped=int(status is None))
    assert statuses == [status if rank == lost else signals.LOST for rank in range(3)]
    (told,) = said(errors)
    assert line.replace("HOST", socket.gethostname()) in told and told.endswith("; start the stage again, it goes on")
    assert all("Traceback" not in text for rank, text in enumerate(errors) if rank != lost)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_mistake_of_one_rank_is_said_once_and_is_all_the_others_status(
    road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """With the pulse that users have: the others read it though the first one, which has made it, is about to end."""

    def mistaken(trainer: Trainer) -> dict[str, Any]:
        if os.environ["RANK"] == str(lost):
            raise UserError("it is wrong")
        return optimizer_step(trainer)

    optimizer_step = Trainer.optimizer_step
    monkeypatch.setattr(Trainer, "optimizer_step", mistaken)
    words = ["pretrain", *with_toy(*SHAPE, f"data.dir={road}/data/public", f"output_dir={tmp_path}/run",
             "train.microbatch_sequences=1", "train.batch_tokens=96")]  # fmt: skip
    statuses, errors = run_main(3, words, tmp_path)
    (told,) = said(errors)
    assert told.startswith("flexpert: rank 1 of 3 (" if lost else "flexpert: it is wrong")
    assert told.endswith("it is wrong") and statuses == [2, 2, 2]


def test_a_mistake_of_all_is_said_once(road: Path, tmp_path: Path) -> None:
    words = ["pretrain", *with_toy(*SHAPE, f"data.dir={road}/data/public", f"output_dir={tmp_path}/run")]
    statuses, errors = run_main(2, [*words, "parallel.tensor=4"], tmp_path)
    (told,) = said(errors)
    assert statuses == [2, 2] and "2 ranks do not divide by parallel.tensor=4" in told and "what would do" in told
    statuses, errors = run_main(2, [*words, "parallel.data=3"], tmp_path)
    (told,) = said(errors)
    assert statuses == [2, 2] and "are not the 2 processes" in told
    statuses, errors = run_main(2, [*words, "parallel.tensr=2"], tmp_path)
    assert statuses == [2, 2] and len(said(errors)) == 1
    statuses, errors = run_main(1, [*words, "parallel.tensor=2"], tmp_path)
    assert statuses == [2] and "start them with torchrun --nproc-per-node 2" in said(errors)[0]
    assert not (tmp_path / "run").exists()


def test_processes_that_cannot_meet_say_where(road: Path, tmp_path: Path) -> None:
    words = ["pretrain", *with_toy(*SHAPE, f"data.dir={road}/data/public", f"output_dir={tmp_path}/run",
             "parallel.timeout=2", "train.microbatch_sequences=1")]  # fmt: skip
    port = free_port()
    done = subprocess.run(
        [sys.executable, "-m", "flexpert", *words],
        env=os.environ | environment(1, 2, port) | {"LOCAL_RANK": "0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == signals.LOST
    (told,) = said([done.stderr])
    assert f"rank 1 of 2 cannot meet the others at 127.0.0.1:{port}" in told
    assert not (tmp_path / "run").exists()


def test_torchrun_starts_it_and_a_mistake_is_said_once(road: Path, tmp_path: Path) -> None:
    torchrun = [
        sys.executable,
        *["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "flexpert"],
    ]
    words = ["pretrain", *with_toy(*SHAPE, f"data.dir={road}/data/public", "train.microbatch_sequences=1",
             f"output_dir={tmp_path}/run")]  # fmt: skip
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert done.stdout.endswith(f"{tmp_path}/run/model\n") and done.stdout.count("step 6/6") == 1
    done = subprocess.run(
        [*torchrun, *words[:-1], "parallel.tensor=3", f"output_dir={tmp_path}/other"],
        capture_output=True,
        text=True,
        check=False,
    )
    (told,) = said([done.stderr])
    assert done.returncode != 0 and "2 ranks do not divide by parallel.tensor=3" in told
