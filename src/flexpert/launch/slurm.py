"""Slurm by its commands: submit, ask, cancel. Nothing here knows of pipelines."""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from flexpert.errors import UserError

#: Seconds for one command; a busy controller answers in a few.
TIMEOUT = 60.0
#: States that a job does not leave by itself; in all others, also those of versions to come, it may still run.
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
         "PREEMPTED", "REVOKED", "TIMEOUT")  # fmt: skip
#: Prefixes of variables that change what its commands do: those of a job in which this may run, and defaults of the
#: user's, which would win over what a script says. Where the cluster is, is not among them.
VARIABLES = ("SLURM_", "SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_")
KEPT_VARIABLES = ("SLURM_CONF", "SLURM_JWT")

#: What Slurm says, and the setting that it is about.
ADVICE = (
    (r"invalid account", "set launcher.account, or what launcher.jobs and pipeline.resources say of it"),
    (r"partition", "set launcher.partition, or what launcher.jobs and pipeline.resources say of it"),
    (r"submit limit|maxsubmit", "the site lets a user submit fewer jobs: launcher.array=true does not change that; ask "
     "for more, or make the pipeline smaller"),
    (r"job array", "the site's arrays are shorter: launcher.array=false"),
    (r"qos", "set --qos among launcher.options"),
    (r"node configuration|more processors|cpu count|memory spec|gres|gpu", "nodes have less than launcher.options, "
     "launcher.jobs or pipeline.resources ask for"),
    (r"time limit|--time", "set --time among launcher.options or launcher.jobs"),
    (r"option|invalid", "see launcher.options, launcher.jobs and pipeline.resources"),
    (r"contact slurm|connect|munge|socket", "Slurm's controller does not answer: try again"),
)  # fmt: skip


class SlurmError(UserError):
    """One of Slurm's commands has failed, or did not answer."""


class Job(NamedTuple):
    """Attributes: Slurm's id, `12_3` of an array's element; its name; uid of whoever submitted it."""

    id: str
    name: str
    user: int


#: Reasons for waiting that do not pass by themselves, and what to do.
MORE = ": it asks for more than the partition gives: see launcher.options, launcher.jobs and pipeline.resources"
HOPELESS = dict.fromkeys(("PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit"), MORE) | {
    "BadConstraints": ": too few nodes are left, or none is as it asks",
    "JobHeldUser": ": scontrol release",
    "JobHeldAdmin": ": ask Slurm's administrators",
}


@dataclass(frozen=True)
class State:
    """Attributes: Slurm's name of a job's state; why it waits or ended so; its nodes."""

    name: str
    reason: str = ""
    nodes: str = ""

    @property
    def is_alive(self) -> bool:
        return self.name not in ENDED


def check_installed() -> None:
    """Raises `UserError` where there is no Slurm."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "launcher=slurm: there is no sbatch on the PATH: start this on a login node of a cluster, or choose "
            "launcher=local"
        )


def run(*words: str) -> str:
    """What one of Slurm's commands prints.

    Raises:
        SlurmError: Slurm's own message, in one line, with the setting to change.
    """
    try:
        done = subprocess.run(
            words, env=own_environment(), capture_output=True, text=True, check=False, timeout=TIMEOUT,
            start_new_session=True,  # Ctrl-C is for this process: sbatch says what it has submitted
        )  # fmt: skip
    except FileNotFoundError:
        raise SlurmError(f"there is no {words[0]} on the PATH: start this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]} has not answered within {TIMEOUT:.0f} s: try again") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()
        lines = [line.removeprefix(f"{words[0]}: ").removeprefix("error: ") for line in said if line[:4] != "Try "]
        advice = next((text for pattern, text in ADVICE if re.search(pattern, lines[-1], re.IGNORECASE)), None)
        raise SlurmError(f"{words[0]}: {'; '.join(lines)}{f' ({advice})' if advice else ''}")
    if "--parsable" in words:
        for line in done.stderr.splitlines():
            warn(line)
    return done.stdout


def cluster() -> str | None:
    """Name of the cluster whose login node or job this is; None: of none."""
    if shutil.which("scontrol") is None:
        return None
    found = re.search(r"^ClusterName\s*=\s*(\S+)", run("scontrol", "show", "config"), re.MULTILINE)
    return found[1] if found is not None else None


@functools.cache
def warn(line: str) -> None:
    """Pass on, once, what sbatch says of a job that it accepts."""
    print(f"note: {line}", file=sys.stderr, flush=True)


def own_environment() -> dict[str, str]:
    return {n: value for n, value in os.environ.items() if n in KEPT_VARIABLES or not n.startswith(VARIABLES)}


def submit(script: Path, dependency: str) -> str:
    """The id of the new job.

    Args:
        dependency: `afterok:1:2,afterany:3`, or nothing.
    """
    options = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
    said = run("sbatch", "--parsable", *options, str(script)).strip()
    job = said.rpartition("\n")[2].partition(";")[0]  # a site's own sbatch may greet before it answers
    # An id that was never given out would count as one that has ended.
    if re.fullmatch(r"\d+", job) is None:
        raise SlurmError(f"sbatch answered '{said}' where the id of a job was expected")
    return job


def cancel(jobs: Iterable[str]) -> None:
    """End jobs; those that have ended already are no error."""
    if found := list(jobs):
        run("scancel", "--quiet", *found)


def states(jobs: Collection[Job]) -> dict[str, State]:
    """What Slurm knows of jobs, by their ids; those that it has forgotten are not there.

    Nor are those whose id is another job's by now: where the controller was set up anew, or is another cluster's.
    """
    wanted = {(job.id, job.name) for job in jobs}
    if not wanted:
        return {}
    users = f"--user={','.join(sorted({str(job.user) for job in jobs}))}"
    # All jobs of the users, not `--jobs`: with one id that is forgotten, that is an error.
    listed = run("squeue", "--noheader", "--array", "--states=all", users, "--format=%i|%T|%r|%N|%j")
    found = dict(parse(line) for line in listed.splitlines())
    if missing := wanted - found.keys():
        found |= remembered({job for job, _ in missing}, users)
    return {job: state for (job, name), state in found.items() if (job, name) in wanted}


def alive(jobs: Collection[Job]) -> list[Job]:
    """Those that wait or may still run."""
    found = states(jobs)
    return [job for job in jobs if job.id in found and found[job.id].is_alive]


def parse(line: str) -> tuple[tuple[str, str], State]:
    """((id, name), state) of a job."""
    job, state, reason, nodes, name = line.split("|", 4)
    advice = HOPELESS.get(reason, "") if state == "PENDING" else ""
    return (job, name), State(state, "" if reason == "None" else reason + advice, nodes)


def remembered(jobs: set[str], users: str) -> dict[tuple[str, str], State]:
    """What the accounting database still knows of jobs that the controller has forgotten; nothing where it is off."""
    columns = "--format=JobID,State,Reason,NodeList,JobName"
    try:
        listed = run("sacct", "-X", "-n", "-P", users, columns, "--jobs", ",".join(sorted(jobs)))
    except SlurmError:
        return {}
    found = {}
    for line in listed.splitlines():
        job, state = parse(line)
        name = state.name.partition(" ")[0]  # `CANCELLED by 1000`
        if name in ENDED:  # what runs is known to the controller; accounts that it lost track of never end
            found[job] = State(name, state.reason, state.nodes)
    return found


def has_accounting() -> bool:
    """Whether the cluster remembers jobs that ended long ago."""
    try:
        run("sacct", "-n", "-X", "--starttime=now")
    except SlurmError:
        return False
    return True
