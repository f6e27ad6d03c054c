"""Disks that become full: older steps go first, a save that fails leaves nothing behind, and the run goes on."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import run_ranks
from saved import KEY, Trained, assert_carries, blank, carried, save, tiny, update
from toy import SHAPE, train, with_toy

from flexpert.checkpoint import envelope
from flexpert.checkpoint.distributed import Saver, load
from flexpert.config.groups import CheckpointConfig
from flexpert.errors import UserError
from flexpert.monitor.jsonl import read_metrics
from flexpert.parallel.environment import is_first
from flexpert.signals import REQUEUE
from flexpert.testing import VARIABLE, Fault, faults

pytestmark = pytest.mark.slow

PAGE = 4096

Disk = Callable[[float], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """`disk(bytes)`: a file system of that size."""
    path = tmp_path / "disk"

    def mount(num_bytes: float) -> Path:
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes:.0f}", "tmpfs", path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        return path

    yield mount
    subprocess.run(["umount", path], capture_output=True, check=False)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def used(directory: Path) -> int:
    """Bytes of the files of a directory, in whole pages."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in directory.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def step_bytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Of a checkpoint of the tiny model."""
    path = tmp_path_factory.mktemp("size")
    assert save(Saver(path, envelope.open_key(path), CheckpointConfig(keep=1)), 1, tiny()) is None
    return used(path / "step-000000001")


def test_older_steps_make_room_and_the_newest_is_whole(disk: Disk, step_bytes: int) -> None:
    path, trained = disk(2.5 * step_bytes), tiny()
    key = envelope.open_key(path)
    saver = Saver(path, key, CheckpointConfig(keep=10))
    for step in range(1, 6):
        update(trained, step)
        assert save(saver, step, trained) is None
        assert envelope.steps(path) == [s for s in (step - 1, step) if s]
    wanted = carried(trained)
    blank(trained)
    record = load(path, key, *trained)
    assert record is not None and record["step"] == 5
    assert_carries(trained, wanted)


def assert_goes_on(path: Path, saver: Saver, key: bytes, trained: Trained, failure: OSError | None) -> None:
    """A save failed after step 1, of which nothing is left but that."""
    assert failure is not None
    assert names(path) == [KEY, "step-000000001"]
    saved = carried(trained)
    assert save(saver, 3, trained) is None
    blank(trained)
    record = load(path, key, *trained)
    assert record is not None and record["step"] == 3
    found = carried(trained)
    assert all((found[name] == saved[name]).all() for name in saved if name != "random")


def test_where_only_the_newest_is_left_a_save_fails_and_leaves_nothing(disk: Disk, step_bytes: int) -> None:
    path, trained = disk(2.3 * step_bytes), tiny()
    ballast = path / "ballast"
    ballast.write_bytes(bytes(int(0.7 * step_bytes)))
    run = path / "checkpoints"
    key = envelope.open_key(run)
    saver = Saver(run, key, CheckpointConfig(keep=10))
    update(trained, 1)
    assert save(saver, 1, trained) is None
    update(trained, 2)
    failure = save(saver, 2, trained)
    assert failure is not None and failure.errno == errno.ENOSPC
    ballast.unlink()
    assert_goes_on(run, saver, key, trained, failure)


def on_ranks(path: Path) -> tuple[OSError | None, OSError | None]:
    """What two saves of two ranks come to, of which the second finds no room."""
    trained = tiny()
    saver = Saver(path, envelope.open_key(path) if is_first() else b"", CheckpointConfig(keep=10))
    return save(saver, 1, trained), save(saver, 2, trained)


def test_all_ranks_learn_that_there_was_no_room(disk: Disk, step_bytes: int) -> None:
    path = disk(1.6 * step_bytes)
    failures = []
    for first, second in run_ranks(on_ranks, 2, path):
        assert first is None and second is not None and second.errno == errno.ENOSPC
        failures.append(str(second))
    assert len(set(failures)) == 1
    assert names(path) == [KEY, "step-000000001"]


def test_where_a_quota_is_reached_older_steps_go_for_the_next_save(tmp_path: Path) -> None:
    """The file system says that there is room; all but the newest and those that shall stay are deleted afterwards."""
    trained, saver = tiny(), Saver(tmp_path, envelope.open_key(tmp_path), CheckpointConfig(keep=10, keep_every=2))
    for step in range(1, 6):
        assert save(saver, step, trained) is None
    with faults(Fault("full", "shard")):
        assert save(saver, 6, trained) is not None
    assert names(tmp_path) == [KEY, *(f"step-{step:09d}" for step in (2, 4, 5))]
    assert save(saver, 7, trained) is None


@pytest.mark.parametrize("phase", ["shard", "manifest", "commit"])
@pytest.mark.parametrize("action", ["full", "readonly"])
def test_a_save_that_fails_anywhere_leaves_nothing(action: str, phase: str, tmp_path: Path) -> None:
    trained, key = tiny(), envelope.open_key(tmp_path)
    saver = Saver(tmp_path, key, CheckpointConfig(keep=10))
    assert save(saver, 1, trained) is None
    update(trained, 1)
    with faults(Fault(action, phase)):
        failure = save(saver, 2, trained)
    assert failure is not None and failure.errno == {"full": errno.ENOSPC, "readonly": errno.EROFS}[action]
    assert_goes_on(tmp_path, saver, key, trained, failure)


def test_room_is_what_is_free_and_what_older_steps_hold(disk: Disk) -> None:
    path = disk(10 * PAGE)
    for step in (1, 2, 3):
        envelope.step_path(path, step).mkdir()
        (envelope.step_path(path, step) / "__0_0.distcp").write_bytes(bytes(2 * PAGE))
    envelope.check_room(path, 8 * PAGE)  # four are free
    with pytest.raises(UserError, match="make room, or choose an output_dir on another file system") as caught:
        envelope.check_room(path, 8 * PAGE + 1)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    envelope.check_room(path, 6 * PAGE, every=2)
    with pytest.raises(UserError):
        envelope.check_room(path, 6 * PAGE + 1, every=2)  # step 2 stays
    envelope.make_room(path, 4 * PAGE)
    envelope.make_room(path, 100 * PAGE, every=1)
    assert envelope.steps(path) == [1, 2, 3]
    envelope.make_room(path, 5 * PAGE)
    assert envelope.steps(path) == [2, 3]
    envelope.make_room(path, 100 * PAGE)
    assert names(path) == ["step-000000003"]


def test_a_run_goes_on_without_a_checkpoint_and_ends_cleanly_without_the_last(
    road: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 2, 4 and 6 are to be saved, and only one has room: when there is more, the run goes on from it."""
    size = used(road / "public/checkpoints/step-000000002")
    path = disk(5 * size)
    ballast = path / "ballast"
    ballast.write_bytes(bytes(int(3.4 * size)))
    overrides = [*SHAPE, f"data.dir={road}/data/public", f"output_dir={path}/run"]
    with pytest.raises(UserError) as caught:
        train("pretrain", *overrides)
    assert "step 6 could not be saved: No space left on device" in str(caught.value) and "\n" not in str(caught.value)
    assert "warning: step 4 could not be saved: No space left on device" in capsys.readouterr().out
    assert [name for name in names(path / "run/checkpoints") if name != KEY] == ["step-000000002"]
    assert [row["step"] for row in read_metrics(path / "run/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    ballast.unlink()
    train("pretrain", *overrides)
    assert "from step 2" in capsys.readouterr().out
    for file in (road / "public/model").iterdir():
        assert (path / "run/model" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_run_whose_first_checkpoint_has_no_room_does_not_begin(road: Path, disk: Disk) -> None:
    size = used(road / "public/checkpoints/step-000000002")
    path = disk(size)
    (path / "ballast").write_bytes(bytes(int(0.6 * size)))
    with pytest.raises(UserError, match="make room, or choose an output_dir on another file system") as caught:
        train("pretrain", *SHAPE, f"data.dir={road}/data/public", f"output_dir={path}/run")
    assert "\n" not in str(caught.value) and not (path / "run/metrics.jsonl").exists()


def test_a_run_goes_on_from_the_step_before_a_damaged_one(
    road: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(road / "public", run)
    shutil.rmtree(run / "model")

    def damage(step: int) -> None:
        shard = next(envelope.step_path(run / "checkpoints", step).glob("*.distcp"))
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)

    damage(6)
    overrides = [*SHAPE, f"data.dir={road}/data/public", f"output_dir={run}"]
    train("pretrain", *overrides)
    said = capsys.readouterr().out
    assert "step-000000006/__0_0.distcp was altered" in said and "from step 4" in said
    for file in (road / "public/model").iterdir():
        assert (run / "model" / file.name).read_bytes() == file.read_bytes(), file.name
    shutil.rmtree(run / "model")
    rows = (run / "metrics.jsonl").read_bytes()
    for step in (2, 4, 6):
        damage(step)
    for _ in range(2):
        with pytest.raises(UserError, match="choose another output_dir"):
            train("pretrain", *overrides)
    assert (run / "metrics.jsonl").read_bytes() == rows and not (run / "model").exists()


def command(road: Path, output: Path, *overrides: str) -> list[str]:
    words = with_toy(*SHAPE, f"data.dir={road}/data/public", f"output_dir={output}", *overrides)
    return [sys.executable, "-m", "flexpert", "pretrain", *words]


def test_a_run_that_is_told_to_stop_and_cannot_save_is_started_again_all_the_same(road: Path, tmp_path: Path) -> None:
    planted = [{"action": "TERM", "phase": "backward", "step": 3}, {"action": "full", "phase": "shard", "step": 3}]
    environment = os.environ | {VARIABLE: json.dumps(planted)}
    done = subprocess.run(command(road, tmp_path / "run"), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == REQUEUE, done.stderr
    assert "step 3 could not be saved: No space left on device" in done.stdout
    assert envelope.steps(tmp_path / "run/checkpoints") == [2]


def test_a_log_on_the_full_disk_ends_nothing(road: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        assert subprocess.run(command(road, tmp_path / "run"), stdout=full, stderr=full, check=False).returncode == 0
    assert (tmp_path / "run/model").is_dir()


def test_what_was_asked_for_is_not_lost_in_silence() -> None:
    """Of stages that do not train, the output is the result."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "flexpert", "--help"], stdout=full, stderr=full, check=False)
    assert done.returncode != 0
