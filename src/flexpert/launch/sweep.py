"""`flexpert STAGE --multirun key=a,b …`: the stage once for each combination of values, run by Hydra.

Which values an override stands for is said in Hydra's grammar. Hydra's `main` with its sweeper and a launcher, its own
(one run after another) or a plugin's (Slurm's jobs, by submitit), then starts the runs by their numbers: the overrides
themselves do not pass through its grammar, in which text would not arrive as typed. A run is a process of its own,
`flexpert STAGE …` with `output_dir=OUTPUT_DIR/N`. What belongs to all of them is in OUTPUT_DIR/sweep.yaml and
OUTPUT_DIR/sweep: what each has printed, N.log, and Hydra's own records. Other directories get none of these.
"""

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flexpert.config.compose import compose, compose_node, conf_tree, one_line, split_items, understand
from flexpert.config.paths import check_paths
from flexpert.config.schema import leaves_of
from flexpert.config.tree import EXPERIMENT, groups_of
from flexpert.errors import UserError
from flexpert.launch.slurm import has_accounting
from flexpert.records import write_atomic
from flexpert.signals import LOST, deferred

#: What Hydra calls the configuration that it runs.
CONFIG_NAME = "flexpert_sweep"
#: Overrides of Hydra's own configuration.
HYDRA = re.compile(r"[+~]*hydra[./]")
#: `choice(a,b)`, with which text can be told from text that holds a comma, too.
CHOICE = re.compile(r"choice\((.*)\)", re.DOTALL)
#: A key that a value refers to.
REFERENCE = re.compile(r"(?<!\\)\$\{([\w.]+)\}")
#: How the log of a run that has ended ends.
ENDED = re.compile(rb"--- run \d+ ended with status (-?\d+)\n\Z")


def run(stage: str, overrides: list[str]) -> None:
    """Run the stage for every combination of the values, and print a table of what became of the runs.

    A run that fails stops no other.

    Raises:
        UserError: what is wrong with the configuration of a run or of Hydra, before the first one starts; or, when all
            have ended, which of them have failed, with the status of the first of these; or why none has started.
    """
    for_hydra = [override for override in overrides if HYDRA.match(override)]
    own = [override for override in overrides if override not in for_hydra]
    choices = [values_of(stage, override) for override in own]
    runs = [list(words) for words in itertools.product(*choices)]
    swept = [index for index, values in enumerate(choices) if len(values) > 1]
    labels = [" ".join(words[index] for index in swept) for words in runs]
    directory = output_directory(stage, own, runs)
    check_hydra(stage, for_hydra)
    record = directory / "sweep.yaml"
    content: dict[str, Any] = {
        "stage": stage,
        "overrides": [word for index, word in enumerate(own) if index not in swept],
        "runs": [{"number": number, "overrides": label} for number, label in enumerate(labels)],
    }
    if "output_dir" in leaves_of(stage):
        check_no_other(record, content)
        runs = [[*words, f"output_dir={directory / str(number)}"] for number, words in enumerate(runs)]
    logs = directory / "sweep"
    logs.mkdir(parents=True, exist_ok=True)
    for number in range(len(runs)):
        (logs / f"{number}.log").unlink(missing_ok=True)
    write_atomic(record, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    print(f"{len(runs)} runs of {stage} in {directory}", flush=True)
    lost = multirun(Sweep(stage, runs, labels, logs.absolute()), for_hydra)
    if lost is not None and not any(logs.glob("*.log")):  # as where Slurm refuses hydra.launcher.partition
        raise UserError(f"no run of {stage} has started: {lost}")
    statuses = [status_of(logs / f"{number}.log") for number in range(len(runs))]
    for entry, status in zip(content["runs"], statuses, strict=True):
        entry["status"] = status
    write_atomic(record, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    print(table(labels, statuses, logs), flush=True)
    if lost is not None or any(statuses):
        failed = [number for number, status in enumerate(statuses) if status != 0]
        first = next((status for status in statuses if status), LOST)
        raise UserError(
            f"{len(failed)} of {len(runs)} runs of {stage} have failed: {', '.join(map(str, failed))}; what they have "
            f"printed is in {logs}{f' ({lost})' if lost else ''}",
            status=first,
        )


def values_of(stage: str, override: str) -> list[str]:
    """The overrides, each with one value, that one override stands for; itself where it has one value.

    Numbers, switches, choices of groups and presets have Hydra's grammar: `a,b`, `choice(a,b)`, `range(…)`. Text has
    commas, outside of quotes and brackets, and `choice`; a prompt, lists and mappings have always one value.

    Raises:
        UserError: values without number, or that cannot be read.
    """
    key, _, value = override.partition("=")
    name = key.lstrip("+")
    hint, field = leaves_of(stage).get(name, (None, None))
    if hint is str and field is not None and not field.metadata.get("literal"):
        chosen = CHOICE.fullmatch(value)
        items = split_items(chosen[1] if chosen else value)
        items = items if chosen or len(items) > 1 else [value]
    elif hint in (bool, int, float) or (hint is None and name in (*groups_of(stage), EXPERIMENT)):
        items = hydra_values(stage, name, value)
    else:
        return [override]
    if not items:
        raise UserError(f"{override} has no value")
    if name == "output_dir" and len(items) > 1:
        raise UserError(f"{override}: give one directory, in which each run gets its own, by its number")
    return [f"{key}={item}" for item in items]


def hydra_values(stage: str, key: str, value: str) -> list[str]:
    """The values that Hydra's grammar says, as typed where they are listed."""
    try:
        (parsed,) = OverridesParser.create().parse_overrides([f"{key}={value}"])
        if not parsed.is_sweep_override():
            return [value]
        if not parsed.is_discrete_sweep() or parsed.value_type is ValueType.GLOB_CHOICE_SWEEP:
            raise UserError(
                f"{key}={value} is no list of values: write a,b,… or choice(a,b,…) or range(FIRST,END,STEP)"
            )
        values = parsed.value()
        if isinstance(values, ChoiceSweep) and values.simple_form:
            return split_items(value)
        return list(parsed.sweep_string_iterator())
    except HydraException as error:
        raise UserError(one_line(error, stage)) from None
    except ValueError as error:  # of Python's `range`
        raise UserError(f"{key}={value}: {error}") from None


def output_directory(stage: str, own: list[str], runs: list[list[str]]) -> Path:
    """The directory of all runs: the `output_dir` that was given, or the stage's own, or multirun/STAGE where it has
    none or one for each of the runs.

    Raises:
        UserError: what is wrong with the configuration of a run, or the given directory is not the same for all.
    """
    configs = [compose(stage, words)[0] for words in runs]
    for config in configs:
        check_paths(stage, config)
    fallback = Path("multirun") / stage
    if "output_dir" not in leaves_of(stage):
        return fallback
    node = OmegaConf.to_container(compose_node(stage, *understand(stage, runs[0])))
    assert isinstance(node, dict)
    for key in REFERENCE.findall(str(node["output_dir"])):
        if len({str(value_of(config, key)) for config in configs}) > 1:
            if any(word.startswith("output_dir=") for word in own):
                raise UserError(f"output_dir={node['output_dir']}: {key} differs between the runs; leave it out")
            return fallback
    return Path(configs[0].output_dir)


def value_of(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


def check_no_other(record: Path, content: dict[str, Any]) -> None:
    """Raises `UserError` where another sweep's runs are: a number would stand for two things."""
    if not record.exists():
        return
    try:
        before = yaml.safe_load(record.read_text(encoding="utf-8"))
        for entry in before["runs"]:
            entry.pop("status", None)
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):  # somebody's own
        before = None
    if before != content:
        raise UserError(f"{record} is of another sweep: choose another output_dir")


def check_hydra(stage: str, for_hydra: list[str]) -> None:
    """Raises `UserError` where Hydra's own configuration cannot be, or names a launcher that cannot run here."""
    if any("submitit" in word for word in for_hydra) and importlib.util.find_spec("submitit") is None:
        raise UserError("submitit's launchers need an extra that is not installed: pip install 'flexpert[sweep]'")
    configure(stage, Path())
    try:
        with conf_tree(stage):
            config = hydra.compose(CONFIG_NAME, overrides=for_hydra, return_hydra_config=True).hydra
    except (HydraException, OmegaConfBaseException) as error:
        lines = [str(one).splitlines()[0] for one in (error, error.__cause__) if one is not None]
        raise UserError(f"{' '.join(for_hydra)}: {': '.join(lines)}") from None
    launcher = config.launcher
    if max(launcher.get("tasks_per_node") or 1, launcher.get("nodes") or 1) > 1:
        raise UserError("--multirun is for stages of one process: leave hydra.launcher.nodes and tasks_per_node at 1")
    if launcher["_target_"].endswith("SlurmLauncher") and shutil.which("sbatch") is None:
        raise UserError(
            "hydra/launcher=submitit_slurm needs Slurm, and there is no sbatch here: leave it out, and the runs are "
            "processes on this machine"
        )
    if launcher["_target_"].endswith("SlurmLauncher") and not has_accounting():
        print("note: sacct says nothing here, so a job that dies is waited for without end: see squeue", flush=True)


def configure(stage: str, directory: Path) -> None:
    """Make Hydra's configuration of a sweep known to it: a number of a run, and where records go, which are few."""
    defaults = ["_self_", {"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    own = {
        "job": {"name": f"flexpert-{stage}", "chdir": False},
        "sweep": {"dir": str(directory), "subdir": "."},
        "output_subdir": None,
    }
    ConfigStore.instance().store(CONFIG_NAME, {"defaults": defaults, "run": 0, "hydra": own})


@dataclass
class Sweep:
    """What Hydra calls for each run, here or, pickled, in a job of Slurm's.

    Attributes:
        stage.
        runs: overrides of each run.
        labels: those of them that differ, for people.
        logs: directory, absolute.
    """

    stage: str
    runs: list[list[str]]
    labels: list[str]
    logs: Path

    def __call__(self, config: DictConfig) -> None:
        """Run number `config.run` to its end; its output is printed and kept."""
        number = int(config.run)
        print(f"--- run {number}: {self.labels[number]}", flush=True)
        # -P: no module of the directory that the user happens to be in.
        command = [sys.executable, "-P", "-m", "flexpert", self.stage, *self.runs[number]]
        with open(self.logs / f"{number}.log", "wb") as log:
            process: subprocess.Popen[bytes] | None = None
            try:
                with deferred():  # so that none is there that this one does not end
                    process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                    )
                assert process.stdout is not None
                for line in process.stdout:
                    log.write(line)
                    sys.stdout.buffer.write(line)
                    sys.stdout.flush()
                status = process.wait()
            except BaseException:  # it ends with this process
                if process is not None:
                    process.terminate()
                    log.write(process.communicate()[0])
                raise
            log.write(f"--- run {number} ended with status {status}\n".encode())


def multirun(sweep: Sweep, for_hydra: list[str]) -> str | None:
    """Have Hydra run the sweep; returns what its launcher says of a job that was lost."""
    configure(sweep.stage, sweep.logs)
    # What it raises is raised here, and not printed.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    GlobalHydra.instance().clear()
    arguments, sys.argv = sys.argv, ["flexpert", "--multirun", f"run=range({len(sweep.runs)})", *for_hydra]
    try:
        hydra.main(version_base="1.3", config_path=None, config_name=CONFIG_NAME)(sweep)()
    except lost_job() as error:
        return " ".join(str(error).split())
    finally:
        sys.argv = arguments
    return None


def lost_job() -> tuple[type[Exception], ...]:
    """What submitit raises where Slurm refuses or loses a job."""
    if "submitit" not in sys.modules and importlib.util.find_spec("submitit") is None:
        return ()
    from submitit.core.utils import FailedJobError, UncompletedJobError

    return (FailedJobError, UncompletedJobError)


def status_of(log: Path) -> int | None:
    """The exit status of a run as a shell has it, 128 + N where signal N has ended it; None: it was lost."""
    found = ENDED.search(log.read_bytes()) if log.exists() else None
    if found is None:
        return None
    status = int(found[1])
    return status if status >= 0 else 128 - status


def table(labels: list[str], statuses: list[int | None], logs: Path) -> str:
    """One line a run: number, what it differs in, what became of it."""
    width = max(map(len, labels))
    lines = []
    for number, (label, status) in enumerate(zip(labels, statuses, strict=True)):
        end = {0: "done", None: "lost"}.get(status) or f"status {status}: {last_line(logs / f'{number}.log')}"
        lines.append(f"{number:>{len(str(len(labels)))}}  {label:<{width}}  {end}")
    return "\n".join(lines)


def last_line(log: Path) -> str:
    """What a run has printed last."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[:-1]
    return lines[-1].removeprefix("flexpert: ") if lines else "it has printed nothing"
