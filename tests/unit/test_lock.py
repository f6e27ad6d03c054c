"""One process at a time in a directory, and the next one as soon as it is gone."""

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from toy import train

from flexpert import lock
from flexpert.config.compose import compose
from flexpert.launch.pipeline import run
from flexpert.lock import exclusive

pytestmark = pytest.mark.slow

Refused = Callable[..., AbstractContextManager[None]]
HOLDER = """
import sys
from pathlib import Path
from flexpert import lock
lock.BEAT = 0.05
with lock.exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""
#: A machine where NFS is mounted with `nolock`: its locks keep nobody else out, nor others it.
ELSEWHERE = "import fcntl, socket; fcntl.flock = lambda *_: None; socket.gethostname = lambda: 'elsewhere'" + HOLDER


def start(program: str, directory: Path) -> subprocess.Popen[str]:
    """A process that holds the directory, until it is given a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@contextmanager
def held(directory: Path, program: str = HOLDER) -> Iterator[subprocess.Popen[str]]:
    """While a process holds the directory; it ends with SIGKILL."""
    with start(program, directory) as process:
        try:
            yield process
        finally:
            process.kill()


def state(directory: Path) -> str:
    found = lock.read(directory)
    assert found is not None
    return found.state


def beats(directory: Path) -> int:
    """Of who holds it; -1 before its first."""
    found = lock.read(directory)
    return -1 if found is None else int(found.state.removeprefix("beat "))


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the time."""
    monkeypatch.setattr(lock, "BEAT", 0.3)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(lock, "watch")


def test_a_directory_in_use_is_refused_until_its_process_is_gone(
    tmp_path: Path, refused: Refused, no_waiting: None
) -> None:
    with (
        held(tmp_path) as process,
        refused(f"{tmp_path} is in use by another process (pid {process.pid} on host {socket.gethostname()}): wait"),
        exclusive(tmp_path),
    ):
        pass
    for _ in range(2):
        with exclusive(tmp_path):
            assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_another_machine_that_still_counts_keeps_the_directory(
    tmp_path: Path, refused: Refused, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 100)
    with held(tmp_path, ELSEWHERE) as process:
        who = f"another process (pid {process.pid} on host elsewhere)"
        with refused(f"{tmp_path} is in use by {who}: wait for it, or choose another output_dir"), exclusive(tmp_path):
            pass
        before = lock.read(tmp_path)
        until(lambda: lock.read(tmp_path) != before)
        assert process.poll() is None and before is not None and before.host == "elsewhere"
    assert capsys.readouterr().out == (
        f"{tmp_path} was not released by {who}: waiting 30 s to see whether it still runs\n"
    )


def test_what_a_dead_process_of_another_machine_held_is_taken_over(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(tmp_path, ELSEWHERE):
        pass
    started = time.monotonic()
    with exclusive(tmp_path):
        assert time.monotonic() - started >= lock.BEAT * lock.PATIENCE
        found = lock.read(tmp_path)
        assert found is not None and found.holder == f"pid {os.getpid()} on host {socket.gethostname()}"
    assert capsys.readouterr().out.endswith(f"note: that process gives no sign of life: {tmp_path} is taken over\n")


def test_of_two_that_wait_for_a_dead_process_the_second_sees_the_first(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(tmp_path, ELSEWHERE):
        pass
    command, sleep = [sys.executable, "-c", ELSEWHERE.replace("elsewhere", "third"), str(tmp_path)], time.sleep
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def until_it_holds(seconds: float) -> None:
            assert process.stdout is not None and "held\n" in iter(process.stdout.readline, "")
            monkeypatch.setattr(time, "sleep", sleep)

        monkeypatch.setattr(time, "sleep", until_it_holds)
        with refused(f"{tmp_path} is in use by another process (pid ", " on host third)"), exclusive(tmp_path):
            pass
        assert "on host elsewhere" in capsys.readouterr().out


def test_what_another_machine_released_is_free_at_once(tmp_path: Path, no_waiting: None) -> None:
    with start(ELSEWHERE, tmp_path) as process:
        process.communicate("go on\n")
    assert process.returncode == 0 and state(tmp_path) == "released"
    with exclusive(tmp_path):
        pass


def test_a_release_ends_the_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 1.0)
    monkeypatch.setattr(lock, "PATIENCE", 60)
    with start(ELSEWHERE.replace("0.05", "60.0"), tmp_path) as process:
        started = time.monotonic()
        threading.Timer(0.3, process.communicate, ["go on\n"]).start()
        with exclusive(tmp_path):
            assert time.monotonic() - started < lock.BEAT * lock.PATIENCE


def test_a_record_without_a_heartbeat_as_older_versions_left_it_is_no_reason_to_wait(
    tmp_path: Path, no_waiting: None
) -> None:
    (tmp_path / ".lock").write_text("pid 12 on host elsewhere")
    with exclusive(tmp_path):
        assert state(tmp_path) == "beat 0"


def test_the_record_is_whole_whenever_it_is_read(tmp_path: Path) -> None:
    seen = set()
    with held(tmp_path, HOLDER.replace("0.05", "0.0001")):
        deadline = time.monotonic() + 60
        while len(seen) <= 10:
            assert time.monotonic() < deadline
            text = (tmp_path / ".lock").read_bytes()
            assert len(text) == lock.LENGTH and lock.RECORD.fullmatch(text.decode())
            seen.add(text)


def test_where_nothing_can_be_written_the_lock_holds_and_the_heartbeat_comes_back(
    tmp_path: Path, refused: Refused
) -> None:
    """A limit on the size of files stands for a full disk: `pwrite` fails all the same."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({}, -1))"
    program = limit.format(0) + HOLDER + f"    {limit.format(-1)}; sys.stdin.readline()"
    with held(tmp_path, program) as process:
        with refused(f"{tmp_path} is in use by another process: wait for it"), exclusive(tmp_path):
            pass
        time.sleep(0.2)
        assert (tmp_path / ".lock").read_bytes() == b""
        assert process.stdin is not None
        process.stdin.write("there is room again\n")
        process.stdin.flush()
        until(lambda: (tmp_path / ".lock").stat().st_size > 0 and int(state(tmp_path).split()[1]) > 2)


def test_the_heartbeat_does_not_keep_a_process_alive(tmp_path: Path) -> None:
    program = "import atexit, os, sys\nfrom pathlib import Path\nfrom flexpert.lock import exclusive\n" + (
        "holding = exclusive(Path(sys.argv[1])); holding.__enter__(); atexit.register(os._exit, 7)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=60)
    assert done.returncode == 7


def test_a_forked_process_holds_a_directory_of_its_own_while_its_parent_holds_another(
    tmp_path: Path, refused: Refused, quick: None
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()

    def hold() -> None:
        with exclusive(theirs):
            time.sleep(60)

    with exclusive(ours):
        process = multiprocessing.get_context("fork").Process(target=hold, daemon=True)
        process.start()
        until(lambda: beats(theirs) >= 2)
        with refused(f"{theirs} is in use by another process (pid {process.pid} on host "), exclusive(theirs):
            pass
        before = beats(ours)
        until(lambda: beats(ours) > before)
        process.kill()
        process.join()
    with exclusive(ours), exclusive(theirs):
        pass
    assert state(ours) == state(theirs) == "released"


def test_a_second_training_in_a_directory_is_refused_and_changes_nothing(
    expert_overrides: list[str], tmp_path: Path, refused: Refused
) -> None:
    overrides = [*expert_overrides, "router.calibration_steps=2", f"output_dir={tmp_path}/run"]
    train("expert", *overrides)
    shutil.rmtree(tmp_path / "run/contribution")
    for directory in (tmp_path / "run", tmp_path / "run/calibration"):
        metrics = (directory / "metrics.jsonl").stat()
        with exclusive(directory), refused(f"{directory} is in use"):
            train("expert", *overrides)
        assert (directory / "metrics.jsonl").stat() == metrics
    train("expert", *overrides)
    assert {path.name for path in (tmp_path / "run/contribution").iterdir()} == {
        "contribution.json",
        "expert.safetensors",
    }


def test_a_second_pipeline_in_a_directory_is_refused_and_changes_nothing(tmp_path: Path, refused: Refused) -> None:
    with held(tmp_path) as process, refused(f"{tmp_path} is in use by another process (pid {process.pid}"):
        run(*compose("pipeline", ["pipeline=smoke", f"output_dir={tmp_path}"]))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
