"""What a job of Slurm's does beside its stage: the scripts in slurm/ call this before and after it.

    python -m flexpert.launch.job begin STAGE key=value …
    python -m flexpert.launch.job end STATUS STAGE key=value …

`begin` ends with 0 where the stage should start, with `COMPLETE` where there is nothing left to do. `end` ends with the
status of the stage, or with 75 where the job should be requeued. Whether a job is a pipeline's, and which node of the
graph it makes, is in the environment, as the pipeline's scripts set it.
"""

import os
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from flexpert.cli import PARALLEL
from flexpert.config.tree import take_config_dir
from flexpert.errors import UserError
from flexpert.launch import slurm
from flexpert.launch.graph import Node, Records, build_graph, read_pipeline
from flexpert.launch.restarts import check_restarts
from flexpert.records import read_record
from flexpert.signals import LOST, REQUEUE

#: How long a job waits to be known, and between two looks, in seconds.
KNOWN_SECONDS, POLL = 10.0, 0.5

#: Run directory and name of the node that a job makes; not set for a job that was submitted by hand.
PIPELINE, NODE = "FLEXPERT_PIPELINE", "FLEXPERT_NODE"
#: Above all statuses that a process can end with by itself or a signal.
COMPLETE = 200


class PipelineJob:
    """A node of a pipeline's graph, as the job sees it that makes it.

    Raises:
        UserError: the run directory is not there, or its pipeline is another one by now.
    """

    def __init__(self, run: Path, name: str, stage: str, overrides: list[str]) -> None:
        path = run / "pipeline.yaml"
        if not path.is_file():
            raise UserError(
                f"{name}: this node ({os.uname().nodename}) does not see {path}: the run directory must be on a file "
                "system that all nodes share"
            )
        config = read_pipeline(run)
        self.graph = {node.name: node for node in build_graph(config)}
        self.records, self.run = Records(Path(config.output_dir)), run  # as the graph has it, relative or by a link
        node = self.graph.get(name)
        if node is None or (node.stage, list(node.overrides)) != (stage, overrides):
            raise UserError(f"{name}: the pipeline in {run} has changed since this job was submitted: start it again")
        self.node: Node = node

    def wait_until_known(self) -> None:
        """A job may start before whoever submitted it has written that down.

        Raises:
            UserError: this job was cancelled, or another one makes the same.
        """
        deadline = time.monotonic() + KNOWN_SECONDS
        while not self.is_wanted():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.node.name}: job {own_id()} is not, or no longer, the one that makes this in {self.run}: "
                    "`flexpert pipeline` submits what is missing"
                )
            time.sleep(POLL)

    def begin(self) -> bool:
        """Make way for the stage; returns whether it must run.

        Raises:
            UserError: something that it needs is not complete.
        """
        for need in self.node.needs:
            if not self.records.is_recorded(self.graph[need]):
                raise UserError(f"{self.node.name} needs {need}, which is not complete")
        if self.records.is_complete(self.node, self.graph):
            print(f"{self.node.name} is complete", flush=True)
            return False
        self.records.begin(self.node, self.graph)
        return True

    def end(self, status: int) -> None:
        """Record how the stage ended, unless this job was cancelled or replaced meanwhile."""
        if self.is_wanted():
            self.records.end(self.node, status, own_id())

    def is_wanted(self) -> bool:
        """Whether this is the pipeline's job for the node, and was not cancelled."""
        record = read_job(self.run, self.node.name)
        return record is not None and record["job"] == own_id() and not record["cancelled"]


def own_id() -> str:
    """As sbatch gave it, an array's element with its index."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def job_path(run: Path, name: str) -> Path:
    """Record of the job that was submitted for a node."""
    return run / "slurm/jobs" / f"{name.replace('/', '.')}.json"


def read_job(run: Path, name: str) -> dict[str, Any] | None:
    """The record of the node's last job."""
    path = job_path(run, name)
    return read_record(path, "flexpert.job") if path.exists() else None


def read_jobs(run: Path) -> dict[str, dict[str, Any]]:
    """The record of the last job of every node that had one; also of nodes that the graph no longer has."""
    records = [read_record(path, "flexpert.job") for path in sorted((run / "slurm/jobs").glob("*.json"))]
    return {record["node"]: record for record in records}


class AtWork(NamedTuple):
    """Attributes: record of a node's job that may still run; its state."""

    record: dict[str, Any]
    state: slurm.State


def at_work(run: Path) -> dict[str, AtWork]:
    """The jobs of a run that wait or may still run, by node."""
    records = read_jobs(run)
    if not records or shutil.which("squeue") is None:
        return {}
    states = slurm.states([slurm_job(record) for record in records.values()])
    found = {name: AtWork(record, states[record["job"]]) for name, record in records.items() if record["job"] in states}
    return {name: job for name, job in found.items() if job.state.is_alive}


def check_known(run: Path, complete: set[str], records: Records) -> None:
    """Raises `UserError` where a job that may still be at work is another cluster's, which cannot be asked from here.

    Args:
        complete: names of nodes whose jobs are of no interest any more.
    """
    left = {
        name: record
        for name, record in read_jobs(run).items()
        if name not in complete and not record["cancelled"] and records.ended(name, record["job"]) in (None, REQUEUE)
    }
    here = slurm.cluster() if left else None
    for name, record in left.items():
        if record["cluster"] != here:
            raise UserError(
                f"job {record['job']} of {name} was submitted on the cluster {record['cluster']} and may be at work, "
                f"which cannot be asked here: start this there, or `flexpert cancel run={run}` there first"
            )


def slurm_job(record: dict[str, Any]) -> slurm.Job:
    """What Slurm knows the job of such a record by."""
    return slurm.Job(record["job"], record["name"], record["user"])


def pipeline_job(stage: str, overrides: list[str]) -> PipelineJob | None:
    if NODE not in os.environ:
        return None
    return PipelineJob(Path(os.environ[PIPELINE]), os.environ[NODE], stage, overrides)


def begin(stage: str, overrides: list[str]) -> int:
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    what, nodes = os.environ.get(NODE, stage), os.environ.get("SLURM_JOB_NODELIST", os.uname().nodename)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    print(f"--- {what}: job {own_id()}, start {restarts + 1} at {now} on {nodes}", flush=True)
    job = pipeline_job(stage, overrides)
    if job is not None:
        job.wait_until_known()
    check_restarts(restarts, stage, overrides)
    return 0 if job is None or job.begin() else COMPLETE


def end(status: int, stage: str, overrides: list[str]) -> int:
    """Requeued is a stage that was told to stop, also by the signal before the time limit, or that lost a process."""
    job = pipeline_job(stage, overrides)
    if job is not None:
        job.end(status)
    is_interrupted = status == REQUEUE or (stage in PARALLEL and (status == LOST or status > 128))
    if not is_interrupted or (job is not None and not job.is_wanted()):
        return 1 if status == REQUEUE else status
    check_restarts(int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1, stage, overrides)
    return REQUEUE


def main() -> None:
    try:
        what, *words = take_config_dir(sys.argv[1:])
        status = begin(words[0], words[1:]) if what == "begin" else end(int(words[0]), words[1], words[2:])
    except UserError as error:
        print(f"flexpert: {error}", file=sys.stderr)
        status = error.status
    except OSError as error:
        print(f"flexpert: {error.strerror} ({error.filename or 'in the run directory'})", file=sys.stderr)
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()
