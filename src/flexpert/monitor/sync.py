"""`flexpert sync`: tell W&B's server what a run has recorded and it does not have, each step once.

`metrics.jsonl` is the truth about a stage. Its run in W&B has an id that is the same wherever and however often it is
told of, and of the rows the server has the beginning (`tell_missing`). What it lacks follows the step at which it lets
the run be resumed, whether the stage ran offline, was cut off from the server or was never told of.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from flexpert.config.groups import MonitorConfig
from flexpert.config.launcher import SyncConfig
from flexpert.config.stages import ExpertConfig
from flexpert.errors import UserError
from flexpert.launch.job import at_work
from flexpert.lock import exclusive
from flexpert.monitor.jsonl import read_metrics
from flexpert.monitor.report import Report
from flexpert.monitor.results import (
    Reference,
    base_references,
    expert_references,
    monitor_config,
    monitor_group,
    results_id,
    start_results,
    tell_references,
    tell_results,
)
from flexpert.monitor.run_directory import RunDirectory, read_run
from flexpert.monitor.wandb import default_id, describe, forget, kill_service, recorded_id, start_run, tell_missing
from flexpert.stage import comparable

#: What is told: its directory, the group `monitor` that it was recorded with, and how.
Task = tuple[Path, MonitorConfig, Callable[[MonitorConfig], str]]

#: In the summary of a run: the digest of the artifact that it has made, once the server was told of that.
MADE = "made"


@dataclass(frozen=True)
class Stage:
    """A stage that trains.

    Attributes:
        path: its directory.
        job: W&B's job type.
        flat: its configuration, as `comparable` gives it.
        monitor: the group of that name.
        made: artifacts that it was made from, and the one that it has made, which is the last.
    """

    path: Path
    job: str
    flat: dict[str, Any]
    monitor: MonitorConfig
    made: list[Reference]

    @property
    def planned_steps(self) -> int:
        steps = self.flat["train.steps"]
        return int(steps if steps is not None else -(-self.flat["train.tokens"] // self.flat["train.batch_tokens"]))


def run(config: SyncConfig, resolved: str) -> None:
    """Tell the server of each stage of a pipeline that trained, then of its results; or of the stage in a directory.

    A stage whose `monitor.wandb` is off stays untold.

    Raises:
        UserError: W&B's client is missing or offline, or has no key; the server cannot be reached, or refuses; `run`
            holds no run. When all else is told: stages that are at work, or whose directory cannot be written.
    """
    check_usable()
    path = Path(config.run)
    whole = None if (path / "metrics.jsonl").is_file() else read_run(path)
    outputs = [path] if whole is None else [path / part.place for part in whole.trainings]
    places = [place for output in outputs for place in (output, output / "calibration")]
    stages = [read_stage(place, whole) for place in places if (place / "metrics.jsonl").is_file()]
    todo: list[Task] = [(stage.path, stage.monitor, partial(sync_stage, stage)) for stage in stages]
    if whole is not None and (whole.assembly is not None or whole.evaluation is not None):
        todo.append((path, monitor_config(whole, None), partial(sync_results, whole)))
    # A job that started meanwhile would find the directory in use.
    jobs = {path / name: job for name, job in at_work(path).items()} if whole is not None else {}
    in_use = []
    for place, recorded, sync in todo:
        if job := jobs.get(place) or jobs.get(place.parent):
            in_use.append(f"job {job.record['job']} makes {place}")
            continue
        monitor = replace(recorded, project=config.project or recorded.project, entity=config.entity or recorded.entity)
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive(place))
            except UserError as error:
                in_use.append(str(error))
            else:
                said = sync(monitor) if monitor.wandb != "off" else "not told, its monitor.wandb is off"
                print(f"{place}: {said}", flush=True)
    if in_use:
        raise UserError(f"not all is told: {'; '.join(in_use)}")


def check_usable() -> None:
    if find_spec("wandb") is None:
        raise UserError("sync needs the wandb extra: pip install flexpert[wandb]")
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        raise UserError(f"sync needs W&B's server, and WANDB_MODE={mode} keeps from it: unset that")
    if not os.environ.get("WANDB_API_KEY"):
        raise UserError("sync needs W&B's server: set WANDB_API_KEY, and WANDB_BASE_URL where it is one of your own")


def read_stage(path: Path, whole: RunDirectory | None) -> Stage:
    """The stage in a directory.

    Args:
        whole: the pipeline's run that it is part of.

    Raises:
        UserError: its configuration is missing.
    """
    file, is_calibration = path / "resolved.yaml", False
    if path.name == "calibration" and not file.is_file():
        file, is_calibration = path.parent / "resolved.yaml", True
    if not file.is_file():
        raise UserError(f"{file} is missing, which says what {path / 'metrics.jsonl'} is of")
    text = file.read_text(encoding="utf-8")
    if is_calibration:
        text = calibration(text)
    flat = comparable(text)
    job = "tune_router" if "model" in flat else "expert" if "name" in flat else "pretrain"
    made = expert_references(path) if job == "expert" else []
    if whole is not None and path == whole.path / "public":
        made = base_references(whole)
    monitor = monitor_group(yaml.safe_load(text)["monitor"])
    return Stage(path, "calibrate" if is_calibration else job, flat, monitor, made)


def calibration(expert: str) -> str:
    """The configuration of an expert's calibration, which is not recorded by itself, made of the expert's."""
    from flexpert.train.expert import calibration_config  # PyTorch comes with it

    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ExpertConfig), OmegaConf.create(expert)))
    assert isinstance(config, ExpertConfig)
    return yaml.safe_dump(asdict(calibration_config(config)))


def sync_stage(stage: Stage, monitor: MonitorConfig) -> str:
    """Send what the server lacks of a stage; returns what that was, in words."""
    rows = [numbers(row) for row in read_metrics(stage.path / "metrics.jsonl")]
    if not rows:
        return "no step is recorded"
    identity = recorded_id(stage.path) or default_id(stage.path, stage.flat)
    with session():
        recorded = start_run(monitor, "online", stage.job, stage.path, stage.flat, identity)
        recorded.define_metric("*", step_metric="tokens")
        num_sent = tell_missing(recorded, rows)
        if stage.made and recorded.summary.get(MADE) != stage.made[-1].digest:
            tell_references(recorded, stage.made, online=True)
            recorded.summary[MADE] = stage.made[-1].digest
        recorded.finish(exit_code=int(rows[-1]["step"] < stage.planned_steps))
    mark_synced(stage.path, identity)
    return f"{num_sent:,} of {len(rows):,} steps sent, run {identity}"


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """What training records, and nothing that was put into its file since."""
    return {key: value for key, value in row.items() if value is None or isinstance(value, (int, float))}


def sync_results(run: RunDirectory, monitor: MonitorConfig) -> str:
    """Send a pipeline's results where the server does not have them; returns what was done, in words."""
    identity = results_id(run)
    with session():
        recorded = start_results(run, monitor, "online")
        is_new = recorded.starting_step == 0
        if is_new:
            routing = Report(run).routing_matrix(None) if run.evaluation is not None else None
            tell_results(recorded, run, routing, online=True)
        recorded.finish(exit_code=0)
    mark_synced(run.path, identity)
    return f"results {'sent' if is_new else 'were sent before'}, run {identity}"


@contextmanager
def session() -> Iterator[None]:
    """For one run of W&B's: however the block ends, nothing of W&B's is left of it in this process.

    Raises:
        UserError: W&B reports an error.
    """
    import wandb

    try:
        yield
    except (UserError, wandb.errors.Error) as error:
        kill_service()
        raise UserError(f"sync: {describe(error)}") from None
    except BaseException:
        kill_service()
        raise
    finally:
        forget()


def mark_synced(output: Path, identity: str) -> None:
    """Have `wandb sync` pass over what was recorded offline and has been told now."""
    for file in output.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb"):
        file.with_name(f"{file.name}.synced").touch()
