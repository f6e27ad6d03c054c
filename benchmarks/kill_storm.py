"""Kill storm: a run that is killed again and again, at any moment, ends with the same bits as one that is left alone.

    python benchmarks/kill_storm.py [--kills 200] [--ranks 1 2 4] [--seed 0] [--directory DIR]      (about 20 minutes)

For each number of ranks, a toy pretraining and a toy expert job (with calibration) run once to their end: the rows of
their metrics, without times, and the hash of every file of the model or contribution are what all others must have.
Then both are killed by SIGKILL, several times a run: one rank or all of them at a random moment of a start's life, and
at places where it hurts, by `flexpert.testing`. After each kill the other ranks have to end by themselves, and the
run is started again, until it ends. Looked at after each: no committed checkpoint is lost; the run goes on from the
newest; that is at most one interval before the newest step whose saving had begun. In the end all bits are the same,
and nothing half-written is left. `assemble` is killed at each of its files.

Beside it, a loop that calls `torch.save(state, path)`, as many scripts do, and one that uses our checkpoints, both
killed in the middle of a save: how many are left without a checkpoint.

Prints a table in Markdown and writes it to `benchmarks/results/kill_storm.md`; exits with status 1 on any difference.
"""

import argparse
import itertools
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from storm_runs import (
    CALIBRATION_STEPS,
    INTERVAL,
    SILENCE,
    STEPS,
    TIMEOUT,
    Ended,
    Job,
    Kill,
    Run,
    Start,
    Tally,
    Whole,
    alone,
    differences,
    expert_job,
    hashes,
    make_jobs,
)

from flexpert.checkpoint import distributed, envelope
from flexpert.config.groups import CheckpointConfig, ModelConfig
from flexpert.model.transformer import Transformer
from flexpert.testing import Fault

RESULT = Path(__file__).parent / "results/kill_storm.md"
#: Kills of one run, before it is left to end.
KILLS_OF_A_RUN = 5
#: Phase → how often at most it is passed before the kill, and whether rank 0 alone passes it.
PLACES = {
    "restore": (0, False), "data": (8, False), "forward": (16, False), "backward": (16, False),
    "optimizer": (6, False), "evaluation": (3, False), "log": (6, True), "staging": (2, False), "shard": (40, False),
    "manifest": (2, True), "commit": (2, True), "committed": (2, True), "retention": (1, True), "publish": (0, True),
}  # fmt: skip
ANY_MOMENT = ("any moment, one rank", "any moment, all ranks")


def kills(num_ranks: int, chooser: random.Random) -> Iterator[Kill]:
    """Without end: one at a random moment, one at a place, and so on; all places occur before one does again."""
    while True:
        for phase in chooser.sample(list(PLACES), len(PLACES)):
            victims = [(chooser.randrange(num_ranks),), tuple(range(num_ranks))][num_ranks == 1 or chooser.randrange(2)]
            kind = ANY_MOMENT[len(victims) == num_ranks]
            yield Kill(kind, victims=victims, share=chooser.random())
            most, is_of_first = PLACES[phase]
            rank = 0 if is_of_first else chooser.randrange(num_ranks)
            yield Kill.at(phase, rank=rank, after=chooser.randint(0, most))


def storm(jobs: Sequence[Job], num_ranks: int, number: int, folder: Path, seed: int) -> tuple[dict[str, Tally], int]:
    """Runs of these jobs, in turn, that are killed so often in all: what came of it by kind, and how many runs."""
    wholes = [Whole.of(Run(job, num_ranks, folder / f"whole-{num_ranks}-{job.stage}")) for job in jobs]
    source = kills(num_ranks, random.Random(f"{seed}/{num_ranks}"))
    tallies: dict[str, Tally] = {}
    for count in itertools.count():
        left = number - sum(tally.kills for tally in tallies.values())
        if left == 0:
            return tallies, count
        job, whole = jobs[count % len(jobs)], wholes[count % len(jobs)]
        run = Run(job, num_ranks, folder / f"run-{num_ranks}-{count}")
        run.survive(itertools.islice(source, min(left, KILLS_OF_A_RUN)), whole)
        for kind, tally in run.tallies.items():
            tallies.setdefault(kind, Tally()).add(tally)
        if not run.problems:
            shutil.rmtree(run.output)
        print("\n".join([f"{num_ranks} ranks, {left} kills to come", *run.problems]), file=sys.stderr, flush=True)
    raise AssertionError


def assembly_storm(words: list[str], folder: Path) -> Tally:
    """Kill `assemble`, of these words and an output_dir, at each of its files, and before the model has its name."""
    tally = Tally()

    def start(output: Path, *planted: Fault) -> Ended:
        return Start([*words, f"output_dir={output}"], 1, folder, planted).end()

    assert start(folder / "assembled").statuses == [0]
    expected, output = hashes(folder / "assembled"), folder / "killed"
    at_files = (Fault("kill", "assembly", after=number) for number in itertools.count())
    for fault in itertools.chain([Fault("kill", "publish")], at_files):
        if not start(output, fault).was_killed:  # it has fewer files
            break
        tally.kills += 1
        if output.exists():
            tally.problems.add(f"{output} is there after a kill")
        ended = start(output)
        tally.resumed += ended.statuses == [0]
        tally.seconds.append(ended.seconds)
        tally.problems |= {f"assembled after {fault}: {name} differs" for name in differences(hashes(output), expected)}
        tally.problems |= {f"{path} is left over" for path in folder.glob(".killed.*")}
        shutil.rmtree(output)
    return tally


class InPlace:
    """What many scripts do."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoint.pt"
        self.state = distributed.trained_state(*small_model())

    def save(self, step: int) -> None:
        torch.save(self.state | {"step": step}, self.path)

    def step(self) -> int:
        """Which can be loaded; 0: none."""
        try:
            return int(torch.load(self.path, weights_only=True)["step"])
        except Exception:  # of many kinds
            return 0


class Ours:
    def __init__(self, folder: Path) -> None:
        self.folder, self.key = folder, envelope.open_key(folder)
        self.model, self.optimizer = small_model()
        self.saver = distributed.Saver(folder, self.key, CheckpointConfig(keep=2))

    def save(self, step: int) -> None:
        self.saver.save(step, self.model, self.optimizer, {})
        assert self.saver.wait() is None

    def step(self) -> int:
        record = distributed.load(self.folder, self.key, self.model, self.optimizer)
        return 0 if record is None else int(record["step"])


def small_model() -> tuple[Transformer, torch.optim.Optimizer]:
    """A million parameters."""
    shape = ModelConfig(vocab_size=1024, hidden_size=256, num_layers=1, num_heads=4, intermediate_size=512)
    model = Transformer(shape)
    return model, torch.optim.AdamW(model.parameters())


def lost_in_saves(saves: type[InPlace] | type[Ours], number: int, folder: Path, chooser: random.Random) -> int:
    """Of so many kills in the middle of a save, after which nothing, or less than was saved before, can be loaded."""
    lost = 0
    for count in range(number):
        place = folder / f"{saves.__name__}-{count}"
        place.mkdir()
        read, write = os.pipe()

        def save_for_ever(place: Path = place, write: int = write) -> None:
            one = saves(place)
            for step in itertools.count(1):
                one.save(step)
                os.write(write, b".")

        child = multiprocessing.get_context("fork").Process(target=save_for_ever)
        child.start()
        os.read(read, 1)
        begun = time.monotonic()
        saved = 1 + len(os.read(read, 1))
        seconds = time.monotonic() - begun
        time.sleep(chooser.random() * 4 * seconds)
        child.kill()
        child.join()
        os.close(write)
        while done := os.read(read, 1 << 10):
            saved += len(done)
        os.close(read)
        lost += saves(place).step() < saved
        shutil.rmtree(place)
    return lost


def line(ranks: object, kind: str, tally: Tally) -> str:
    steps = f"{statistics.mean(tally.repeated):.1f} ({max(tally.repeated)})" if tally.repeated else "–"
    seconds = f"{statistics.median(tally.seconds):.1f} ({max(tally.seconds):.1f})" if tally.seconds else "–"
    return f"| {ranks} | {kind} | {tally.kills} | {tally.resumed} | {steps} | {seconds} | {len(tally.problems)} |"


def table(stormed: dict[int, dict[str, Tally]], assembled: Tally, total: Tally) -> list[str]:
    lines = [
        "| ranks | killed | kills | resumes | steps repeated: mean (most) | s to resume: median (most) | differences |",
        "|---|---|---|---|---|---|---|",
    ]
    for ranks, tallies in stormed.items():
        lines += [line(ranks, kind, tallies[kind]) for kind in (*ANY_MOMENT, *PLACES) if kind in tallies]
    return [*lines, line(1, "assemble", assembled), line("all", "", total)]


def waiting(total: Tally) -> list[str]:
    if not total.waits:
        return []
    longest = f"{statistics.median(total.waits):.1f} s (median), at most {max(total.waits):.1f} s"
    return [
        f"Ranks that were not killed had ended by themselves {longest} after the first that was. A rank counts as lost "
        f"when it was silent for {SILENCE:.0f} s here, and ranks wait {TIMEOUT} s to meet those that never come.",
        "",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all, but for those of assemble and of single saves")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of which ranks are killed, where and when")
    parser.add_argument("--directory", type=Path, help="where the runs are made; default: where temporary files are")
    parser.add_argument("--small", action="store_true", help="a few kills, which only show that the script runs")
    given = parser.parse_args(arguments)
    ranks, number, single = given.ranks, given.kills, 50
    if given.small:
        ranks, number, single = [1], 4, 3
    with tempfile.TemporaryDirectory(dir=given.directory, prefix="kill-storm-") as temporary:
        folder = Path(temporary).resolve()
        jobs = make_jobs(folder)
        stormed = {n: storm(jobs, n, -(-number // len(ranks)), folder, given.seed) for n in ranks}
        contributions = [folder / name / "contribution" for name in ("letters", "others")]
        for name in ("letters", "others"):
            alone(expert_job(folder, name).words(folder / name), folder)
        listed = ",".join(map(str, contributions))
        assembled = assembly_storm(["assemble", f"base={folder}/public/model", f"contributions=[{listed}]"], folder)
        chooser = random.Random(given.seed)
        lost = {saves: lost_in_saves(saves, single, folder, chooser) for saves in (InPlace, Ours)}
    total = Tally()
    for tally in [*(tally for tallies, _ in stormed.values() for tally in tallies.values()), assembled]:
        total.add(tally)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    text = "\n".join(
        [
            f"SIGKILL to toy runs of {STEPS} steps (an expert's calibration {CALIBRATION_STEPS} more), a checkpoint "
            f"every {INTERVAL}; {date.today()}, {machine}, {versions}, seed {given.seed}.",
            f"{sum(count for _, count in stormed.values())} runs of `pretrain` and `expert`, each killed up to "
            f"{KILLS_OF_A_RUN} times. A difference would be a row of metrics, a byte of what was written, a lost "
            "checkpoint, more work lost than an interval, a process that does not end, or a file left over, in a run "
            "with such a kill. No resume: killed before there was a checkpoint, or after the end.",
            "",
            *table({n: tallies for n, (tallies, _) in stormed.items()}, assembled, total),
            "",
            *waiting(total),
            f"Killed in the middle of a save of 14 MB, {single} times each: a loop around `torch.save(state, path)` "
            f"has no checkpoint any more after {lost[InPlace]} of them, one with ours after {lost[Ours]}.",
        ]
    )
    print(text)
    if not given.small:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(text + "\n", encoding="utf-8")
    sys.exit(bool(total.problems) or lost[Ours] > 0)


if __name__ == "__main__":
    main()
