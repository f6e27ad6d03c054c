"""Copies of a base on a disk of the node: read in its place, shared, made anew where they are not whole, not needed."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import run_ranks
from toy import train

from flexpert.checkpoint import local_copy
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.checkpoint.local_copy import LocalCopy, read_locally
from flexpert.errors import UserError

CONTEXT = multiprocessing.get_context("fork")


def copy_of(model: Path, directory: Path) -> LocalCopy:
    return LocalCopy.of(model, ModelDirectory.open(model).files.values(), directory)


def folders_read(model: Path, directory: Path) -> set[Path]:
    """Where weights are read from, which are those of the model, to the byte."""
    opened = ModelDirectory.open(model)
    with read_locally(opened, str(directory)) as found:
        assert found.files.keys() == opened.files.keys() and found.path == model
        for name, file in found.files.items():
            assert file.read_bytes() == opened.files[name].read_bytes()
        return {file.parent for file in found.files.values()}


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def model(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in several files."""
    return make_base(tmp_path_factory.mktemp("shards") / "model", shard_size="30KB")


@pytest.fixture
def slow_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Each copied file takes 0.2 s and leaves a line in this file."""
    log, copy = tmp_path / "log", shutil.copyfile

    def slow(source: Path, target: Path) -> None:
        with log.open("a") as file:
            file.write(f"{source.name}\n")
        time.sleep(0.2)
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", slow)
    return log


def test_several_jobs_at_once_and_later_ones_share_one_copy(model: Path, tmp_path: Path, slow_copies: Path) -> None:
    """A job is a process here, forked with its log of copies."""

    def job() -> None:
        assert folders_read(model, tmp_path / "disk") == {copy_of(model, tmp_path / "disk").path}

    jobs = [CONTEXT.Process(target=job) for _ in range(4)]
    for process in jobs:
        process.start()
    for process in jobs:
        process.join()
    assert [process.exitcode for process in jobs] == [0] * 4
    job()
    files = {file.name for file in ModelDirectory.open(model).files.values()}
    assert sorted(slow_copies.read_text().split()) == sorted(files)


@pytest.mark.parametrize("damage", ["cut short", "deleted"])
def test_a_copy_that_is_not_whole_is_made_anew(damage: str, model: Path, tmp_path: Path) -> None:
    copy = copy_of(model, tmp_path)
    assert folders_read(model, tmp_path) == {copy.path}
    file = next(copy.path.iterdir())
    if damage == "deleted":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1)
    assert folders_read(model, tmp_path) == {copy.path}
    assert copy.is_whole()


def test_a_base_that_was_changed_has_another_copy_and_the_older_one_goes(base: Path, tmp_path: Path) -> None:
    before = copy_of(base, tmp_path / "disk")
    assert folders_read(base, tmp_path / "disk") == {before.path}
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert folders_read(base, tmp_path / "disk") != {before.path}
    assert len(contents(before.folder)) == 2  # with the lock


def test_a_copy_stays_while_it_is_read(base: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    before = copy_of(base, disk)
    with read_locally(ModelDirectory.open(base), str(disk)):
        os.utime(base / "model.safetensors", (0, 0))
        after = copy_of(base, disk)
        other = threading.Thread(target=after.make)
        other.start()
        other.join(timeout=0.5)
        assert other.is_alive() and before.is_whole()
    other.join(timeout=300)
    assert after.is_whole() and not before.path.exists()


def test_a_kill_leaves_no_copy_and_the_next_job_makes_one(model: Path, tmp_path: Path, slow_copies: Path) -> None:
    disk = tmp_path / "disk"
    copy = copy_of(model, disk)
    copyfile = shutil.copyfile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "copyfile", lambda *paths: (copyfile(*paths), time.sleep(60)))
        process = CONTEXT.Process(target=copy.make)
        process.start()
    deadline = time.monotonic() + 30
    while not slow_copies.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert contents(copy.folder) == {f"{copy.prefix}lock", f"{copy.prefix}partial"}
    assert folders_read(model, disk) == {copy.path}
    assert contents(copy.folder) == {f"{copy.prefix}lock", copy.path.name}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(bytes)`: a file system of that size."""
    path = tmp_path / "small"

    def mount(num_bytes: int) -> Path:
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        return path

    yield mount
    subprocess.run(["umount", str(path)], capture_output=True, check=False)


@pytest.mark.parametrize("found", ["before", "while copying"])
def test_where_there_is_no_room_the_base_is_read_and_nothing_is_left(
    found: str, model: Path, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    copy = copy_of(model, Path("nowhere"))
    disk = small_disk(sum(copy.sizes.values()) // 2)
    if found == "while copying":
        monkeypatch.setattr(local_copy, "SPARE_BYTES", -(1 << 40))
    assert folders_read(model, disk) == {model}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"note: {model} cannot be copied to {disk} on ")
    assert line.endswith(f" ({os.strerror(errno.ENOSPC)}): it is read where it is")
    assert contents(disk / copy.folder.name) == {f"{copy.prefix}lock"}


def test_another_users_folder_is_not_trusted(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It could hold other weights of the same size."""
    copy = copy_of(model, tmp_path)
    assert folders_read(model, tmp_path) == {copy.path}
    os.rename(copy.folder, tmp_path / "theirs")
    copy.folder.symlink_to("theirs")
    assert folders_read(model, tmp_path) == {model}
    assert f"({copy.folder} is another user's)" in capsys.readouterr().out
    if os.getuid() == 0:
        copy.folder.unlink()
        os.rename(tmp_path / "theirs", copy.folder)
        os.chown(copy.folder, 12345, -1)
        assert folders_read(model, tmp_path) == {model}


def on_two_nodes(base: Path, disks: Path) -> set[Path]:
    """Ranks 0 and 1 are on a node, rank 2 on another, whose disk cannot be written."""
    node, local = divmod(int(os.environ["RANK"]), 2)
    os.environ["LOCAL_RANK"] = str(local)
    return folders_read(base, disks / str(node))


def test_the_first_rank_of_each_node_copies_and_the_others_wait_for_it(
    model: Path, tmp_path: Path, slow_copies: Path
) -> None:
    (tmp_path / "1").write_text("no directory")
    copied = copy_of(model, tmp_path / "0")
    assert run_ranks(on_two_nodes, 3, model, tmp_path) == [{copied.path}, {copied.path}, {model}]
    assert len(slow_copies.read_text().split()) == len(copied.sizes)


@pytest.mark.slow
def test_an_expert_that_was_trained_from_a_copy_is_the_same_to_the_byte(
    expert_overrides: list[str], tmp_path: Path
) -> None:
    """And a bit that has changed in a copy, which no size tells, ends the stage before it has written anything."""
    disk = f"local_copy={tmp_path}/disk"
    train("expert", *expert_overrides, f"output_dir={tmp_path}/without")
    train("expert", *expert_overrides, f"output_dir={tmp_path}/with", disk)
    made, wanted = (tmp_path / name / "contribution" for name in ("with", "without"))
    assert contents(made) == contents(wanted)
    for name in contents(made):
        assert (made / name).read_bytes() == (wanted / name).read_bytes()
    assert expert_overrides[0].replace("=", ": ") in (tmp_path / "with/resolved.yaml").read_text()
    train("expert", *expert_overrides, f"output_dir={tmp_path}/without", disk)  # as any start again may say

    (weights,) = tmp_path.glob("disk/*/*/model.safetensors")
    with open(weights, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(UserError, match=f"a copy of .* in local_copy={tmp_path}/disk holds other weights: delete it"):
        train("expert", *expert_overrides, f"output_dir={tmp_path}/damaged", disk)
    assert not (tmp_path / "damaged").exists()
    with pytest.raises(UserError, match=r"local_copy=\$NO_SUCH/disk: .* has not set that variable"):
        train("expert", *expert_overrides, f"output_dir={tmp_path}/unset", "local_copy=$NO_SUCH/disk")
    assert not (tmp_path / "unset").exists()
