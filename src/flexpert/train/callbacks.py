"""What happens around an optimiser step: evaluation, records, checkpoints. Each is small and knows nothing of the rest.

A callback's `after_step` may add to the step's row of metrics; callbacks run in the order of the list.
"""

import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexpert.checkpoint import distributed
from flexpert.config.groups import MonitorConfig
from flexpert.data.dataset import TokenWindows
from flexpert.model.flops import flops_per_token
from flexpert.monitor.devices import peak_flops
from flexpert.monitor.jsonl import MetricsLog
from flexpert.monitor.progress import TrainingProgress
from flexpert.monitor.wandb import WandbRun, wandb_mode
from flexpert.parallel.apply import reshard
from flexpert.parallel.environment import is_first, num_ranks
from flexpert.stage import comparable
from flexpert.train.compilation import eagerly

if TYPE_CHECKING:
    from flexpert.train.loop import Trainer

#: Allocations and frees that a memory snapshot holds, the newest: enough for some steps of a large model.
MEMORY_EVENTS = 1_000_000


class Callback:
    def before_run(self, trainer: "Trainer") -> None:
        """After a checkpoint was restored, before the first step."""

    def after_step(self, trainer: "Trainer", row: dict[str, Any]) -> None:
        """After every optimiser step; `trainer.step` counts it."""

    def after_run(self, trainer: "Trainer", failed: bool) -> None:
        """After the last step, or when the run ends early by an error (`failed`)."""


class ValidLoss(Callback):
    """Mean negative log-likelihood over some sequences of the valid split, always the same, every `interval` steps.

    It counts the tokens that training would: those that carry no loss are left out.
    """

    def __init__(self, windows: TokenWindows, interval: int, num_sequences: int) -> None:
        self.windows, self.interval = windows, interval
        self.num_sequences = min(num_sequences, windows.num_sequences)

    def after_step(self, trainer: "Trainer", row: dict[str, Any]) -> None:
        if trainer.step % self.interval and trainer.step != trainer.num_steps:
            return
        index, number = trainer.ranks.share
        size = trainer.config.train.microbatch_sequences
        sums = torch.zeros(2, dtype=torch.double, device=trainer.device)  # negative log-likelihood, targets
        with torch.no_grad(), eagerly(trainer.compiled):
            for start in range(0, self.num_sequences, size * number):
                first, left = start + index * size, self.num_sequences - start
                if number == 1:
                    sequences = self.windows.sequences(first, min(size, left))
                else:  # every rank has as many, for layers are computed together; what is too many does not count
                    sequences = self.windows.sequences(first, size)
                    is_extra = (torch.arange(first, first + size) >= self.num_sequences)[:, None]
                    sequences = torch.where(is_extra & (sequences >= 0), ~sequences, sequences)
                sums[0] += trainer.losses(sequences).nll
                sums[1] += (sequences[:, 1:] >= 0).sum()  # a negative id marks one that is not predicted
        reshard(trainer.model)
        total, num_targets = trainer.ranks.sum(sums).tolist()
        row["valid_loss"] = total / num_targets if num_targets else math.nan


class Utilisation(Callback):
    """Model FLOPs utilisation: the operations that a step needs, as a share of what the device could do meanwhile.

    None where the device's peak is not known.
    """

    def before_run(self, trainer: "Trainer") -> None:
        self.flops_per_token = flops_per_token(trainer.model, trainer.config.train.sequence_length).total
        peak = peak_flops(trainer.device)
        self.peak = None if peak is None else peak * num_ranks()

    def after_step(self, trainer: "Trainer", row: dict[str, Any]) -> None:
        row["mfu"] = None if self.peak is None else row["tokens_per_second"] * self.flops_per_token / self.peak


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
        finite = {key: v if v is not None and math.isfinite(v) else None for key, v in row.items()}
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
            counters = {"skipped_steps": trainer.skipped_steps, "skipped_in_a_row": trainer.skipped_in_a_row}
            extra = {**counters, "inputs": trainer.inputs}
            distributed.save(self.directory, trainer.step, trainer.model, trainer.optimizer, extra)
            if is_first():
                distributed.retain(self.directory, self.keep)


class Profile(Callback):
    """A Chrome trace of some steps, each under its number and with what the callbacks before this one do.

    Open it in https://ui.perfetto.dev or chrome://tracing.
    """

    def __init__(self, directory: Path, steps: tuple[int, int]) -> None:
        self.directory, self.steps = directory, steps
        self.profiler: torch.profiler.profile | None = None
        self.region = ExitStack()  # what marks the step

    def before_run(self, trainer: "Trainer") -> None:
        first, last = self.steps
        if not trainer.step < first <= trainer.num_steps:
            steps = f"steps {trainer.step + 1} to {trainer.num_steps}"
            print(f"note: monitor.profile_steps=[{first},{last}] is not traced: this run makes {steps}", flush=True)
        self.begin(trainer.step + 1, trainer.num_steps)

    def after_step(self, trainer: "Trainer", row: dict[str, Any]) -> None:
        self.region.close()
        if trainer.step == self.steps[1]:
            row |= self.write(trainer.step)
        self.begin(trainer.step + 1, trainer.num_steps)

    def after_run(self, trainer: "Trainer", failed: bool) -> None:
        self.region.close()
        self.write(trainer.step)  # where the run ends within the window

    def begin(self, step: int, num_steps: int) -> None:
        if step > num_steps:
            return
        if step == self.steps[0]:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        if self.profiler is not None:
            self.region.enter_context(torch.profiler.record_function(f"step {step}"))

    def write(self, step: int) -> dict[str, float]:
        """The trace; returns, where there are several processes, a step's seconds in collectives."""
        if self.profiler is None:
            return {}
        self.profiler.stop()
        self.directory.mkdir(exist_ok=True)
        path = self.directory / f"steps-{self.steps[0]}-{step}.json.gz"
        self.profiler.export_chrome_trace(str(path))
        print(f"profile in {path}", flush=True)
        spent = collective_seconds(self.profiler)
        self.profiler = None
        return {"communication_seconds": spent / max(1, step - self.steps[0] + 1)} if num_ranks() > 1 else {}


def collective_seconds(profiler: torch.profiler.profile) -> float:
    """Time in collectives, whether or not something else was computed beside them."""
    events = profiler.key_averages()
    on_gpu = sum(event.self_device_time_total for event in events if event.key.startswith("ncclDevKernel"))
    on_cpu = sum(event.cpu_time_total for event in events if event.key.startswith("gloo:"))
    return float(on_gpu + on_cpu) / 1e6


class MemorySnapshot(Callback):
    """The history of CUDA memory until after step `last_step`, or until the run fails, as for want of memory.

    Open it in https://pytorch.org/memory_viz.
    """

    def __init__(self, directory: Path, last_step: int) -> None:
        self.directory, self.last_step = directory, last_step
        self.recording = False

    def before_run(self, trainer: "Trainer") -> None:
        if trainer.device.type != "cuda":
            print("note: monitor.memory_snapshot needs CUDA: nothing is recorded", flush=True)
            return
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self.recording = True

    def after_step(self, trainer: "Trainer", row: dict[str, Any]) -> None:
        if trainer.step >= self.last_step:
            self.write()

    def after_run(self, trainer: "Trainer", failed: bool) -> None:
        self.write()

    def write(self) -> None:
        if self.recording:
            self.recording = False
            self.directory.mkdir(exist_ok=True)
            path = self.directory / "memory.pickle"
            torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
            print(f"memory snapshot in {path}", flush=True)


def diagnostics(config: MonitorConfig, output: Path) -> list[Callback]:
    """What the group `monitor` asks for beside the records."""
    callbacks: list[Callback] = []
    steps = config.profile_steps
    if config.memory_snapshot:
        callbacks.append(MemorySnapshot(output / "profile", steps[1] if steps is not None else 3))
    if steps is not None:
        callbacks.append(Profile(output / "profile", (steps[0], steps[1])))
    return callbacks
