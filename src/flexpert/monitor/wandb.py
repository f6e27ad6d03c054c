"""Weights & Biases, as a copy of `metrics.jsonl`: offline unless a key is set, and no more than an allowlist leaves."""

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from flexpert.config.groups import MonitorConfig
from flexpert.errors import UserError

#: Groups and keys whose numbers and switches W&B may see. Paths, titles, prompts and anything new stay here.
ALLOWED_GROUPS = ("model.", "optim.", "train.")
ALLOWED_KEYS = ("router.bias", "seed")
#: Keys whose text it may see: choices and the expert's id.
ALLOWED_TEXT = ("optim.schedule", "train.device", "router.init", "name")


def is_allowed(key: str, value: Any) -> bool:
    """Whether one {dotted key: value} may be uploaded."""
    if isinstance(value, str):
        return key in ALLOWED_TEXT and "/" not in value
    if not (key in ALLOWED_KEYS or key.startswith(ALLOWED_GROUPS)):
        return False
    return all(
        item is None or isinstance(item, (int, float)) for item in (value if isinstance(value, list) else [value])
    )


def allowed_config(flat: dict[str, Any]) -> dict[str, Any]:
    """The part of {dotted key: value} that may be uploaded."""
    return {key: value for key, value in flat.items() if is_allowed(key, value)}


def wandb_mode(config: MonitorConfig) -> str:
    """off, offline or online. Raises `UserError` when W&B is asked for by name and is not installed."""
    installed = importlib.util.find_spec("wandb") is not None
    if config.wandb == "auto":
        site = os.environ.get("WANDB_MODE", "")
        if not installed or site == "disabled":
            return "off"
        return "online" if os.environ.get("WANDB_API_KEY") and site != "offline" else "offline"
    if config.wandb != "off" and not installed:
        raise UserError(f"monitor.wandb={config.wandb} needs the wandb extra: pip install flexpert[wandb]")
    return config.wandb


def run_id(output: Path, resolved: str) -> str:
    """The same for a run that is started again in its directory, so that W&B continues it."""
    return hashlib.sha256(f"{output.resolve()}\n{resolved}".encode()).hexdigest()[:16]


def start_run(
    config: MonitorConfig, mode: str, stage: str, output: Path, flat: dict[str, Any], identity: str | None = None
) -> Any:
    """A run of W&B's.

    Args:
        config: the group `monitor`.
        mode: offline or online.
        stage: job type.
        output: the stage's directory; W&B's files go below it.
        flat: the whole config; filtered here.
        identity: of `run_id`; None: that of the config.
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    settings = wandb.Settings(
        console="off",
        host="-",  # left out, it is this machine's name
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
        silent=True,
    )
    try:
        return wandb.init(
            mode="online" if mode == "online" else "offline",
            id=identity or run_id(output, repr(sorted(allowed_config(flat).items()))),
            resume="allow" if mode == "online" else None,
            project=config.project,
            entity=config.entity,
            group=config.group,
            job_type=stage,
            name=f"{stage}-{flat['name']}" if "name" in flat else stage,
            dir=str(output),
            config=allowed_config(flat),
            settings=settings,
        )
    except wandb.errors.Error as error:  # a key that is missing or refused, a server that is not there
        reason = str(error).splitlines()[0]
        raise UserError(f"W&B: {reason}; monitor.wandb=offline goes on without its server") from None


class WandbRun:
    """The run of a stage that trains; arguments as those of `start_run`."""

    def __init__(self, config: MonitorConfig, mode: str, stage: str, output: Path, flat: dict[str, Any]) -> None:
        self.run = start_run(config, mode, stage, output, flat)
        self.run.define_metric("*", step_metric="tokens")

    def log(self, row: dict[str, Any]) -> None:
        self.run.log(row, step=row["step"])

    def close(self, failed: bool = False) -> None:
        """W&B shows a run as finished or, with an exit code other than 0, as failed."""
        self.run.finish(exit_code=int(failed))
