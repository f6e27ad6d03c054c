"""`flexpert status`, `flexpert logs` and `flexpert cancel`: what became of a pipeline's stages, here or on Slurm.

Whether a stage is complete is in the run's own records, whether a job runs is Slurm's to say, and how it ended and how
far it is, both: records are kept by the jobs themselves, so that a cluster without accounting is enough.
"""

import contextlib
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from flexpert.checkpoint import envelope
from flexpert.config.launcher import CancelConfig, LogsConfig, StatusConfig
from flexpert.errors import UserError
from flexpert.launch import slurm
from flexpert.launch.graph import Node, Records, build_graph, lost, read_pipeline
from flexpert.launch.job import job_path, read_jobs, slurm_job
from flexpert.launch.local import TAIL_BYTES, last_line, newest_progress
from flexpert.lock import LOCK_NAME, exclusive, is_held
from flexpert.records import read_record, write_record
from flexpert.signals import REQUEUE

#: A training stage that runs says so every few seconds (lock.py). Seconds of silence from which on that is told.
SILENT = 60.0
#: How long a job may take to end after it is told to; Slurm's own limit, KillWait, is 30 s by default.
END_SECONDS = 90.0
POLL = 1.0
#: Seconds between two looks for more of a log that is followed, and between two looks whether its stage still runs.
FOLLOW, ASK = 0.5, 10.0

#: How a start of a stage begins in its log.
START = re.compile(r"^--- \S+: (?:started|job) .*\n", re.MULTILINE)

#: Slurm's reason to cancel a job whose dependency has failed.
NEVER = "DependencyNeverSatisfied"

#: States of a stage that nobody makes at the moment.
SETTLED = ("complete", "failed", "lost", "cancelled", "stopped", "not started")


@dataclass(frozen=True)
class Row:
    """Where a node stands.

    Attributes:
        node: whose.
        job: of Slurm's, or nothing.
        state: one of `SETTLED`; running; Slurm's own word.
        progress: `step 40/200  …`, of a stage that is under way or has ended early.
        checkpoint: step of the newest.
        reason: of a failure or of waiting.
    """

    node: Node
    job: str
    state: str
    progress: str = ""
    checkpoint: int | None = None
    reason: str = ""

    @property
    def has_failed(self) -> bool:
        return self.state in ("failed", "lost")


def run(config: StatusConfig, resolved: str) -> None:
    """Print a table; status 1 where a stage has failed."""
    path = Path(config.run)
    rows = Status(path).rows()
    # In a file or a pipe a row is one line. What stages have said is no markup of rich's.
    width = None if sys.stdout.isatty() else 10_000
    console = Console(highlight=False, markup=False, emoji=False, width=width)
    table = Table("stage", "job", "state", "progress", "checkpoint", "reason", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        checkpoint = "" if row.checkpoint is None else f"step {row.checkpoint:,}"
        table.add_row(row.node.name, row.job, row.state, row.progress, checkpoint, row.reason)
    if sys.stdout.isatty():
        console.print(table)
    else:  # nor has it blanks at its end
        with console.capture() as text:
            console.print(table)
        print("\n".join(line.rstrip() for line in text.get().splitlines()))
    if any(row.job and row.state == "lost" for row in rows) and not slurm.has_accounting():
        print("note: this cluster keeps no accounts: of jobs that it has forgotten only their own records are known")
    if all(row.state == "not started" for row in rows) and (path / "slurm").is_dir():
        print(f"note: nothing is submitted: {path / 'slurm'} has what would be")
    if any(row.has_failed for row in rows):
        sys.exit(1)


class Status:
    """Where the nodes of a run stand.

    Attributes:
        nodes: of the graph, by name.
        jobs: the record of the last job of each node that had one.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.records = path, Records(path)
        self.nodes = {node.name: node for node in read_graph(path)}
        self.jobs = read_jobs(path)

    def rows(self, *names: str) -> list[Row]:
        """Of these nodes, or of all."""
        wanted = names or tuple(self.nodes)
        # Of a run that is complete all is known where there is no Slurm, too.
        is_complete = all(self.is_made(node) for node in self.nodes.values())
        jobs = [slurm_job(self.jobs[name]) for name in wanted if name in self.jobs]
        states = slurm.states(jobs) if not is_complete else {}
        return [self.row(self.nodes[name], states) for name in wanted]

    def is_made(self, node: Node) -> bool:
        return self.records.path(node).exists() and node.output.exists()

    def row(self, node: Node, states: dict[str, slurm.State]) -> Row:
        record = self.jobs.get(node.name)
        job = str(record["job"]) if record is not None else ""
        state = states.get(job)
        checkpoint = max(envelope.steps(node.directory / "checkpoints"), default=None)
        output = newest_start(tail(self.log(node))[0])
        progress = newest_progress(output, node.stage) or ""
        ended = self.records.ended(node.name, job or None)
        if state is not None and state.is_alive:  # also where there is an older output, which is to be made anew
            is_running = state.name in ("RUNNING", "COMPLETING")
            reason = self.silence(node) if is_running else state.reason
            again = "" if is_running or ended is None else f"stopped with status {ended}, starts again; "
            if not is_running and ended is None:  # what has made progress is a job before it
                progress = ""
            return Row(node, job, state.name.lower(), progress, checkpoint, again + reason)
        if self.is_made(node):
            made_from = read_record(self.records.path(node), "flexpert.stage")["inputs"]
            left_out = [name for name in node.wants if name not in made_from]
            return Row(node, job, "complete", "", checkpoint, f"without {', '.join(left_out)}" if left_out else "")
        if record is not None and (record["cancelled"] or (state is not None and state.name == "CANCELLED")):
            reason = state.reason if state is not None and state.reason == NEVER else ""  # else, of having waited
            return Row(node, job, "cancelled", progress, checkpoint, reason)
        if ended is not None:
            what = "stopped" if ended == REQUEUE and not job else "failed"
            return Row(node, job, what, progress, checkpoint, f"status {ended}: {last_line(output)}")
        if record is None:
            if not self.records.begun(node).exists():
                return Row(node, "", "not started")
            return Row(node, "", "running" if is_held(self.path) else "stopped", progress, checkpoint)
        return self.unexplained(node, job, state, progress, checkpoint, output)

    def unexplained(
        self, node: Node, job: str, state: slurm.State | None, progress: str, checkpoint: int | None, output: str
    ) -> Row:
        """Of a job that has not recorded its end."""
        what = "forgotten by Slurm" if state is None else state.name
        log = self.log(node)
        if log.exists() and log.stat().st_mtime >= self.jobs[node.name]["submitted"]:  # else, of a job before it
            return Row(
                node, job, "lost" if state is None else "failed", progress, checkpoint, f"{what}: {last_line(output)}"
            )
        missing = [name for name in node.needs if not self.records.is_recorded(self.nodes[name])]
        if missing:
            return Row(node, job, "not started", reason=f"{what}; it needs {', '.join(missing)}")
        where = f" on {state.nodes}" if state is not None and state.nodes else ""
        reason = f"{what}{where} before its first line: do the nodes see {self.path.resolve()}?"
        return Row(node, job, "lost" if state is None else "failed", reason=reason)

    def log(self, node: Node) -> Path:
        record = self.jobs.get(node.name)
        return Path(record["log"]) if record else self.path / "logs" / f"{node.name.replace('/', '.')}.log"

    def silence(self, node: Node) -> str:
        """What is to be said of a running stage that shows no sign of life."""
        seen = []
        for path in (node.directory / LOCK_NAME, self.records.begun(node)):
            with contextlib.suppress(OSError):
                seen.append(path.stat().st_mtime)
        seconds = time.time() - max(seen, default=time.time())
        # Only a stage that trains has a lock to say so with.
        return f"silent for {seconds:.0f} s" if len(seen) == 2 and seconds > SILENT else ""

    def known(self, name: str, key: str) -> Node:
        if name not in self.nodes:
            alike = [node for node in self.nodes if name in (node.rpartition("/")[2], node.replace("/", "."))]
            meant = f"; did you mean {alike[0]}?" if alike else ""
            raise UserError(f"{key}={name} is not one of {', '.join(self.nodes)}{meant}")
        return self.nodes[name]


def read_graph(path: Path) -> list[Node]:
    """The nodes of the pipeline in a run directory, wherever it was when it was started."""
    config = read_pipeline(path)
    config.output_dir = str(path)
    return build_graph(config)


def tail(log: Path, size: int = TAIL_BYTES) -> tuple[str, int]:
    """The end of a file, from this many bytes on, and how long the file is; nothing of one that is not there."""
    try:
        with open(log, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            return file.read(min(size, end)).decode("utf-8", errors="replace"), end
    except OSError:
        return "", 0


def newest_start(output: str) -> str:
    """What the last start of a stage has printed."""
    return START.split(output)[-1]


def run_logs(config: LogsConfig, resolved: str) -> None:
    """Print the end of a stage's output and, with `follow`, the rest until the stage has ended."""
    status = Status(Path(config.run))
    if config.stage is None:
        for node in status.nodes.values():
            log = status.log(node)
            print(f"{node.name}: {log if log.exists() else 'nothing yet'}")
        return
    node = status.known(config.stage, "stage")
    log = status.log(node)
    if not log.exists() and not config.follow:
        raise UserError(f"{node.name} has printed nothing yet")
    size, (output, end) = TAIL_BYTES, tail(log)
    while output.count("\n") <= config.lines and size < end:
        size *= 4
        output, end = tail(log, size)
    if lines := output.splitlines()[-config.lines :]:
        print("\n".join(lines), flush=True)
    if config.follow:
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends this command, and no stage: nothing is to be said
        try:
            follow(config, node.name, log, end)
        finally:
            signal.signal(signal.SIGINT, before)


def follow(config: LogsConfig, name: str, log: Path, position: int) -> None:
    """Print what comes behind `position`, bytes, until nobody makes the node any more.

    Raises:
        UserError: it has ended without a line.
    """
    is_over, next_look = False, 0.0
    while True:
        with contextlib.suppress(FileNotFoundError), open(log, "rb") as file:
            file.seek(position)
            new = file.read()
            position += len(new)
            sys.stdout.buffer.write(new)
            sys.stdout.flush()
        if is_over and position == 0:
            raise UserError(f"{name} has printed nothing, and nobody makes it now: see `flexpert status`")
        if is_over:
            return
        if time.monotonic() >= next_look:
            with contextlib.suppress(slurm.SlurmError):  # a controller that is away for a while
                is_over = Status(Path(config.run)).rows(name)[0].state in SETTLED
            next_look = time.monotonic() + ASK
        if not is_over:
            time.sleep(FOLLOW)


def run_cancel(config: CancelConfig, resolved: str) -> None:
    """End jobs and wait until they have ended.

    Raises:
        UserError: a name that is not in the graph; a pipeline that is being submitted; jobs that have not ended after
            `END_SECONDS`.
    """
    path = Path(config.run)
    with exclusive(path):
        status = Status(path)
        # Without names all that there are, also of stages that the pipeline no longer has.
        names = [status.known(name, "stages").name for name in config.stages] or list(status.jobs)
        jobs = {slurm_job(record): name for name, record in status.jobs.items()}
        known = slurm.alive(jobs)
        alive = [job for job in known if jobs[job] in names]
        for job in alive:  # so that none asks to be started again
            write_record(job_path(path, jobs[job]), "flexpert.job", status.jobs[jobs[job]] | {"cancelled": True})
        try:
            slurm.cancel(job.id for job in alive)
        except slurm.SlurmError:
            for job in alive:
                write_record(job_path(path, jobs[job]), "flexpert.job", status.jobs[jobs[job]])
            raise
        deadline = time.monotonic() + END_SECONDS
        while left := slurm.alive(alive):
            if time.monotonic() > deadline:
                raise UserError(
                    f"jobs {', '.join(job.id for job in left)} were told to end and have not yet: see `flexpert status`"
                )
            time.sleep(POLL)
    after = lost(status.nodes, {jobs[job] for job in alive})
    if waits := [jobs[job] for job in known if jobs[job] in after and job not in alive]:
        print(f"note: Slurm cancels what needs them: {', '.join(waits)}")
    print(f"cancelled: {', '.join(f'{jobs[job]} (job {job.id})' for job in alive) or 'nothing, no job is under way'}")
