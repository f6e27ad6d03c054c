"""The training loop of every stage that trains.

Shapes: B sequences of a microbatch, S positions, T = B·S tokens, D residual width.
"""

import contextlib
import faulthandler
import math
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexpert.checkpoint import distributed, envelope
from flexpert.config.stages import TrainingStage
from flexpert.data.dataset import DataManifest, TokenWindows, document_ids, targets_of
from flexpert.data.mixture import MixedWindows, mixture_digests, training_windows
from flexpert.data.prefetch import Prefetch
from flexpert.errors import UserError
from flexpert.lock import exclusive
from flexpert.model.accelerate import precision
from flexpert.model.loss import IGNORE, chunked_nll, router_z_sum
from flexpert.model.transformer import Transformer
from flexpert.monitor.stopwatch import Stopwatch
from flexpert.parallel.environment import is_first
from flexpert.parallel.process import is_of_others, on_first
from flexpert.parallel.ranks import ALONE, Ranks, clip_gradients
from flexpert.parallel.recompute import recompute_blocks
from flexpert.parallel.straggler import Straggler
from flexpert.parallel.tensor import local
from flexpert.records import canonical_json, sha256_hex
from flexpert.signals import Stopped, deferred, requested
from flexpert.stage import comparable
from flexpert.testing import reached
from flexpert.train.callbacks import Callback, Checkpoints, Records, Utilisation, ValidLoss, diagnostics
from flexpert.train.compilation import compiled, compiles
from flexpert.train.guard import Guard
from flexpert.train.optimizer import build_optimizer, project_biases, set_learning_rate


class Losses(NamedTuple):
    """Sums over the tokens of a microbatch, differentiable."""

    nll: Tensor
    z: Tensor
    router_z: Tensor


class Trainer:
    """Runs optimiser steps until `train.steps`.

    One step sums the losses of its microbatches and divides by the number of its target tokens, so that accumulation
    does not change the gradient. A step that `guard` objects to leaves the parameters as they are.

    Attributes:
        stopping: told to stop, all ranks alike.
        is_saved: whether the last step of this start is.
        unfinished: the row of a step that was cut short by that: it is to be evaluated when the run goes on.

    Args:
        model: on its device, with `requires_grad` set as it shall be trained.
        config: the stage's config.
        stage: its name.
        manifest: the data set that `config.data.dir` names.
        device: where to compute; bf16 autocast on CUDA, fp32 on the CPU.
        resolved: the resolved config, for the records.
        windows: sequences to train on; None: those of the manifest's train split.
        inputs: digests of what else the run is made from; a checkpoint of a run with other inputs is refused.
        ranks: the processes that train together.
    """

    def __init__(
        self,
        model: Transformer,
        config: TrainingStage,
        stage: str,
        manifest: DataManifest,
        device: torch.device,
        resolved: str,
        windows: TokenWindows | MixedWindows | None = None,
        inputs: dict[str, str] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.model, self.config, self.manifest, self.device = model, config, manifest, device
        self.output = Path(config.output_dir)
        self.num_steps = config.train.num_steps
        self.step = self.skipped_steps = self.skipped_in_a_row = 0
        self.straggler = Straggler(ranks)
        self.met = time.perf_counter()  # when this rank last met the others
        self.stopping = self.is_saved = False
        self.unfinished: dict[str, Any] | None = None
        self.wandb_id: str | None = None
        self.guard = Guard(config.train.spike_threshold, model.config.vocab)
        self.optimizer = build_optimizer(model, config.optim)
        num_sequences = self.num_steps * config.train.batch_sequences
        self.windows = windows or training_windows(
            config.data, config.train.sequence_length, config.seed, num_sequences
        )
        self.prefetch = Prefetch(
            self.windows, config.train.batch_sequences, self.num_steps, device.type == "cuda", ranks.share
        )
        recompute_blocks(model, config.train.recompute)
        self.compiled = compiles(config.train, model, device)
        self.inputs = {"data": manifest.digest, **mixture_digests(config.data), **(inputs or {})}
        self.inputs["configuration"] = sha256_hex(canonical_json(comparable(resolved)))
        self.checkpoints = self.output / "checkpoints"
        self.callbacks: list[Callback] = []
        if config.train.evaluation_interval is not None:
            length, sequences = config.train.sequence_length, config.train.evaluation_sequences
            valid = TokenWindows(manifest.directory, "valid", length, config.seed, loss_mask=True)
            self.callbacks.append(ValidLoss(valid, config.train.evaluation_interval, sequences))
        self.callbacks.append(Utilisation())
        self.records: Records | None = None

        def write_records() -> None:
            self.callbacks.extend(diagnostics(config.monitor, self.output))
            self.records = Records(stage, self.output, config.monitor, resolved)
            self.callbacks.append(self.records)

        on_first(write_records)
        if config.checkpoint.interval is not None:
            self.callbacks.append(Checkpoints(self.checkpoints, config.checkpoint, self.records))

    @property
    def ending(self) -> bool:
        """Whether the run ends after this step, be it the last or not."""
        return self.stopping or self.skipped_in_a_row >= self.config.train.max_skipped

    def content(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors. Schedule and data follow from the step."""
        return {
            "tokens": self.step * self.config.train.batch_tokens,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "guard": self.guard.state(),
            "unfinished": self.unfinished,
            "wandb_id": self.wandb_id,
            "inputs": self.inputs,
        }

    def restore(self) -> None:
        """Go on from the newest checkpoint that is whole, if there is one.

        Raises:
            UserError: all are damaged, or the data or the base was replaced since; there is no room for the next.
        """
        reached("restore")
        self.key = b""

        def open_checkpoints() -> None:
            if self.config.checkpoint.interval is not None or envelope.steps(self.checkpoints):
                self.key = envelope.open_key(self.checkpoints)
                envelope.sweep(self.checkpoints)

        on_first(open_checkpoints)
        record = distributed.load(self.checkpoints, self.key, self.model, self.optimizer, self.accept)
        if record is not None:
            self.step, self.skipped_steps = record["step"], record["skipped_steps"]
            self.skipped_in_a_row, self.unfinished = record["skipped_in_a_row"], record["unfinished"]
            self.wandb_id = record["wandb_id"]
            self.guard.restore(record["guard"])
            print(f"resuming {self.output} from step {self.step}", flush=True)
        if self.config.checkpoint.interval is not None and self.step < self.num_steps:
            num_bytes = distributed.checkpoint_bytes(self.model)
            on_first(lambda: envelope.check_room(self.checkpoints, num_bytes, self.config.checkpoint.keep_every))

    def accept(self, record: dict[str, Any]) -> None:
        """Raises `UserError` where a checkpoint is of a run with another configuration, other data or another base."""
        for name, digest in self.inputs.items():
            if record["inputs"].get(name) != digest:
                raise UserError(f"{self.output} was begun with another {name}: choose another output_dir")

    def run(self) -> None:
        """Restore, then train to the last step.

        Raises:
            UserError: as `restore`; another process trains in this directory; `train.max_skipped` steps in a row were
                skipped.
            Stopped: told to stop; the run was saved, and goes on when it is started again.
        """
        reached("startup")
        with contextlib.ExitStack() as stack:

            def lock() -> None:
                stack.enter_context(exclusive(self.output))

            on_first(lock)
            self.restore()
            self.tell_repetition()
            self.model.train()
            stack.enter_context(deferred())
            self.failed = True
            for callback in self.callbacks:
                callback.before_run(self)
                stack.callback(self.leave, callback)
            if any(self.ranks.any(requested())):
                raise Stopped  # there is nothing to save yet
            with compiled(self.model, self.compiled), self.prefetch, self.watchdog():
                if self.unfinished is not None:
                    row, self.unfinished = self.unfinished, None
                    self.after_step(row)
                while self.step < self.num_steps:
                    with self.compiling():
                        row = self.optimizer_step()
                    self.after_step(row)
            self.failed = False
            if self.ranks.meshes is not None:
                peaks = ", ".join(f"{peak / 2**20:,.0f}" for peak in self.ranks.every(peak_memory(self.device)))
                print(f"peak memory of ranks 0, 1, …: {peaks} MiB", flush=True)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Around a step, the first of which waits for compilers.

        Schedulers send their signals to these, too, and they do not outlive them.

        Raises:
            Stopped: the step failed after this process was told to stop; it had changed nothing.
        """
        try:
            yield
        except Exception as error:
            if not requested() or isinstance(error, UserError) or is_of_others(error):
                raise
            reason = next(iter(str(error).splitlines()), "")
            print(
                f"flexpert: told to stop within a step, which ended with {type(error).__name__}: {reason}; "
                "started again, it goes on from its last checkpoint",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            raise Stopped from error

    def leave(self, callback: Callback) -> None:
        callback.after_run(self, self.failed)

    def after_step(self, row: dict[str, Any]) -> None:
        """What follows an update.

        Raises:
            UserError, Stopped: as `run`.
        """
        for callback in self.callbacks:
            callback.after_step(self, row)
        if self.step % self.config.monitor.log_interval == 0:
            slow = self.straggler.look(self.device)
            if slow is not None:
                print(f"note: step {self.step}: {slow}", flush=True)
        if self.stopping:
            if is_first():
                saved = f"saved step {self.step}" if self.is_saved else "nothing saved"
                print(f"flexpert: told to stop; {saved}; started again, it goes on", file=sys.stderr, flush=True)
            raise Stopped
        if self.ending:
            count = self.skipped_in_a_row
            skipped = "a step was" if count == 1 else f"{count} steps in a row were"
            raise UserError(
                f"{skipped} skipped: lower optim.lr (now {self.config.optim.lr}), "
                f"look at the data that {self.output / 'skipped.jsonl'} names, or raise train.spike_threshold"
            )
        self.arm()

    @contextlib.contextmanager
    def watchdog(self) -> Iterator[None]:
        """While the block runs, a step that takes longer than `train.step_timeout` ends the process.

        It works where Python is stuck, too: one thread of C's prints, and a signal that nobody handles ends it.
        """
        self.arm()
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()

    def arm(self) -> None:
        if self.config.train.step_timeout is not None:
            faulthandler.dump_traceback_later(self.config.train.step_timeout)
            signal.setitimer(signal.ITIMER_REAL, self.config.train.step_timeout + 1)  # its SIGALRM ends the process

    def tell_repetition(self) -> None:
        """The default step is that of a 7B run: a forgotten train.batch_tokens would be hours without a word."""
        available, step = self.windows.num_tokens, self.config.train.batch_tokens
        if step > available:
            print(
                f"note: one step of train.batch_tokens={step:,} reads the {available:,} tokens of the data "
                f"{step / available:,.0f} times",
                flush=True,
            )

    def losses(self, sequences: Tensor) -> Losses:
        """Loss sums of [B, S+1] sequences."""
        reached("forward", self.step + 1)
        sequences = sequences.to(self.device, non_blocking=True)
        tokens_BS, targets_BS = targets_of(sequences)
        targets_T = targets_BS.flatten()
        counts_T = targets_T >= 0
        targets_T = targets_T.masked_fill(~counts_T, IGNORE)
        own_T = self.ranks.own_positions(targets_BS).flatten() >= 0
        ids = document_ids(tokens_BS, self.manifest.eos_id) if self.config.data.intra_document_attention else None
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.device.type == "cuda":
            autocast = torch.autocast("cuda", torch.bfloat16)
        with autocast, precision(self.model.config):
            hidden = self.model(tokens_BS, document_ids_BS=ids)
            stream_TD = hidden.stream_BSD.flatten(0, 1)
            chunk = self.config.train.loss_chunk_tokens
            weight_VD = local(self.model.head.weight)
            vocabulary = self.ranks.vocabulary(len(weight_VD))
            nll_T, lse_T = chunked_nll(stream_TD, weight_VD, targets_T, chunk, vocabulary)
        router_z = router_z_sum(hidden.routings, own_T) if hidden.routings else nll_T.new_zeros(())
        return Losses(nll_T.sum(), (lse_T.square() * counts_T).sum(), router_z)

    def optimizer_step(self) -> dict[str, Any]:
        """One update over `train.batch_tokens` tokens; returns its row of metrics."""
        started, watch = time.perf_counter(), Stopwatch(self.device)
        config, train = self.config, self.config.train
        lr = set_learning_rate(self.optimizer, config.optim, self.step, self.num_steps)
        sequences = self.prefetch.take(self.step)
        self.straggler.waited(time.perf_counter() - self.met)
        counted = self.ranks.sum((sequences[:, 1:] >= 0).sum().to(self.device))
        num_targets = max(1, int(counted))
        watch.end("data")
        sums = torch.zeros(3, device=self.device)
        for start in range(0, len(sequences), train.microbatch_sequences):
            losses = self.losses(sequences[start : start + train.microbatch_sequences])
            total = losses.nll + train.z_loss * losses.z + train.router_z_loss * losses.router_z
            reached("backward", self.step + 1)
            torch.autograd.backward(total / num_targets)
            sums += torch.stack([part.detach() for part in losses])
        watch.end("compute")
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        max_norm = config.optim.grad_clip if config.optim.grad_clip is not None else float("inf")
        grad_norm = clip_gradients(parameters, max_norm)
        sums = torch.cat([self.ranks.sum(sums[:2]), self.ranks.sum(sums[2:], of_positions=True)])
        nll, z, router_z = (sums / num_targets).tolist()
        judged = (nll if math.isfinite(z + router_z) else math.nan, float(grad_norm))
        objection = self.guard.objection(*judged)
        is_skipped, self.stopping = self.ranks.any(objection is not None, requested())
        self.met = time.perf_counter()
        if not is_skipped:
            reached("optimizer", self.step + 1)
            self.guard.accept(*judged)
            self.optimizer.step()
            project_biases(self.model)
            self.skipped_in_a_row = 0
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
        self.optimizer.zero_grad()
        watch.end("optimizer")
        self.step += 1
        seconds = time.perf_counter() - started
        row = {
            "step": self.step,
            "tokens": self.step * train.batch_tokens,
            "loss": nll,
            "z_loss": z,
            "router_z_loss": router_z,
            "grad_norm": judged[1],
            "lr": lr,
            "skipped_steps": self.skipped_steps,
            "step_seconds": seconds,
            **{f"{part}_seconds": spent for part, spent in watch.seconds().items()},
            "tokens_per_second": train.batch_tokens / seconds,
            "peak_memory_bytes": peak_memory(self.device),
        }
        return row | {"objection": objection or "another rank objects"} if is_skipped else row


def peak_memory(device: torch.device) -> int:
    """Largest memory so far, bytes: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, IndexError):  # a process that was forked has its parent's size in `getrusage`
        return int(Path("/proc/self/status").read_text(encoding="ascii").partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
