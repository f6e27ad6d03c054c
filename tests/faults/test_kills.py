"""Runs that are killed at the worst places go on, and end, with the same bits; benchmarks/kill_storm.py kills more."""

import functools
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import kill_storm
from storm_runs import Job, Kill, Run, Whole, make_jobs

pytestmark = pytest.mark.slow

#: Stage and number of ranks → the job, and what came of it where it was left alone.
Wholes = Callable[[str, int], tuple[Job, Whole]]


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    folder = tmp_path_factory.mktemp("storm")
    jobs = {job.stage: job for job in make_jobs(folder)}

    @functools.cache
    def whole(stage: str, num_ranks: int) -> tuple[Job, Whole]:
        job = jobs[stage]
        if num_ranks > 2:
            job = job.but("train.steps=4", "train.evaluation_interval=null")._replace(loops={".": 4})
        return job, Whole.of(Run(job, num_ranks, folder / f"whole-{stage}-{num_ranks}"))

    return whole


def survived(run: Run, whole: Whole, kills: list[Kill]) -> list[int]:
    """The newest checkpoint of the first loop after each of the kills, all of which happen, and nothing else does."""
    committed = []
    for kill in kills:
        assert run.start_and_kill(kill, whole.seconds), f"{kill.kind} was not reached"
        committed.append(run.committed()["."])
    run.survive([], whole)
    assert run.problems == []
    return committed


@pytest.mark.parametrize(
    ("kill", "left"),
    [
        (Kill.at("data", step=2), [0]),
        (Kill.at("forward", step=4, after=2), [0, 2]),  # step 2 may still be being written
        (Kill.at("optimizer", step=5), [2, 4]),
        (Kill.at("evaluation", step=4, after=1), [0, 2]),
        (Kill.at("log", step=6), [2, 4]),
        (Kill.at("staging", step=4), [2]),
        (Kill.at("shard", step=4, after=3), [2]),
        (Kill.at("manifest", step=4), [2]),
        (Kill.at("commit", step=4), [2]),
        (Kill.at("committed", step=4), [4]),
        (Kill.at("retention", step=2), [6]),
        (Kill.at("publish"), [8]),
    ],
    ids=lambda value: value.kind if isinstance(value, Kill) else "",
)
def test_a_run_killed_at_any_place_goes_on_with_the_same_bits(
    wholes: Wholes, tmp_path: Path, kill: Kill, left: list[int]
) -> None:
    job, whole = wholes("pretrain", 1)
    run = Run(job, 1, tmp_path / "run")
    (committed,) = survived(run, whole, [kill])
    assert committed in left
    assert run.tallies[kill.kind].resumed == (committed > 0)


def test_an_expert_job_killed_in_training_in_calibration_and_at_its_end_goes_on(wholes: Wholes, tmp_path: Path) -> None:
    job, whole = wholes("expert", 1)
    run = Run(job, 1, tmp_path / "run")
    # The second is at calibration's step 2: that of training is behind it.
    assert survived(run, whole, [Kill.at("shard", step=4), Kill.at("commit", step=2), Kill.at("publish")]) == [2, 8, 8]


def test_two_ranks_one_of_which_is_killed_end_and_go_on(wholes: Wholes, tmp_path: Path) -> None:
    job, whole = wholes("pretrain", 2)
    run = Run(job, 2, tmp_path / "run")
    kills = [Kill.at("shard", step=2, rank=1), Kill.at("commit", step=4, rank=0), Kill.at("evaluation", step=8, rank=1)]
    assert survived(run, whole, kills) in ([0, 2, 4], [0, 2, 6])  # step 6 may still be being written


def test_four_ranks_one_of_which_is_killed_in_a_save_end_and_go_on(wholes: Wholes, tmp_path: Path) -> None:
    job, whole = wholes("pretrain", 4)
    assert survived(Run(job, 4, tmp_path / "run"), whole, [Kill.at("shard", step=4, rank=3)]) == [2]


def test_a_run_killed_while_it_claims_its_directory_can_be_started_again(
    wholes: Wholes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before resolved.yaml, the first file there, has its name."""
    job, whole = wholes("pretrain", 1)
    run = Run(job, 1, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert run.start().was_killed
    (left,) = run.output.iterdir()
    assert left.suffix == ".tmp"
    assert survived(run, whole, []) == []


def test_the_storm_at_a_small_size_and_each_file_of_an_assembly(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        kill_storm.main(["--small"])
    text = capsys.readouterr().out
    assert ended.value.code == 0, text
    (assembled,) = re.findall(r"^\| 1 \| assemble \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    assert assembled == ("5", "5")  # the trunk, three experts, and before all of it has its name
    assert re.search(r"^\| all \|  \| 9 \| .* \| 0 \|$", text, re.MULTILINE)
