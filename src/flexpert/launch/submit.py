"""A pipeline on Slurm: every node a job, written out as it is submitted, and waiting for what it needs.

    RUN/slurm/NODE.yaml      the resolved config of the node's stage
    RUN/slurm/NODE.sbatch    what was submitted: the script of slurm/ behind the node's own options and overrides
    RUN/slurm/code.txt       version and commit of the code; code.diff: what of it is not committed
    RUN/slurm/jobs/NODE.json the node's last job

Submitted again, what is complete stays, what still waits or runs is left alone, and the rest gets new jobs.
"""

import importlib.resources
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexpert import __version__
from flexpert.config.launcher import LauncherConfig
from flexpert.config.stages import PipelineConfig
from flexpert.config.tree import CONFIG_DIR
from flexpert.errors import UserError
from flexpert.launch import slurm
from flexpert.launch.graph import Node
from flexpert.launch.job import NODE, PIPELINE, AtWork, job_path
from flexpert.records import write_atomic, write_record
from flexpert.signals import deferred

PREFIX = "#SBATCH "


@dataclass(frozen=True)
class Unit:
    """What one call of sbatch submits: a node, or several as an array."""

    nodes: tuple[Node, ...]

    @property
    def name(self) -> str:
        """Of its files."""
        first = self.nodes[0].name
        return f"{first.rpartition('/')[0]}-array".replace("/", ".") if self.is_array else first.replace("/", ".")

    @property
    def is_array(self) -> bool:
        return len(self.nodes) > 1

    def log(self, element: str) -> str:
        """Name of the file with the output; `element` is the job of an array's, so that later ones have their own."""
        return f"{self.name}-{element}.log" if self.is_array else f"{self.name}.log"


class Submission:
    """Submits what is missing of a graph.

    Args:
        nodes: in an order in which each comes after what it needs.
        complete: names of those that are.
        resolved: config of each node's stage as YAML.
    """

    def __init__(
        self, config: PipelineConfig, run: Path, nodes: list[Node], complete: set[str], resolved: dict[str, str]
    ) -> None:
        self.config, self.launcher, self.nodes = config, config.launcher, nodes
        self.run, self.directory, self.resolved = run.resolve(), run.resolve() / "slurm", resolved
        self.complete = complete
        #: Node → its job.
        self.jobs: dict[str, str] = {}
        self.submitted: list[str] = []
        self.cluster: str | None = None
        #: Path → content of the pipeline's config as an earlier call has left it.
        self.pipeline_before: dict[Path, str] = {}
        #: Node → its job of an earlier call that another one takes the place of, or none.
        self.outdated: dict[str, str] = {}
        #: Where there is a limit, jobs in the order in which they take a place; an array takes all.
        self.lanes: list[str] = []

    def submit(self, resolved: str) -> None:
        """Write the pipeline's own config and submit what is missing.

        Raises:
            UserError: Slurm refuses a job; those that were submitted before it are cancelled then, and jobs of an
                earlier call find the pipeline that they are of.
        """
        pipeline = self.run / "pipeline.yaml"
        if pipeline.exists():
            self.pipeline_before = {pipeline: pipeline.read_text(encoding="utf-8")}
        left = [node for node in self.nodes if node.name not in self.complete and node.name not in self.jobs]
        (self.directory / "jobs").mkdir(parents=True, exist_ok=True)
        write_code(self.directory)
        made = units(left, self.config)
        for unit in made:
            self.write(unit)
        write_atomic(pipeline, resolved)
        if not self.launcher.dry_run:
            self.submit_units(made)
        self.tell(left)

    def submit_units(self, made: list[Unit]) -> None:
        paths = [job_path(self.run, name) for name in self.outdated]
        before = {path: path.read_text(encoding="utf-8") for path in paths} | self.pipeline_before
        try:
            for unit in made:
                with deferred():  # so that no job is there that nobody knows
                    self.submit_unit(unit)
        except BaseException:
            self.take_back(before)
            raise
        # Not before: they keep their place where what would follow them is refused.
        try:
            slurm.cancel(self.outdated.values())
        except slurm.SlurmError as error:
            jobs = " ".join(self.outdated.values())
            raise UserError(f"{error}; jobs that others have taken the place of are left: scancel {jobs}") from None
        for name in self.outdated.keys() - self.jobs.keys():
            job_path(self.run, name).unlink()

    def adopt(self, at_work: dict[str, AtWork]) -> None:
        """Leave alone the jobs of an earlier call that may still run, but not those that wait for what is made anew.

        Args:
            at_work: by node, as it was before it was looked at what is complete.

        Raises:
            UserError: there is no Slurm; a job runs that this pipeline would submit with other overrides; one was
                cancelled and has not ended.
        """
        slurm.check_installed()
        self.cluster = slurm.cluster()
        known = {node.name for node in self.nodes}
        self.outdated = {name: job.record["job"] for name, job in at_work.items() if name not in known}
        for node in self.nodes:
            if node.name in self.complete or node.name not in at_work:
                continue
            record, state = at_work[node.name]
            if record["cancelled"]:
                raise UserError(
                    f"job {record['job']} of {node.name} was told to end and has not yet: "
                    f"`flexpert cancel run={self.run}` waits for it"
                )
            changed = record["overrides"] != list(node.overrides)
            has_other_settings = record["settings"] != self.settings(node)
            # One that runs may be done without what it wants, and is made again later; not so with what it needs.
            waits = [*node.needs, *(node.wants if state.name == "PENDING" else ())]
            waits = [name for name in waits if name not in self.complete]
            is_outdated = any(name not in self.jobs or record["after"].get(name) != self.jobs[name] for name in waits)
            if is_outdated or ((changed or has_other_settings) and state.name == "PENDING"):
                self.outdated[node.name] = record["job"]
            elif changed:
                raise UserError(
                    f"{node.name} runs with other overrides (job {record['job']}): `flexpert cancel run={self.run}` "
                    "ends it; or choose another output_dir"
                )
            else:
                self.jobs[node.name] = record["job"]
                job, _, element = record["job"].partition("_")
                self.take_lane(job, bool(element))

    def script_path(self, unit: Unit) -> Path:
        return self.directory / f"{unit.name}.sbatch"

    def write(self, unit: Unit) -> None:
        write_atomic(self.script_path(unit), self.script(unit))
        for node in unit.nodes:
            write_atomic(self.directory / f"{node.name.replace('/', '.')}.yaml", self.resolved[node.name])

    def submit_unit(self, unit: Unit) -> None:
        submitted = time.time()
        with told_of(unit):
            job = slurm.submit(self.script_path(unit), self.dependency(unit))
        self.submitted.append(job)
        self.take_lane(job, unit.is_array)
        for index, node in enumerate(unit.nodes):
            own = f"{job}_{index}" if unit.is_array else job
            after = {name: self.jobs[name] for name in (*node.needs, *node.wants) if name in self.jobs}
            self.jobs[node.name] = own
            log = str(self.run / "logs" / unit.log(own))
            content = {
                "node": node.name, "job": own, "name": self.job_name(unit), "user": os.getuid(), "after": after,
                "cluster": self.cluster, "overrides": list(node.overrides), "settings": self.settings(node),
                "log": log, "submitted": submitted, "cancelled": False,
            }  # fmt: skip
            write_record(job_path(self.run, node.name), "flexpert.job", content)

    def dependency(self, unit: Unit) -> str:
        """`afterok` what is needed; `afterany` what is wanted, a job that this one takes the place of, and whoever has
        the place before where they are few.

        What only some elements of an array need must not keep the others from starting: those find out by themselves.
        """
        common = set[str].intersection(*(set(node.needs) for node in unit.nodes))
        names = [(name, name in common) for node in unit.nodes for name in node.needs]
        names += [(name, False) for node in unit.nodes for name in node.wants]
        needs = {self.jobs[name]: None for name, is_needed in names if is_needed and name in self.jobs}
        wants = {self.jobs[name]: None for name, is_needed in names if not is_needed and name in self.jobs}
        wants |= {self.outdated[node.name]: None for node in unit.nodes if node.name in self.outdated}
        limit = self.launcher.max_jobs
        if limit is not None and (unit.is_array or len(self.lanes) >= limit):
            before = self.lanes[-limit:]
            wants |= dict.fromkeys(before if unit.is_array else before[:1])
        kinds = {"afterok": needs, "afterany": {job: None for job in wants if job not in needs}}
        return ",".join(":".join((kind, *jobs)) for kind, jobs in kinds.items() if jobs)

    def settings(self, node: Node) -> dict[str, Any]:
        """What of a node's job is not its stage's overrides."""
        options = node_options(self.config, node)
        return {"options": options, "setup": exports(self.launcher, self.run), "check": self.launcher.check_nodes}

    def job_name(self, unit: Unit) -> str:
        return f"{self.config.pipeline.name}/{unit.name}"

    def take_lane(self, job: str, is_array: bool) -> None:
        if job not in self.lanes:
            self.lanes += [job] * ((self.launcher.max_jobs or 1) if is_array else 1)

    def script(self, unit: Unit) -> str:
        """The script of the unit's kind, behind its options and its words."""
        stage = unit.nodes[0].stage
        lines = packaged(f"{stage}.sbatch").splitlines()
        body = [line for line in lines[1:] if not line.startswith(PREFIX)]
        if self.launcher.check_nodes:
            body = [*packaged("check_nodes.sh").splitlines(), "", *body]
        named = options_of(line.removeprefix(PREFIX) for line in lines if line.startswith(PREFIX))
        named |= {"chdir": os.getcwd()} | node_options(self.config, unit.nodes[0])
        logs = str(self.run / "logs").replace("%", "%%")  # in Slurm's patterns it is a sign
        named |= {"job-name": self.job_name(unit), "output": f"{logs}/{unit.log('%A_%a')}"}
        if unit.is_array:
            limit = self.launcher.max_jobs
            named["array"] = f"0-{len(unit.nodes) - 1}{f'%{limit}' if limit is not None else ''}"
        after = dict.fromkeys(name for node in unit.nodes for name in (*node.needs, *node.wants))
        said = [
            "#!/bin/bash",
            *(f"{PREFIX}--{name}" + ("" if value is None else f"={in_header(value)}") for name, value in named.items()),
            f"# Of the pipeline {self.config.pipeline.name}, written by flexpert {__version__}; after: "
            f"{', '.join(name for name in after if name not in self.complete) or 'nothing'}.",
            *exports(self.launcher, self.run),
        ]
        if not unit.is_array:
            return "\n".join([*said, *words(unit.nodes[0]), "", *body, ""])
        said.append('case "$SLURM_ARRAY_TASK_ID" in')
        for index, node in enumerate(unit.nodes):
            said += [f"{index})", *words(node), "    ;;"]
        return "\n".join([*said, "esac", "", *body, ""])

    def take_back(self, before: dict[Path, str]) -> None:
        """Cancel what this call has submitted; `before`: the files that were there."""
        try:
            slurm.cancel(self.submitted)
        except slurm.SlurmError as error:
            print(f"flexpert: {error}; jobs {', '.join(self.submitted)} are still submitted", file=sys.stderr)
            return
        for name, job in self.jobs.items():
            if job.partition("_")[0] in self.submitted:
                job_path(self.run, name).unlink(missing_ok=True)
        for path, content in before.items():
            write_atomic(path, content)

    def tell(self, left: list[Node]) -> None:
        if self.launcher.dry_run:
            print(f"  {len(left)} jobs written to {self.directory}, none submitted: {', '.join(n.name for n in left)}")
            return
        adopted = [name for name in self.jobs if self.jobs[name].partition("_")[0] not in self.submitted]
        for what, names in (("complete", sorted(self.complete)), ("under way", adopted)):
            if names:
                print(f"  {what}: {', '.join(names)}")
        if dropped := sorted(self.outdated.keys() - {node.name for node in self.nodes}):
            print(f"  cancelled, as this pipeline has no such stages: {', '.join(dropped)}")
        for node in left:
            print(f"  {node.name}: job {self.jobs[node.name]}")
        print(f"`flexpert status run={self.run}` says where they stand")


@contextmanager
def told_of(unit: Unit) -> Iterator[None]:
    """What Slurm says against a job is told with the names of its nodes."""
    try:
        yield
    except slurm.SlurmError as error:
        raise UserError(f"{', '.join(node.name for node in unit.nodes)}: {error}") from None


def units(nodes: list[Node], config: PipelineConfig) -> list[Unit]:
    """Nodes one by one; or, as arrays, those of one stage below one name that differ in their words alone."""
    groups: dict[object, list[Node]] = {}
    for node in nodes:
        parent = node.name.rpartition("/")[0]
        siblings = tuple(need for need in node.needs if need.rpartition("/")[0] == parent)
        has_own = node.name in config.launcher.jobs or node.name in config.pipeline.resources
        merges = any(need.startswith(f"{node.name}/") for need in node.needs)  # comes after shards, unlike its siblings
        is_alone = not config.launcher.array or not parent or has_own or merges
        key = node.name if is_alone else (parent, node.stage, node.processes, siblings)
        groups.setdefault(key, []).append(node)
    place = {node.name: index for index, node in enumerate(nodes)}
    return [Unit(tuple(group)) for group in sorted(groups.values(), key=lambda group: place[group[-1].name])]


def packaged(name: str) -> str:
    """A file of slurm/."""
    return (importlib.resources.files("flexpert.slurm") / name).read_text(encoding="utf-8")


def options_of(options: Iterable[str]) -> dict[str, str | None]:
    """`--name=value` or `--name` → {name: value or None}."""
    found: dict[str, str | None] = {}
    for option in options:
        name, equals, value = option.removeprefix("--").partition("=")
        found[name] = value if equals else None
    return found


def node_options(config: PipelineConfig, node: Node) -> dict[str, str | None]:
    """sbatch options of a node: the site's, then what is said of its stage, then what is said of itself.

    What the pipeline says of one of these wins over what the site says of it.
    """
    launcher, resources = config.launcher, config.pipeline.resources
    named: dict[str, str | None] = {}
    if launcher.account is not None:
        named["account"] = launcher.account
    if launcher.partition is not None:
        named["partition"] = launcher.partition
    if node.processes is not None:
        named["ntasks"] = str(node.processes)
    named |= options_of(launcher.options)
    for name in (node.stage, node.name):
        named |= options_of(launcher.jobs.get(name, [])) | options_of(resources.get(name, []))
    return named


def in_header(value: str) -> str:
    """A value as sbatch reads it in a comment: quoted where it holds blanks."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"' if set(value) & set(" '\"\\;#") else value


def exports(launcher: LauncherConfig, run: Path) -> list[str]:
    setup = launcher.setup
    if not setup and launcher.run is None:  # jobs run what this is
        setup = [f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"]
    setup = [f"{line}\n[ $? = 0 ] || exit 2" for line in setup]  # on a line of its own: this one may end in a comment
    variables = {"FLEXPERT_SETUP": "\n".join(setup), "FLEXPERT_RUN": launcher.run or "", PIPELINE: str(run)}
    if directory := os.environ.get(CONFIG_DIR):
        variables[CONFIG_DIR] = directory
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def words(node: Node) -> list[str]:
    """Lines that make the node's overrides the script's arguments."""
    quoted = [shlex.quote(override) for override in node.overrides]
    return [f"export {NODE}={shlex.quote(node.name)}", " \\\n    ".join(["set --", *quoted])]


def write_code(directory: Path) -> None:
    """Which code the jobs will run: version, commit, and what is not committed."""
    root = Path(__file__).parents[3]

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, errors="replace", check=False
            )
        except FileNotFoundError:
            return None
        return done.stdout if done.returncode == 0 else None

    is_checkout = (root / ".git").exists()  # else it is installed, perhaps below somebody's repository
    commit, diff = (git("rev-parse", "HEAD"), git("diff", "HEAD")) if is_checkout else (None, None)
    lines = [f"flexpert {__version__}", f"commit {commit.strip()}" if commit else "no commit is known"]
    write_atomic(directory / "code.txt", "\n".join([*lines, ""]))
    write_atomic(directory / "code.diff", diff or "")
