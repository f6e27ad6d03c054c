"""Stages as processes on this machine, side by side where the graph allows."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from flexpert.config.launcher import LauncherConfig
from flexpert.launch.graph import Node
from flexpert.launch.walk import Ended
from flexpert.parallel.environment import ADDRESS, LOCAL_RANK, NUM_RANKS, PORT, RANK, free_port
from flexpert.signals import LOST, Stopped, deferred, interrupted

#: How `srun --label` begins a line.
LABEL = re.compile(r"^ *\d+: ", re.MULTILINE)
#: What srun adds to what a stage has said by itself.
ADDED = re.compile(r"srun: (?:error: .*: Exited with exit code \d+|Force Terminated .*)")
#: `expert DIRECTORY  step 40/200  …`, as training prints it, or `evaluate DIRECTORY  scoring …`.
PROGRESS = re.compile(r"^(?: *\d+: )?(\w+) .*  ((?:step|scoring) .*)\n", re.MULTILINE)
#: From the end of a log, where the newest progress is looked for.
TAIL_BYTES = 4096

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)  # loaded here, not between fork and exec
LAUNCHER = os.getpid()


def end_with_launcher() -> None:
    """In the child, before it becomes the stage: have the kernel send SIGTERM when the launcher dies, also by SIGKILL.

    Between fork and exec only the forking thread is left, and a lock that another held stays locked for ever. The one
    other thread here, which beats for the directory, holds none; and this function makes system calls and nothing else.
    """
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != LAUNCHER:  # it died before the call
        os._exit(1)


def newest_progress(output: str, stage: str) -> str | None:
    """The newest line of progress, without the directory; a part of the stage, `calibrate`, is named."""
    lines = PROGRESS.findall(output)
    if not lines:
        return None
    part, state = lines[-1]
    return state if part == stage else f"{part} {state}"


def last_line(output: str) -> str:
    """What a stage that failed has said last."""
    lines = [LABEL.sub("", line) for line in output.splitlines() if ADDED.fullmatch(line) is None]
    lines = [line for line in lines if line.strip()]
    return lines[-1].removeprefix("flexpert: ") if lines else "it printed nothing"


@dataclass
class Job:
    """Attributes: node; its processes and log; where in the log its output begins, bytes; start, `time.monotonic`."""

    node: Node
    processes: list[subprocess.Popen[bytes]]
    log: IO[bytes]
    log_start: int
    started: float

    def progress(self) -> str | None:
        with open(self.log.name, "rb") as file:
            file.seek(max(self.log_start, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            return newest_progress(file.read().decode("utf-8", errors="replace"), self.node.stage)

    def is_over(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def end(self) -> Ended:
        self.log.close()
        output = Path(self.log.name).read_bytes()[self.log_start :].decode("utf-8", errors="replace")
        statuses = sorted({process.wait() for process in self.processes} - {0}, key=lambda status: status == LOST)
        status = statuses[0] if statuses else 0
        return Ended(self.node, status, time.monotonic() - self.started, self.log.name, last_line(output))


def ranks(number: int) -> list[dict[str, str]]:
    """What each of several processes finds in its environment, as torchrun would say it."""
    if number == 1:
        return [{}]
    common = {NUM_RANKS: str(number), ADDRESS: "127.0.0.1", PORT: str(free_port())}
    return [{**common, RANK: str(rank), LOCAL_RANK: str(rank)} for rank in range(number)]


class LocalLauncher:
    """Runs nodes as `python -m flexpert STAGE …`; the output of all attempts is in `RUN/logs/NODE.log`."""

    def __init__(self, config: LauncherConfig, run: Path) -> None:
        self.config, self.logs = config, run / "logs"
        self.jobs: list[Job] = []

    def has_room(self, node: Node) -> bool:
        if node.alone or any(job.node.alone for job in self.jobs):
            return not self.jobs
        return len(self.jobs) < (self.config.max_jobs or sys.maxsize)

    def start(self, node: Node) -> str:
        self.logs.mkdir(parents=True, exist_ok=True)
        cores = len(os.sched_getaffinity(0))
        shared = self.config.threads_per_job or max(1, cores // (self.config.max_jobs or cores))
        number = node.processes or 1
        threads = str(max(1, (cores if node.alone else shared) // number))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
        log = open(self.logs / f"{node.name.replace('/', '.')}.log", "ab")  # noqa: SIM115 (closed when the job ends)
        log.write(f"--- {node.name}: started {datetime.now().astimezone().isoformat(timespec='seconds')}\n".encode())
        log.flush()
        log_start = log.tell()  # before the child, which shares this position, writes
        # -P: no module of the directory that the user happens to be in.
        command = [sys.executable, "-P", "-m", "flexpert", node.stage, *node.overrides]
        # A session of its own: Ctrl-C reaches this process alone, which then stops the stages in order.
        with deferred():  # so that none is there that `stop` does not know
            processes = [
                subprocess.Popen(
                    command, stdout=log, stderr=log, env=environment | own,
                    start_new_session=True, preexec_fn=end_with_launcher,
                )
                for own in ranks(number)
            ]  # fmt: skip
            self.jobs.append(Job(node, processes, log, log_start, time.monotonic()))
        return log.name

    def progress(self) -> dict[str, str]:
        lines = {job.node.name: job.progress() for job in self.jobs}
        return {name: line for name, line in lines.items() if line is not None}

    def poll(self) -> list[Ended]:
        over = [job for job in self.jobs if job.is_over()]
        self.jobs = [job for job in self.jobs if job not in over]
        return [job.end() for job in over]

    def stop(self) -> list[Ended]:
        """Ask every stage to end, and wait for its saving; at Ctrl-C, end them at once."""
        processes = [process for job in self.jobs for process in job.processes]
        for process in processes:
            process.terminate()
        while any(process.poll() is None for process in processes):
            try:
                for process in processes:
                    process.wait()
            except Stopped:
                for process in processes if interrupted() else ():
                    process.kill()
        over, self.jobs = self.jobs, []
        return [job.end() for job in over]
