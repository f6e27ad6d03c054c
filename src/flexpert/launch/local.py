"""Start a graph's stages as processes on this machine, side by side where the graph allows."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from flexpert.config.groups import LauncherConfig
from flexpert.launch.graph import Node, Records

POLL_SECONDS = 0.1


class StageFailed(Exception):
    """A stage exited with an error; `status` is its exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Job:
    node: Node
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    started: float


class LocalLauncher:
    """Runs nodes as `python -m flexpert STAGE …`, with output in `RUN/logs/NODE.log`.

    A stage that fails stops nothing that does not need it; what needs it is not started.
    """

    def __init__(self, config: LauncherConfig, run: Path) -> None:
        self.config, self.run_directory = config, run
        self.records = Records(run)
        self.jobs: list[Job] = []
        self.failed: dict[str, StageFailed] = {}

    def run(self, nodes: list[Node]) -> None:
        """Bring every node to completion.

        Raises:
            UserError: a complete output belongs to another configuration.
            StageFailed: a stage failed; the others that could run have.
            KeyboardInterrupt: interrupted; running stages were stopped and will go on in the next run.
        """
        graph = {node.name: node for node in nodes}
        done: set[str] = set()
        waiting = list(nodes)
        previous = signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        try:
            while waiting or self.jobs:
                for job in [job for job in self.jobs if job.process.poll() is not None]:
                    self.finish(job, graph, done)
                for node in [node for node in waiting if done.issuperset(node.needs)]:
                    if self.records.is_complete(node, graph):
                        print(f"  {node.name}: complete", flush=True)
                        waiting.remove(node)
                        done.add(node.name)
                    elif self.has_room(node):
                        waiting.remove(node)
                        self.start(node)
                if not self.jobs and not any(done.issuperset(node.needs) for node in waiting):
                    break
                time.sleep(POLL_SECONDS)
        finally:
            self.stop()
            signal.signal(signal.SIGTERM, previous)
        if self.failed:
            raise next(iter(self.failed.values()))

    def has_room(self, node: Node) -> bool:
        if node.alone or any(job.node.alone for job in self.jobs):
            return not self.jobs
        return len(self.jobs) < self.config.max_jobs

    def start(self, node: Node) -> None:
        log_path = self.run_directory / "logs" / f"{node.name.replace('/', '.')}.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        cores = len(os.sched_getaffinity(0))
        shared = self.config.threads_per_job or max(1, cores // self.config.max_jobs)
        threads = str(cores if node.alone else shared)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
        log = open(log_path, "wb")  # noqa: SIM115 (closed when the job ends)
        command = [sys.executable, "-m", "flexpert", node.stage, *node.overrides]
        # A session of its own: Ctrl-C reaches this process alone, which then stops the stages in order.
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.jobs.append(Job(node, process, log, time.monotonic()))
        print(f"  {node.name}: started", flush=True)

    def finish(self, job: Job, graph: dict[str, Node], done: set[str]) -> None:
        self.jobs.remove(job)
        job.log.close()
        seconds = time.monotonic() - job.started
        if job.process.returncode == 0:
            self.records.write(job.node, graph)
            done.add(job.node.name)
            print(f"  {job.node.name}: done in {seconds:.0f} s", flush=True)
            return
        lines = Path(job.log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = lines[-1].removeprefix("flexpert: ") if lines else "it printed nothing"
        message = f"{job.node.name} failed (status {job.process.returncode}, log {job.log.name}): {reason}"
        self.failed[job.node.name] = StageFailed(message, job.process.returncode)
        print(f"  {message}", flush=True)

    def stop(self) -> None:
        """End what still runs."""
        for job in self.jobs:
            job.process.terminate()
        for job in self.jobs:
            job.process.wait()
            job.log.close()
        self.jobs.clear()
