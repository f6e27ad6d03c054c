"""What goes wrong outside of a run ends no training: a full or read-only disk, W&B, a clock that jumps.

`metrics.jsonl` has every row in the end. Disks, W&B and its process are real.
"""

import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy import SHAPE, train
from wandb_server import served

from flexpert.cli import main
from flexpert.config.groups import MonitorConfig
from flexpert.errors import UserError
from flexpert.monitor.jsonl import MetricsLog, read_metrics
from flexpert.monitor.wandb import WandbRun
from flexpert.testing import Fault, faults

pytestmark = pytest.mark.slow

#: What a row says of the machine, and not of the run.
OF_THE_MACHINE = {
    "step_seconds", "data_seconds", "compute_seconds", "optimizer_seconds", "tokens_per_second", "peak_memory_bytes",
    "mfu",
}  # fmt: skip
KEY = "5ec2e7" * 6 + "abcd"

# Disks


def call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextlib.contextmanager
def disk(folder: Path, kind: str, backing: str = "64m", block: int = 1024) -> Iterator[Path]:
    """A file system of 4 MiB, `kind` ext2 or ext4, in a file on a tmpfs of `backing`; the test is skipped without.

    `block` bytes are given to a file at once. Where that is a page of memory, a full disk takes a part of a row.
    """
    image, directory = folder / "backing", folder / "disk"
    image.mkdir(parents=True)
    directory.mkdir()
    with contextlib.ExitStack() as stack:
        try:
            call("mount", "-t", "tmpfs", "-o", f"size={backing}", "none", str(image))
            stack.callback(call, "umount", "--lazy", str(image))
            (image / "image").touch()
            os.truncate(image / "image", 4 << 20)
            call(f"mkfs.{kind}", "-q", "-F", "-m", "0", "-b", str(block), str(image / "image"))
            call("mount", "-o", "loop,errors=remount-ro", str(image / "image"), str(directory))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine lets us mount no disk of our own: {error}")
        stack.callback(lambda: subprocess.run(["umount", "--lazy", str(directory)], check=False))
        yield directory


def fill(directory: Path) -> Path:
    """Leave no room; returns the file that takes it."""
    path = directory / "filler"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(descriptor, bytes(1024))
    os.close(descriptor)
    return path


def row(step: int) -> dict[str, Any]:
    return {"step": step, "note": "a row that is longer than a third of a block " * 8}


def steps(path: Path) -> list[int]:
    """Of all rows, which are whole ones."""
    content = path.read_bytes()
    assert content == b"" or content.endswith(b"\n")
    assert all(found == row(found["step"]) for found in map(json.loads, content.splitlines()))
    return [found["step"] for found in read_metrics(path)]


def test_a_full_disk_holds_whole_rows_and_gets_the_others_when_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with disk(tmp_path, "ext2", block=4096) as directory:
        path = directory / "metrics.jsonl"
        log = MetricsLog(path, 0)
        log.write(row(1))
        filler = fill(directory)
        for step in range(2, 31):
            log.write(row(step))
        there = steps(path)
        assert there == list(range(1, len(there) + 1)) and len(there) < 30
        assert log.num_pending == 30 - len(there) and not log.sync()
        filler.unlink()
        assert log.sync() and log.num_pending == 0
        log.write(row(31))
        assert steps(path) == list(range(1, 32))
        log.close()
    assert capsys.readouterr().out.splitlines() == [
        f"note: {path} cannot be written (No space left on device): rows are kept in memory until it can",
        f"note: {path} can be written again, and has every row",
    ]


def test_rows_that_find_no_room_until_the_end_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with disk(tmp_path, "ext2") as directory:
        path = directory / "metrics.jsonl"
        log = MetricsLog(path, 0)
        fill(directory)
        for step in range(1, 9):
            log.write(row(step))
        log.close()
        lost = range(len(steps(path)) + 1, 9)
    told = f"note: {len(lost)} rows (steps {lost[0]} to 8) could not be written to {path} (No space left on device)"
    assert capsys.readouterr().out.splitlines()[1:] == [told]


def test_rows_that_the_disk_refuses_only_when_flushed_are_written_again(tmp_path: Path) -> None:
    """As on NFS, or here on a disk that is promised more room than there is."""
    with disk(tmp_path, "ext2", backing="1m") as directory:
        path = directory / "metrics.jsonl"
        log = MetricsLog(path, 0)
        log.write(row(1))
        assert log.sync()
        filler = fill(tmp_path / "backing")
        for step in range(2, 102):
            log.write(row(step))
        assert log.num_pending == 0  # as it seems
        assert not log.sync() and log.num_pending == 100
        log.write(row(102))
        filler.unlink()
        assert log.sync()
        log.close()
        call("umount", str(directory))  # nothing is left of what is not on the disk
        call("mount", "-o", "loop", str(tmp_path / "backing" / "image"), str(directory))
        assert steps(path) == list(range(1, 103))


def test_a_file_system_that_an_error_makes_read_only_gets_the_rows_when_it_is_repaired(tmp_path: Path) -> None:
    with disk(tmp_path, "ext4") as directory:
        path = directory / "metrics.jsonl"
        log = MetricsLog(path, 0)
        log.write(row(1))
        assert log.sync()
        log.write(row(2))  # which the error costs
        device = Path(os.path.realpath(f"/sys/dev/block/{os.major(s := directory.stat().st_dev)}:{os.minor(s)}")).name
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("1")
        for step in range(3, 6):
            log.write(row(step))
        assert log.error is not None and log.error.errno == errno.EROFS and log.num_pending == 4
        call("umount", str(directory))
        log.write(row(6))
        assert log.num_pending == 5 and not path.exists()  # nothing is written below where the disk was
        subprocess.run(["fsck.ext4", "-y", str(tmp_path / "backing" / "image")], check=False, capture_output=True)
        call("mount", "-o", "loop", str(tmp_path / "backing" / "image"), str(directory))
        log.write(row(7))
        assert steps(path) == list(range(1, 8)) and log.num_pending == 0
        log.close()


def test_a_run_that_resumes_where_nothing_can_be_written_drops_and_adds_its_rows_later(tmp_path: Path) -> None:
    with disk(tmp_path, "ext2") as directory:
        path = directory / "metrics.jsonl"
        before = "".join(json.dumps(row(step)) + "\n" for step in range(1, 9)) + '{"step": 9, "no'
        path.write_text(before)
        call("mount", "-o", "remount,ro", str(directory))
        log = MetricsLog(path, 5)
        log.write(row(6))
        assert log.num_pending == 1 and path.read_text() == before
        call("mount", "-o", "remount,rw", str(directory))
        log.write(row(7))
        assert steps(path) == list(range(1, 8))
        log.close()


def test_no_run_starts_where_nothing_can_be_written(
    road: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with disk(tmp_path, "ext2") as directory:
        call("mount", "-o", "remount,ro", str(directory))
        with pytest.raises(SystemExit) as ended:
            main(["pretrain", f"data.dir={road}/data/public", "train.steps=1", f"output_dir={directory}/run"])
        assert ended.value.code == 2
        why = f"the file system of {directory} is read-only"
        assert capsys.readouterr().err == f"flexpert: output_dir={directory}/run cannot be written: {why}\n"


def test_a_run_resumes_on_a_full_disk(tmp_path: Path) -> None:
    with disk(tmp_path, "ext2") as directory:
        path = directory / "metrics.jsonl"
        path.write_text("".join(json.dumps(row(step)) + "\n" for step in range(1, 9)) + '{"step": 9, "no')
        fill(directory)
        log = MetricsLog(path, 5)
        for step in (6, 7, 8):
            log.write(row(step))
        assert steps(path) == list(range(1, 9))
        log.close()
        assert sorted(file.name for file in directory.iterdir()) == ["filler", "lost+found", "metrics.jsonl"]


# Toy trainings


def pretrain(road: Path, output: Path, *overrides: str) -> None:
    train("pretrain", *SHAPE, f"data.dir={road}/data/public", f"output_dir={output}", *overrides)


def result(output: Path) -> tuple[list[dict[str, Any]], bytes]:
    """The rows, but for the machine's part, and the model."""
    found = read_metrics(metrics(output))
    rows = [{key: value for key, value in row.items() if key not in OF_THE_MACHINE} for row in found]
    return rows, (output / "model/model.safetensors").read_bytes()


def metrics(output: Path) -> Path:
    return output / "metrics.jsonl"


@pytest.fixture(scope="module")
def undisturbed(road: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    pretrain(road, output)
    return result(output)


@pytest.mark.usefixtures("no_key")
@pytest.mark.parametrize("wandb", ["off", pytest.param("offline", marks=pytest.mark.slow)])
def test_training_on_a_disk_that_is_full_for_some_steps_loses_no_row(
    wandb: str, road: Path, undisturbed: tuple[list[dict[str, Any]], bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write, pending = MetricsLog.write, list[int]()
    with disk(tmp_path, "ext2") as directory:

        def fills_and_frees(self: MetricsLog, row: dict[str, Any]) -> None:
            if row["step"] == 2:
                fill(directory)
            if row["step"] == 6:
                (directory / "filler").unlink()
            write(self, row)
            pending.append(self.num_pending)

        monkeypatch.setattr(MetricsLog, "write", fills_and_frees)
        pretrain(road, directory / "run", "checkpoint.interval=6", f"monitor.wandb={wandb}")
        assert result(directory / "run") == undisturbed
    assert pending[4] > 0 and pending[5] == 0
    assert capsys.readouterr().out.count("metrics.jsonl can") == 2


@pytest.mark.parametrize("action", ["full", "readonly"])
def test_rows_of_any_steps_that_cannot_be_written_are_written_later(
    action: str, road: Path, undisturbed: tuple[list[dict[str, Any]], bytes], tmp_path: Path
) -> None:
    with faults(Fault(action, "log", step=1), Fault(action, "log", step=3, times=2), Fault(action, "log", step=6)):
        pretrain(road, tmp_path / "run")
    assert result(tmp_path / "run") == undisturbed


def test_a_clock_that_runs_backwards_changes_nothing(
    road: Path, undisturbed: tuple[list[dict[str, Any]], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()

    def jump() -> float:
        nonlocal now
        now -= 3600
        return now

    monkeypatch.setattr(time, "time", jump)
    pretrain(road, tmp_path / "run")
    assert result(tmp_path / "run") == undisturbed
    assert all(0 < row["step_seconds"] < 60 for row in read_metrics(metrics(tmp_path / "run")))


# W&B


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever this machine is logged in to."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_SERVICE", "WANDB_ERROR_REPORTING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def services(parent: int) -> list[int]:
    """W&B's processes that a process has started; a dead one has no command line."""
    children = [c for path in Path(f"/proc/{parent}/task").glob("*/children") for c in path.read_text().split()]
    return [int(child) for child in children if b"wandb-core" in Path(f"/proc/{child}/cmdline").read_bytes()]


def online(monkeypatch: pytest.MonkeyPatch, address: str, key: str = KEY) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", key)


@pytest.mark.usefixtures("no_key")
def test_training_goes_on_without_wandb_when_its_process_is_killed(
    road: Path, undisturbed: tuple[list[dict[str, Any]], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write = MetricsLog.write

    def kills(self: MetricsLog, row: dict[str, Any]) -> None:
        write(self, row)
        if row["step"] == 3:
            (service,) = services(os.getpid())
            os.kill(service, signal.SIGKILL)
            time.sleep(0.2)

    monkeypatch.setattr(MetricsLog, "write", kills)
    pretrain(road, tmp_path / "run", "monitor.wandb=offline")
    assert result(tmp_path / "run") == undisturbed
    told = capfd.readouterr()
    assert told.err == ""
    unread = "[Errno 104] Connection reset by peer"  # rows were
    lost = unread if unread in told.out else "Connection lost"
    assert [line for line in told.out.splitlines() if "W&B" in line] == [
        f"note: W&B ended ({lost}): nothing more is sent, and metrics.jsonl has every row"
    ]


#: A process that has a run of W&B's and ends.
PROCESS = """
import os, signal, sys, time
from pathlib import Path
import wandb
from flexpert.config.groups import MonitorConfig
from flexpert.monitor import wandb as ours
ours.FINISH_SECONDS = 0.5 if sys.argv[2:] else 30.0
run = ours.WandbRun(MonitorConfig(), "offline", "expert", Path(sys.argv[1]), {"name": "math"})
run.log({"step": 1, "tokens": 100, "loss": 2.5})
for children in Path("/proc/self/task").glob("*/children"):
    for child in map(int, children.read_text().split()) if sys.argv[2:] else []:
        os.kill(child, getattr(signal, sys.argv[2]))
run.close()
"""


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROCESS, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.usefixtures("no_key")
@pytest.mark.parametrize("kind", ["SIGKILL", "SIGTERM", "SIGSTOP"])
def test_a_process_ends_as_ever_though_wandbs_does_not(kind: str, tmp_path: Path) -> None:
    """W&B's own end of the process waits for its service for ever, or prints a traceback."""
    done = run_process(str(tmp_path), kind)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert re.fullmatch(r"note: W&B (ended \(.*\)|did not finish within 0.5 s): nothing more is sent.*\n", done.stdout)


@pytest.mark.usefixtures("no_key")
@pytest.mark.parametrize("asked", ["a row", "the end"])
def test_wandb_whose_process_stands_still_is_waited_for_no_longer_than_said(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flexpert.monitor.wandb.FINISH_SECONDS", 0.5)
    run = WandbRun(MonitorConfig(), "offline", "expert", tmp_path, {"name": "math"})
    (service,) = services(os.getpid())
    os.kill(service, signal.SIGSTOP)
    started, step = time.monotonic(), 0
    while asked == "a row" and not run.is_left and time.monotonic() - started < 30:
        step += 1
        run.log({"step": step, "note": "long " * 1000})
    run.close()
    run.log({"step": step + 1})
    assert time.monotonic() - started < 20 and not run.thread.is_alive()
    what = "has not taken 1000 rows" if asked == "a row" else "did not finish within 0.5 s"
    told = f"note: W&B {what}: nothing more is sent, and metrics.jsonl has every row\n"
    assert capsys.readouterr() == (told, "")
    assert services(os.getpid()) == []


@pytest.mark.usefixtures("no_key")
def test_a_server_that_cannot_be_reached_makes_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flexpert.monitor.wandb.INIT_SECONDS", 5.0)
    online(monkeypatch, "http://127.0.0.1:1")
    run = WandbRun(MonitorConfig(), "online", "expert", tmp_path, {"name": "math"}, "0123456789abcdef")
    run.log({"step": 1, "tokens": 100, "loss": 2.5})
    run.close()
    told = capfd.readouterr()
    assert told.err == "" and len(told.out.splitlines()) == 1
    assert told.out.startswith("note: W&B: Failed to get resume status for run 0123456789abcdef: ")
    assert told.out.endswith(f": this run is recorded offline, and `flexpert sync run={tmp_path}` uploads it\n")
    (record,) = tmp_path.glob("wandb/offline-run-*-0123456789abcdef/run-0123456789abcdef.wandb")
    assert b"loss" in record.read_bytes()
    assert run.id == "0123456789abcdef"
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.usefixtures("no_key")
@pytest.mark.parametrize("stays", [True, False])
def test_a_server_that_is_cut_off_during_a_run_holds_nothing_up(
    stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if not stays:
        monkeypatch.setattr("flexpert.monitor.wandb.FINISH_SECONDS", 2.0)
    with served() as server:
        online(monkeypatch, server.address)
        run = WandbRun(MonitorConfig(), "online", "expert", tmp_path, {"name": "math"})
        run.log({"step": 1, "tokens": 100, "loss": 2.5})
        if stays:
            run.close()
    if not stays:
        run.log({"step": 2, "tokens": 200, "loss": 2.5})
        started = time.monotonic()
        run.close()
        assert time.monotonic() - started < 20
    told = "note: W&B did not finish within 2 s: nothing more is sent, and metrics.jsonl has every row\n"
    assert capfd.readouterr() == ("" if stays else told, "")
    assert services(os.getpid()) == []


@pytest.mark.usefixtures("no_key")
def test_a_key_that_is_refused_or_malformed_is_the_users_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with served(accepts=False) as server:
        for at, key, reason in (
            (server.address, KEY, "returned error 401"),
            ("http://127.0.0.1:1", "not-a-key!", "invalid"),
        ):
            online(monkeypatch, at, key)
            with pytest.raises(UserError, match=f"W&B: .*{reason}") as caught:
                WandbRun(MonitorConfig(), "online", "expert", tmp_path, {"name": "math"})
            assert key not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("no_key")
def test_an_offline_run_contacts_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left alone, W&B's client sends reports about itself when its process ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        done = run_process(str(tmp_path))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"loss" in record.read_bytes()
