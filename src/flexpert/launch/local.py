"""Stages as processes on this machine, side by side where the graph allows."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from flexpert.config.groups import LauncherConfig
from flexpert.launch.graph import Node
from flexpert.launch.walk import Ended


@dataclass
class Job:
    """Attributes: node; its process and log; where in the log its output begins, bytes; start, `time.monotonic`."""

    node: Node
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    log_start: int
    started: float

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

    def start(self, node: Node) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        cores = len(os.sched_getaffinity(0))
        shared = self.config.threads_per_job or max(1, cores // self.config.max_jobs)
        threads = str(cores if node.alone else shared)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
        log = open(self.logs / f"{node.name.replace('/', '.')}.log", "ab")  # noqa: SIM115 (closed when the job ends)
        log.write(f"--- {node.name}: started {datetime.now().astimezone().isoformat(timespec='seconds')}\n".encode())
        log.flush()
        log_start = log.tell()  # before the child, which shares this position, writes
        command = [sys.executable, "-m", "flexpert", node.stage, *node.overrides]
        # A session of its own: Ctrl-C reaches this process alone, which then stops the stages in order.
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.jobs.append(Job(node, process, log, log_start, time.monotonic()))

    def poll(self) -> list[Ended]:
        over = [job for job in self.jobs if job.process.poll() is not None]
        self.jobs = [job for job in self.jobs if job not in over]
        return [job.end() for job in over]

    def stop(self) -> list[Ended]:
        """Ask every stage to end; interrupted again, end them at once."""
        for job in self.jobs:
            job.process.terminate()
        try:
            for job in self.jobs:
                job.process.wait()
        except KeyboardInterrupt:
            for job in self.jobs:
                job.process.kill()
        over, self.jobs = self.jobs, []
        return [job.end() for job in over]
