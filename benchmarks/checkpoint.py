"""What saving checkpoints costs: the stall that training sees, timed here, and the goodput of the 37B runs, projected.

    python benchmarks/checkpoint.py [--sizes 10M 60M] [--repeats 7] [--directory DIR]    (about six quiet minutes)

Stall: dense models of train_step.py train in fp32, and their state (parameters, AdamW's moments, generators) is saved
by Flexpert and by PyTorch's ways, in turns within one run. Where a save returns before its bytes are on the disk, steps
go on beside the writing; how much longer they are than others counts as stall, too. Medians are taken. Goodput: the
exact formula of `flexpert.planning.goodput`, whose test compares it with a simulated run, with what `flexpert plan`
projects for each stage up to 37B, at a failure every three hours. Needs a quiet machine for the first part, and free
disk space of four checkpoints of the largest size (about 2 GB). Prints tables in Markdown and writes them to
`benchmarks/results/checkpoint.md`.
"""

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, staging, state_dict_saver
from train_step import SIZES, Side, batch_of, timed, write_model

from flexpert.checkpoint import envelope
from flexpert.checkpoint.distributed import Saver, generators, trained_state
from flexpert.checkpoint.huggingface import load_model
from flexpert.checkpoint.store import fsync_path
from flexpert.config.compose import compose
from flexpert.config.groups import CheckpointConfig
from flexpert.model.loss import chunked_nll
from flexpert.planning import goodput
from flexpert.planning.goodput import Saving, saving_of
from flexpert.planning.job import jobs_of
from flexpert.planning.plan import seconds
from flexpert.planning.search import choices_of

RESULT = Path(__file__).parent / "results/checkpoint.md"
INTERVAL = CheckpointConfig().interval or 0
#: Nodes of the projected runs: `plan`'s own choice, and so many that three hours between failures are common.
NODES = (8, 128)


class Training(Side):
    """Of a dense model, as in train_step.py."""

    def __init__(self, directory: Path) -> None:
        self.model = load_model(directory)[0].requires_grad_(True).train()
        super().__init__(self.model, self.nll)

    def nll(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model(batch[:, :-1])
        nll_T, _ = chunked_nll(hidden.stream_BSD.flatten(0, 1), self.model.head.weight, batch[:, 1:].flatten())
        return nll_T.mean(), nll_T.mean().detach()

    def state(self) -> dict[str, Any]:
        return {**trained_state(self.model, self.optimizer), "generators": generators()}


class Ways:
    """Ways to save the state of a training. Each returns None when it is on the disk, or a future that says when.

    Args:
        folder: an empty one, for what they write.
    """

    def __init__(self, training: Training, folder: Path) -> None:
        self.training, self.peer, self.own = training, folder / "peer", folder / "own"
        self.saver = Saver(self.own, envelope.open_key(self.own), CheckpointConfig(keep=2))
        self.stager = staging.DefaultStager(staging.StagingOptions(False, False, False, False))
        self.step = 0
        self.by_name: dict[str, Callable[[], Future[Any] | None]] = {
            "`torch.save`, fsync": self.torch_save,
            "`dcp.save`, fsync": self.dcp_save,
            "Flexpert, waited for": self.waited_for,
            "`dcp.async_save`": self.async_save,
            "`dcp.async_save`, its copy's memory kept": lambda: self.async_save(self.stager),
            "**Flexpert**": self.save,
        }

    def torch_save(self) -> None:
        with open(self.peer / "state.pt", "wb") as file:
            torch.save(self.training.state(), file)
            file.flush()
            os.fsync(file.fileno())
        fsync_path(self.peer)

    def dcp_save(self) -> None:
        writer = filesystem.FileSystemWriter(self.peer, sync_files=True)
        state_dict_saver.save(self.training.state(), storage_writer=writer, no_dist=True)
        fsync_path(self.peer)

    def async_save(self, stager: staging.DefaultStager | None = None) -> Future[Any]:
        state = self.training.state()
        future = state_dict_saver.async_save(state, checkpoint_id=self.peer, async_stager=stager, no_dist=True)
        assert isinstance(future, Future)
        return future

    def save(self) -> Future[None]:
        assert self.saver.wait() is None
        self.step += 1
        self.saver.save(self.step, self.training.model, self.training.optimizer, {})
        assert self.saver.pending is not None
        return self.saver.pending

    def waited_for(self) -> None:
        self.save().result()


@dataclass
class Saves:
    """Of one way, each list one save after another, in seconds.

    Attributes:
        stall: until the call returned.
        steps: those that began before all was on the disk.
        written: until all was on the disk.
        num_bytes: of the files.
    """

    stall: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    written: list[float] = field(default_factory=list)
    num_bytes: int = 0

    def longer(self, step: float) -> list[float]:
        """How much longer the steps beside the writing took together than as many alone."""
        return [sum(steps) - len(steps) * step for steps in self.steps]


def save_once(ways: Ways, name: str, batch: Tensor, to: Saves) -> None:
    shutil.rmtree(ways.peer, ignore_errors=True)
    ways.peer.mkdir()
    ended: list[float] = []
    started = time.perf_counter()
    future = ways.by_name[name]()
    to.stall.append(time.perf_counter() - started)
    to.steps.append([])
    if future is None:
        ended.append(started + to.stall[-1])
    else:
        future.add_done_callback(lambda _: ended.append(time.perf_counter()))
        while not ended:
            to.steps[-1].append(timed(ways.training, batch))
        future.result()
    to.written.append(ended[0] - started)
    files = ways.peer if any(ways.peer.iterdir()) else envelope.step_path(ways.own, ways.step)
    to.num_bytes = sum(path.stat().st_size for path in files.iterdir())


def measure(size: str, repeats: int, folder: Path) -> tuple[list[float], dict[str, Saves], float]:
    """Seconds of steps without a save, the saves of each way, and the stall of Flexpert's first save."""
    batch = batch_of(SIZES[size])
    write_model(SIZES[size], "dense", folder / "model")
    training = Training(folder / "model")
    training.step(batch)
    ways = Ways(training, folder)
    started = time.perf_counter()
    ways.save()
    first = time.perf_counter() - started
    plain: list[float] = []
    saves: dict[str, Saves] = {}
    for repeat in range(repeats + 1):
        if repeat <= 1:  # a first round is warming up, and does not count
            plain, saves = [], {name: Saves() for name in ways.by_name}
        for name in ways.by_name:
            plain.append(timed(training, batch))
            save_once(ways, name, batch, saves[name])
    ways.saver.close()
    ways.stager.close()
    return plain, saves, first


def stall_rows(size: str, plain: list[float], saves: dict[str, Saves]) -> list[str]:
    step = statistics.median(plain)
    rows, peer = [], 0.0
    for name, of in saves.items():
        longer = of.longer(step)
        exposed = [stall + more for stall, more in zip(of.stall, longer, strict=True)]
        median, written = statistics.median(exposed), statistics.median(of.written)
        peer = peer or median  # the first
        cells = [
            size, name, f"{1e3 * statistics.median(of.stall):,.1f}",
            f"{1e3 * statistics.median(longer):,.1f}" if any(of.steps) else "",
            f"{1e3 * median:,.1f} ({1e3 * min(exposed):,.1f} to {1e3 * max(exposed):,.1f})",
            f"{median / step:.1%}", f"{median / step / INTERVAL:.3%}", f"{1e3 * written:,.0f}",
            f"{of.num_bytes / written / 1e9:.2f}", f"{median / peer:.2f}",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def stall_part(sizes: list[str], repeats: int, directory: Path) -> list[str]:
    rows, facts = [], []
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=directory, prefix="checkpoint-benchmark-") as folder:
            plain, saves, first = measure(size, repeats, Path(folder))
        rows += stall_rows(size, plain, saves)
        low, middle, high = (1e3 * at(plain) for at in (min, statistics.median, max))
        facts.append(
            f"{size}: a step without a save takes {middle:,.1f} ms ({low:,.1f} to {high:,.1f}), a checkpoint has "
            f"{saves['**Flexpert**'].num_bytes:,} bytes; the run's first save, which gets the memory for the copy, "
            f"stalls for {1e3 * first:,.1f} ms."
        )
    return [
        f"Stall of a save, fp32, one process on a CPU; medians of {repeats} (least to most) in turns within one run.",
        *facts,
        "The thread that writes, hashes and flushes shares two cores with the steps, which use both: `steps longer` is",
        "that. Where GPUs compute and a host has cores to spare, the copy (`stall`) is what is left. `exposed` is both",
        f"together, also as a share of one step, and of all where every {INTERVAL}th is saved (the default). GB/s: of",
        "the files, until they are on the disk, beside steps where the save does not wait. Flexpert hashes each byte.",
        "",
        f"| size | | stall, ms | steps longer, ms | exposed, ms | of a step | of {INTERVAL} steps | on the disk after, "
        "ms | GB/s | ratio of exposed |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def intervals(saving: Saving, waiting: Saving) -> list[int]:
    """Around the best one, that of saves that are waited for, and the default."""
    best = saving.best_interval()
    return sorted({max(1, best // 2), best, 2 * best, 4 * best, waiting.best_interval(), INTERVAL})


def goodput_rows(nodes: int) -> list[str]:
    config, _ = compose("plan", ["model=flex_37b", f"nodes={nodes}"])
    rows = []
    for job in jobs_of(config):
        saving = saving_of(choices_of(job, config)[0], config)
        waiting = replace(saving, stall=saving.stall + saving.write, write=0.0)
        best = [saving.best_interval(), waiting.best_interval()]
        for interval in intervals(saving, waiting):
            shares = [
                f"**{of.goodput(interval):.2%}**" if interval == at else f"{of.goodput(interval):.2%}"
                for of, at in zip((saving, waiting), best, strict=True)
            ]
            every = max(interval * saving.step, saving.write) + saving.stall
            cells = [
                job.stage, f"{nodes * config.cluster.gpus_per_node}", seconds(saving.step), f"{saving.stall:.3f}",
                seconds(saving.write), f"{saving.restart:.0f}", f"{interval}", f"{interval * saving.step:,.0f}",
                *shares, f"{saving.goodput(interval) / waiting.goodput(interval):.3f}", f"{saving.write / every:.0%}",
            ]  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def goodput_part() -> list[str]:
    return [
        "Goodput, the share of the time that goes into steps that count: projected by the exact formula, measured by",
        f"no run. The stages up to flex_37b on H100s, failing every {goodput.HOURS_BETWEEN_FAILURES:g} h on average",
        "(exponential, of the whole run, also while it starts again). From `flexpert plan`: the step, the bytes, and a",
        f"file system of 10 GB/s. Assumed: each GPU copies its part to the host at {goodput.HOST_COPY_GBS:g} GB/s, and",
        f"a save costs {goodput.SAVE_SECONDS:g} s more; a restart takes {goodput.RESTART_SECONDS:.0f} s, and reads the",
        "checkpoint twice and what is frozen once, at 10 GB/s; steps beside the writing are no longer than others. A",
        "failure during the writing costs the steps since the checkpoint before. The peer is the same save waited for.",
        "Bold: the best interval of each.",
        "Busy: the file system, with the saves of this run alone.",
        "",
        "| stage | GPUs | step, s | stall, s | write, s | restart, s | interval | s of steps | Flexpert | waited for | "
        "ratio | busy |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(row for nodes in NODES for row in goodput_rows(nodes)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["10M", "60M"], choices=SIZES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--directory", type=Path, default=Path(), help="where the files are made; default: here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # "torch.distributed is unavailable": one process is meant
    machine = f"{len(os.sched_getaffinity(0))} cores ({platform.machine()}), {torch.get_num_threads()} threads"
    lines = [f"What saving costs; {date.today()}, {machine}, PyTorch {torch.__version__}.", ""]
    lines += [*stall_part(arguments.sizes, arguments.repeats, arguments.directory), "", *goodput_part()]
    text = "\n".join(lines) + "\n"
    print(text)
    if "check" not in arguments.sizes:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
