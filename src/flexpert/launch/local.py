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
from flexpert.signals import Stopped, interrupted

#: `expert DIRECTORY  step 40/200  …`, as training prints it, or `evaluate DIRECTORY  scoring …`.
PROGRESS = re.compile(r"^(\w+) .*  ((?:step|scoring) .*)\n", re.MULTILINE)
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


@dataclass
class Job:
    """Attributes: node; its process and log; where in the log its output begins, bytes; start, `time.monotonic`."""

    node: Node
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    log_start: int
    started: float

    def progress(self) -> str | None:
        """The newest line of progress in the log, without the directory; a part of the stage, `calibrate`, is named."""
        with open(self.log.name, "rb") as file:
            file.seek(max(self.log_start, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = PROGRESS.findall(file.read().decode("utf-8", errors="replace"))
        if not lines:
            return None
        part, state = lines[-1]
        return state if part == self.node.stage else f"{part} {state}"

    def end(self) -> Ended:
        self.log.close()
        output = Path(self.log.name).read_bytes()[self.log_start :]
        lines = output.decode("utf-8", errors="replace").strip().splitlines()
        reason = lines[-1].removeprefix("flexpert: ") if lines else "it printed nothing"
        return Ended(self.node, self.process.wait(), time.monotonic() - self.started, self.log.name, reason)


class LocalLauncher:
    """Runs nodes as `python -m flexpert STAGE …`; the output of all attempts is in `RUN/logs/NODE.log`."""

    def __init__(self, config: LauncherConfig, run: Path) -> None:
        self.config, self.logs = config, run / "logs"
        self.jobs: list[Job] = []

    def has_room(self, node: Node) -> bool:
        if node.alone or any(job.node.alone for job in self.jobs):
            return not self.jobs
        return len(self.jobs) < self.config.max_jobs

    def start(self, node: Node) -> str:
        self.logs.mkdir(parents=True, exist_ok=True)
        cores = len(os.sched_getaffinity(0))
        shared = self.config.threads_per_job or max(1, cores // self.config.max_jobs)
        threads = str(cores if node.alone else shared)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
        log = open(self.logs / f"{node.name.replace('/', '.')}.log", "ab")  # noqa: SIM115 (closed when the job ends)
        log.write(f"--- {node.name}: started {datetime.now().astimezone().isoformat(timespec='seconds')}\n".encode())
        log.flush()
        log_start = log.tell()  # before the child, which shares this position, writes
        # -P: no module of the directory that the user happens to be in.
        command = [sys.executable, "-P", "-m", "flexpert", node.stage, *node.overrides]
        # A session of its own: Ctrl-C reaches this process alone, which then stops the stages in order.
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True, preexec_fn=end_with_launcher
        )
        self.jobs.append(Job(node, process, log, log_start, time.monotonic()))
        return log.name

    def progress(self) -> dict[str, str]:
        lines = {job.node.name: job.progress() for job in self.jobs}
        return {name: line for name, line in lines.items() if line is not None}

    def poll(self) -> list[Ended]:
        over = [job for job in self.jobs if job.process.poll() is not None]
        self.jobs = [job for job in self.jobs if job not in over]
        return [job.end() for job in over]

    def stop(self) -> list[Ended]:
        """Ask every stage to end, and wait for its saving; at Ctrl-C, end them at once."""
        for job in self.jobs:
            job.process.terminate()
        while any(job.process.poll() is None for job in self.jobs):
            try:
                for job in self.jobs:
                    job.process.wait()
            except Stopped:
                for job in self.jobs if interrupted() else ():
                    job.process.kill()
        over, self.jobs = self.jobs, []
        return [job.end() for job in over]
