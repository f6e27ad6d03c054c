"""What happens around an optimiser step: evaluation, records, checkpoints. Each is small and knows nothing of the rest.

A callback's `after_step` may add to the step's row of metrics; callbacks run in the order of the list.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexpert.checkpoint import distributed
from flexpert.config.groups import MonitorConfig
from flexpert.data.dataset import TokenWindows
from flexpert.monitor.jsonl import MetricsLog
from flexpert.monitor.progress import TrainingProgress
from flexpert.monitor.wandb import WandbRun, wandb_mode
from flexpert.stage import comparable

if TYPE_CHECKING:
    from flexpert.train.loop import Trainer


class Callback:
    def before_run(self, trainer: "Trainer") -> None:
        """After a checkpoint was restored, before the first step."""

    def after_step(self, trainer: "Trainer", row: dict[str, Any]) -> None:
        """After every optimiser step; `trainer.step` counts it."""

    def after_run(self, trainer: "Trainer", failed: bool) -> None:
        """After the last step, or when the run ends early by an error (`failed`)."""


class ValidLoss(Callback):
    """Mean negative log-likelihood over some sequences of the valid split, always the same, every `interval` steps."""

    def __init__(self, windows: TokenWindows, interval: int, num_sequences: int) -> None:
        self.windows, self.interval = windows, interval
        self.num_sequences = min(num_sequences, windows.num_sequences)

    def after_step(self, trainer: "Trainer", row: dict[str, Any]) -> None:
        if trainer.step % self.interval and trainer.step != trainer.num_steps:
            return
        total = 0.0
        size = trainer.config.train.microbatch_sequences
        with torch.no_grad():
            for start in range(0, self.num_sequences, size):
                sequences = self.windows.sequences(start, min(size, self.num_sequences - start))
                total += trainer.losses(sequences).nll.item()
        row["valid_loss"] = total / (self.num_sequences * self.windows.length)


class Records(Callback):
    """`metrics.jsonl`, W&B and the terminal, from the same row."""

    def __init__(self, stage: str, output: Path, config: MonitorConfig, resolved: str) -> None:
        self.stage, self.output, self.config, self.resolved = stage, output, config, resolved
        self.mode = wandb_mode(config)

    def before_run(self, trainer: "Trainer") -> None:
        self.log = MetricsLog(self.output / "metrics.jsonl", trainer.step)
        flat = comparable(self.resolved)
        self.wandb = WandbRun(self.config, self.mode, self.stage, self.output, flat) if self.mode != "off" else None
        title = f"{self.stage} {self.output}"
        self.progress = TrainingProgress(title, trainer.step, trainer.num_steps, self.config.log_interval)

    def after_step(self, trainer: "Trainer", row: dict[str, Any]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self.log.write(finite)
        if self.wandb is not None:
            self.wandb.log(finite)
        self.progress.update(row)

    def after_run(self, trainer: "Trainer", failed: bool) -> None:
        self.log.close()
        self.progress.close()
        if self.wandb is not None:
            self.wandb.close(failed)


class Checkpoints(Callback):
    """Save every `interval` steps and after the last, keep the `keep` newest."""

    def __init__(self, directory: Path, interval: int, keep: int) -> None:
        self.directory, self.interval, self.keep = directory, interval, keep

    def after_step(self, trainer: "Trainer", row: dict[str, Any]) -> None:
        if trainer.step % self.interval == 0 or trainer.step == trainer.num_steps:
            extra = {"skipped_steps": trainer.skipped_steps, "inputs": trainer.inputs}
            distributed.save(self.directory, trainer.step, trainer.model, trainer.optimizer, extra)
            distributed.retain(self.directory, self.keep)
