"""What happens around an optimiser step: evaluation, records, checkpoints. Each is small and knows nothing of the rest.

A callback's `after_step` may add to the step's row of metrics; callbacks run in the order of the list.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexpert.checkpoint.distributed import Saver
from flexpert.config.groups import CheckpointConfig, MonitorConfig
from flexpert.data.dataset import TokenWindows
from flexpert.errors import UserError
from flexpert.model.flops import flops_per_token
from flexpert.monitor.devices import peak_flops
from flexpert.monitor.jsonl import MetricsLog
from flexpert.monitor.progress import TrainingProgress
from flexpert.monitor.wandb import WandbRun, wandb_mode
from flexpert.parallel.apply import reshard
from flexpert.parallel.environment import num_ranks
from flexpert.signals import requested
from flexpert.stage import comparable
from flexpert.testing import reached
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
        with eagerly(trainer.compiled), torch.no_grad():
            sums = self.sums(trainer)
        reshard(trainer.model)
        if not trainer.stopping:
            total, num_targets = trainer.ranks.sum(sums).tolist()
            row["valid_loss"] = total / num_targets if num_targets else math.nan
        else:
            trainer.unfinished = row

    def sums(self, trainer: "Trainer") -> torch.Tensor:
        """Negative log-likelihood and targets of this rank's sequences, float64 [2]; cut short where the run stops."""
        index, number = trainer.ranks.share
        size = trainer.config.train.microbatch_sequences
        sums = torch.zeros(2, dtype=torch.double, device=trainer.device)
        for start in range(0, self.num_sequences, size * number):
            reached("evaluation", trainer.step)
            (stopping,) = trainer.ranks.any(trainer.stopping or requested())
            if stopping:
                trainer.stopping = True
                break
            first, left = start + index * size, self.num_sequences - start
            if number == 1:
                sequences = self.windows.sequences(first, min(size, left))
            else:  # every rank has as many, for layers are computed together; what is too many does not count
                sequences = self.windows.sequences(first, size)
                is_extra = (torch.arange(first, first + size) >= self.num_sequences)[:, None]
                sequences = torch.where(is_extra & (sequences >= 0), ~sequences, sequences)
            sums[0] += trainer.losses(sequences).nll
            sums[1] += (sequences[:, 1:] >= 0).sum()  # a negative id marks one that is not predicted
        return sums


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
    """`metrics.jsonl`, W&B and the terminal, from the same row; and `skipped.jsonl`, of steps that were not taken."""

    def __init__(self, stage: str, output: Path, config: MonitorConfig, resolved: str) -> None:
        self.stage, self.output, self.config, self.resolved = stage, output, config, resolved
        self.mode = wandb_mode(config)

    def before_run(self, trainer: "Trainer") -> None:
        last_step = trainer.step if trainer.unfinished is None else trainer.step - 1
        self.log = MetricsLog(self.output / "metrics.jsonl", last_step)
        path = self.output / "skipped.jsonl"
        self.skipped = MetricsLog(path, last_step) if path.exists() else None
        flat = comparable(self.resolved)
        self.wandb = None
        if self.mode != "off":
            self.wandb = WandbRun(self.config, self.mode, self.stage, self.output, flat, trainer.wandb_id)
            trainer.wandb_id = self.wandb.id
        title = f"{self.stage} {self.output}"
        self.progress = TrainingProgress(title, trainer.step, trainer.num_steps, self.config.log_interval)

    def after_step(self, trainer: "Trainer", row: dict[str, Any]) -> None:
        if trainer.unfinished is not None:  # it is written when the run goes on
            return
        if (reason := row.pop("objection", None)) is not None:
            self.tell_skipped(trainer, reason)
        finite = {key: v if v is not None and math.isfinite(v) else None for key, v in row.items()}
        self.log.write(finite)
        if self.wandb is not None:
            self.wandb.log(finite)
        self.progress.update(row)

    def tell_skipped(self, trainer: "Trainer", reason: str) -> None:
        count = trainer.config.train.batch_sequences
        origins = trainer.windows.origins((trainer.step - 1) * count, count)
        self.skipped = self.skipped or MetricsLog(self.output / "skipped.jsonl", trainer.step - 1)
        self.skipped.write({"step": trainer.step, "reason": reason, "sequences": origins})
        where = f"{origins[0]} and {count - 1} more sequences, in {self.output / 'skipped.jsonl'}"
        print(f"step {trainer.step}: {reason}; the step is skipped ({where})", flush=True)

    def sync(self) -> bool:
        """Whether all rows are on the disk."""
        return all(log.sync() for log in (self.log, self.skipped) if log is not None)

    def after_run(self, trainer: "Trainer", failed: bool) -> None:
        self.log.close()
        if self.skipped is not None:
            self.skipped.close()
        self.progress.close()
        if self.wandb is not None:
            self.wandb.close(failed)


class Checkpoints(Callback):
    """Save every `interval` steps, after the last, and before the run ends for another reason.

    A checkpoint that cannot be written costs the run nothing but that; only the last one has to be.

    Args:
        directory: of the checkpoints.
        config: the group `checkpoint`.
        records: on the first rank; no checkpoint stands for rows that are not on the disk.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, records: Records | None) -> None:
        self.directory, self.config, self.records = directory, config, records

    def before_run(self, trainer: "Trainer") -> None:
        self.saver = Saver(self.directory, trainer.key, self.config, trainer.device.type == "cuda")
        self.newest = trainer.step

    def after_step(self, trainer: "Trainer", row: dict[str, Any]) -> None:
        assert self.config.interval is not None
        is_last = trainer.ending or trainer.step == trainer.num_steps
        if (is_last or trainer.step % self.config.interval == 0) and trainer.step != self.newest:
            self.tell(self.saver.wait())
            is_logged = self.records is None or self.records.sync()
            self.saver.save(trainer.step, trainer.model, trainer.optimizer, trainer.content(), is_logged)
            self.newest = trainer.step
        failure = self.saver.wait() if is_last else None
        trainer.is_saved = is_last and failure is None
        if trainer.stopping:
            self.tell(failure)
        elif failure is not None:
            raise UserError(f"{self.directory}: step {self.newest} could not be saved: {failure.strerror}; make room")

    def tell(self, failure: OSError | None) -> None:
        if failure is not None:
            print(f"warning: step {self.newest} could not be saved: {failure.strerror}", flush=True)

    def after_run(self, trainer: "Trainer", failed: bool) -> None:
        self.saver.close()


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
        with unless_full("the profile"):
            self.directory.mkdir(exist_ok=True)
            path = self.directory / f"steps-{self.steps[0]}-{step}.json.gz"
            self.profiler.export_chrome_trace(str(path))
            print(f"profile in {path}", flush=True)
        spent = collective_seconds(self.profiler)
        self.profiler = None
        return {"communication_seconds": spent / max(1, step - self.steps[0] + 1)} if num_ranks() > 1 else {}


@contextmanager
def unless_full(what: str) -> Iterator[None]:
    """What a run can do without does not end it."""
    try:
        yield
    except OSError as error:
        print(f"note: {what} could not be written: {error.strerror}", flush=True)


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
            with unless_full("the memory snapshot"):
                self.directory.mkdir(exist_ok=True)
                path = self.directory / "memory.pickle"
                torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
                print(f"memory snapshot in {path}", flush=True)
            torch.cuda.memory._record_memory_history(enabled=None)


def diagnostics(config: MonitorConfig, output: Path) -> list[Callback]:
    """What the group `monitor` asks for beside the records."""
    callbacks: list[Callback] = []
    steps = config.profile_steps
    if config.memory_snapshot:
        callbacks.append(MemorySnapshot(output / "profile", steps[1] if steps is not None else 3))
    if steps is not None:
        callbacks.append(Profile(output / "profile", (steps[0], steps[1])))
    return callbacks
