"""How many starts of a job were in vain; no Slurm is needed for that."""

import errno
import os
from pathlib import Path

import pytest

from flexpert.checkpoint.envelope import set_aside, step_path
from flexpert.errors import UserError
from flexpert.launch import restarts
from flexpert.launch.restarts import check_restarts, in_vain


def save(run: Path, step: int) -> None:
    step_path(run / "checkpoints", step).mkdir(parents=True)


def test_without_a_checkpoint_every_start_counts_and_nothing_is_written(tmp_path: Path) -> None:
    assert [in_vain(tmp_path / "run", "7", number) for number in range(4)] == [0, 1, 2, 3]
    assert not list(tmp_path.iterdir())


def test_a_new_step_begins_the_count_anew(tmp_path: Path) -> None:
    """Asked before each start, and before the job is requeued after it."""
    counts = []
    for number, step in enumerate([None, 2, None, None, 4, None]):
        before = in_vain(tmp_path, "7", number)
        if step is not None:
            save(tmp_path, step)
        counts.append((before, in_vain(tmp_path, "7", number + 1)))
    assert counts == [(0, 1), (1, 0), (0, 1), (1, 2), (2, 0), (0, 1)]


def test_steps_of_another_job_are_not_this_ones(tmp_path: Path) -> None:
    save(tmp_path, 2)
    assert [in_vain(tmp_path, "7", number) for number in range(3)] == [0, 1, 2]
    assert [in_vain(tmp_path, "8", number) for number in range(3)] == [0, 1, 2]


def test_a_step_of_the_calibration_is_one(tmp_path: Path) -> None:
    save(tmp_path, 2)
    assert [in_vain(tmp_path, "7", number) for number in range(3)] == [0, 1, 2]
    save(tmp_path / "calibration", 1)
    assert [in_vain(tmp_path, "7", number) for number in (3, 4)] == [0, 1]


def test_the_step_before_a_damaged_one_is_no_new_one(tmp_path: Path) -> None:
    save(tmp_path, 2), save(tmp_path, 4)
    assert [in_vain(tmp_path, "7", number) for number in range(2)] == [0, 1]
    set_aside(tmp_path / "checkpoints", 4)
    assert in_vain(tmp_path, "7", 2) == 2


def test_a_full_disk_ends_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(restarts, "write_atomic", full)
    save(tmp_path, 2)
    assert in_vain(tmp_path, "7", 5) == 0


def test_the_third_start_in_vain_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    words = ["data.documents=x", "tokenizer=x", f"output_dir={tmp_path}/data"]
    check_restarts(2, "prepare", words)
    with pytest.raises(UserError, match=f"3 starts of this job in a row made no new checkpoint in {tmp_path}/data"):
        check_restarts(3, "prepare", words)
