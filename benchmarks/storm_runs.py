"""Runs of a toy job in processes that are killed, or told to stop, and started again; for kill_storm.py and tests."""

import itertools
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, NamedTuple

import megatron.core.parallel_state  # noqa: F401 (what the ranks import, they would import at every start)

import flexpert.assembly.stages
import flexpert.config.compose
import flexpert.data.prepare
import flexpert.train.expert
import flexpert.train.pretrain  # noqa: F401 (so that it is loaded, as those above)
from flexpert.checkpoint import envelope
from flexpert.cli import main
from flexpert.monitor.jsonl import read_metrics
from flexpert.parallel import pulse
from flexpert.parallel.environment import free_port
from flexpert.records import sha256_file
from flexpert.signals import LOST
from flexpert.testing import Fault, faults

#: Steps of training and of calibration, and between two checkpoints.
STEPS, CALIBRATION_STEPS, INTERVAL = 8, 4, 2
#: Seconds for ranks to meet, and for a collective.
TIMEOUT = 20
SETTINGS = [
    f"train.steps={STEPS}", "train.batch_tokens=128", "train.sequence_length=16", "train.microbatch_sequences=2",
    "train.evaluation_interval=4", "train.evaluation_sequences=8", "optim.lr=1e-2", "optim.warmup_steps=2",
    "monitor.wandb=off", f"checkpoint.interval={INTERVAL}", "checkpoint.keep=2", f"parallel.timeout={TIMEOUT}",
]  # fmt: skip
SHAPE = ["model.hidden_size=24", "model.num_layers=1", "model.num_heads=2", "model.intermediate_size=40"]
#: In place of `pulse`'s: so that a lost rank is noticed within seconds.
BEAT, SILENCE, GRACE = 0.2, 5.0, 3.0
#: Seconds within which all processes have to end by themselves: those that wait to meet one that was killed before it
#: met them wait the longest, for `TIMEOUT`.
PATIENCE = 60.0
#: Seconds between two looks at the processes.
POLL = 0.01
#: What a row says of the machine, and not of the run.
OF_THE_MACHINE = {
    "step_seconds", "data_seconds", "compute_seconds", "optimizer_seconds", "tokens_per_second", "peak_memory_bytes",
    "mfu",
}  # fmt: skip


class Job(NamedTuple):
    """Attributes:
    stage, overrides: the command, but for its output_dir.
    loops: directory of each training loop below that → its steps.
    written: what the stage writes in the end.
    """

    stage: str
    overrides: list[str]
    loops: dict[str, int]
    written: str

    def words(self, output: Path) -> list[str]:
        return [self.stage, *self.overrides, f"output_dir={output}"]

    def but(self, *overrides: str) -> "Job":
        """With these in place of those of the same keys."""
        keys = {override.partition("=")[0] for override in overrides}
        kept = [override for override in self.overrides if override.partition("=")[0] not in keys]
        return self._replace(overrides=[*kept, *overrides])


class Ended(NamedTuple):
    """Attributes:
    statuses: of each rank; negative: the signal that ended it.
    said: by each rank, on both streams.
    seconds: until all had ended.
    wait_seconds: until then since the first had.
    resumed: directory of each loop that went on from a checkpoint → its step.
    resume_seconds: until the first of them did.
    """

    statuses: list[int]
    said: list[str]
    seconds: float
    wait_seconds: float
    resumed: dict[Path, int]
    resume_seconds: float | None

    @property
    def was_killed(self) -> bool:
        return -signal.SIGKILL in self.statuses


class Start:
    """A command in several processes, which are forked from this one.

    Args:
        words: of the command.
        num_ranks: how many processes.
        logs: directory for what they say.
        planted: faults.
    """

    def __init__(self, words: list[str], num_ranks: int, logs: Path, planted: Sequence[Fault] = ()) -> None:
        self.paths = [logs / f"rank-{rank}.log" for rank in range(num_ranks)]
        port, context = free_port(), multiprocessing.get_context("fork")
        for path in self.paths:
            path.unlink(missing_ok=True)  # of the start before
        self.ranks: list[ForkProcess] = [
            context.Process(target=run_rank, args=(rank, num_ranks, port, self.paths[rank], words, planted))
            for rank in range(num_ranks)
        ]
        self.begun = time.monotonic()
        for rank in self.ranks:
            rank.start()

    def end(self, victims: Sequence[int] = (), kill_seconds: float = 0.0, patience: float = PATIENCE) -> Ended:
        """Kill these ranks so many seconds after the start, and wait until all have ended.

        Raises:
            TimeoutError: others have not ended by themselves within `patience` seconds, and were killed, too.
        """
        first_seconds = resume_seconds = None
        while left := [number for number, rank in enumerate(self.ranks) if rank.is_alive()]:
            seconds = time.monotonic() - self.begun
            if first_seconds is None and len(left) < len(self.ranks):
                first_seconds = seconds
            if resume_seconds is None and self.resumed():
                resume_seconds = seconds
            if seconds >= kill_seconds:
                for victim in victims:
                    self.ranks[victim].kill()
            if seconds >= kill_seconds + patience:
                for rank in self.ranks:
                    rank.kill()
                raise TimeoutError(f"ranks {left} have not ended in {patience:.0f} s:\n" + "\n".join(self.said()))
            time.sleep(POLL)
        seconds = time.monotonic() - self.begun
        if resume_seconds is None and self.resumed():
            resume_seconds = seconds
        waited = 0.0 if first_seconds is None else seconds - first_seconds
        for rank in self.ranks:
            rank.join()
        statuses = [int(rank.exitcode or 0) for rank in self.ranks]
        return Ended(statuses, self.said(), seconds, waited, self.resumed(), resume_seconds)

    def said(self, ranks: slice = slice(None)) -> list[str]:
        return [path.read_text() if path.exists() else "" for path in self.paths[ranks]]

    def resumed(self) -> dict[Path, int]:
        (said,) = self.said(slice(1))
        lines = re.findall(r"^resuming (.*) from step (\d+)$", said, re.MULTILINE)
        return {Path(where): int(step) for where, step in lines}


def run_rank(rank: int, num_ranks: int, port: int, log: Path, words: list[str], planted: Sequence[Fault]) -> None:
    """In a process of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    for name, seconds in (("BEAT", BEAT), ("SILENCE", SILENCE), ("GRACE", GRACE)):
        setattr(pulse, name, seconds)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (open(stream, "w", encoding="utf-8") for stream in (1, 2))  # noqa: SIM115
    with faults(*planted):
        main(words)


def make_jobs(folder: Path) -> list[Job]:
    """A pretraining and an expert job, and what they need: texts, data sets, a public model."""
    words = {"public": "the cat sat on a mat and saw nine birds", "letters": "dear sir yours faithfully invoice"}
    chooser = random.Random(0)
    for name, known in words.items():
        (folder / f"{name}_texts").mkdir()
        for number in range(40):
            text = " ".join(chooser.choices(known.split(), k=chooser.randint(20, 60)))
            (folder / f"{name}_texts/{number:03d}.txt").write_text(f"{text} {number}.\n", encoding="utf-8")
        tokenizer = (
            "train_tokenizer.vocab_size=300" if name == "public" else f"tokenizer={folder}/data/public/tokenizer"
        )
        documents = f"data.documents={folder}/{name}_texts/*.txt"
        alone(["prepare", documents, tokenizer, "valid_fraction=0.3", f"output_dir={folder}/data/{name}"], folder)
    public = Job("pretrain", [*SETTINGS, *SHAPE, f"data.dir={folder}/data/public"], {".": STEPS}, "model")
    alone(public.words(folder / "public"), folder)
    return [public, expert_job(folder, "letters")]


def expert_job(folder: Path, name: str) -> Job:
    given = [f"base={folder}/public/model", f"data.dir={folder}/data/letters", f"public_data={folder}/data/public",
             "public_share=0.25", "router.init=random", f"router.calibration_steps={CALIBRATION_STEPS}"]  # fmt: skip
    loops = {".": STEPS, "calibration": CALIBRATION_STEPS}
    return Job("expert", [*SETTINGS, *given, f"name={name}"], loops, "contribution")


def alone(words: list[str], logs: Path) -> None:
    ended = Start(words, 1, logs).end()
    assert ended.statuses == [0], ended.said


@dataclass
class Kill:
    """Attributes:
    kind: as the table names it.
    planted: what does it.
    victims: or which ranks are killed from outside,
    share: after which share of the seconds that the start is expected to last.
    """

    kind: str
    planted: tuple[Fault, ...] = ()
    victims: tuple[int, ...] = ()
    share: float = 0.0

    @staticmethod
    def at(phase: str, **where: int) -> "Kill":
        return Kill(phase, (Fault("kill", phase, **where),))


@dataclass
class Tally:
    """What came of the kills of one kind.

    Attributes:
        resumed: after how many the next start that came so far went on from a checkpoint.
        repeated: steps that it computed once more.
        seconds: until it went on.
        waits: seconds until those that were not killed had ended by themselves.
        problems: what was not as it should be in runs with such a kill.
    """

    kills: int = 0
    resumed: int = 0
    repeated: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    problems: set[str] = field(default_factory=set)

    def add(self, other: "Tally") -> None:
        self.kills, self.resumed = self.kills + other.kills, self.resumed + other.resumed
        self.repeated += other.repeated
        self.seconds += other.seconds
        self.waits += other.waits
        self.problems |= other.problems


class Run:
    """A job in a directory of its own, from its first start to its end, through all that befalls it.

    Attributes:
        tallies: kind of kill → what came of it.
        problems: what was not as it should be.
    """

    def __init__(self, job: Job, num_ranks: int, output: Path) -> None:
        self.job, self.num_ranks, self.output = job, num_ranks, output
        self.logs = output.with_name(f"{output.name}-logs")
        self.logs.mkdir()
        self.tallies: dict[str, Tally] = {}
        self.problems: list[str] = []
        self.pending: list[Tally] = []  # of the last kills, of which nothing has come yet

    def start(self, *planted: Fault) -> Ended:
        return Start(self.job.words(self.output), self.num_ranks, self.logs, planted).end()

    def survive(self, kills: Iterable[Kill], whole: "Whole") -> None:
        """Start it again until it has ended, which a kill may come too late for, and compare with `whole`."""
        for kill in itertools.chain(kills, [None]):
            if not self.start_and_kill(kill, whole.seconds):
                break
        self.problems += [f"{self.output}: {name} differs" for name in differences(self.result(), whole.result)]
        self.problems += [f"{path} is left over" for path in leftovers(self.output)]
        for tally in self.tallies.values():
            tally.problems = set(self.problems)

    def start_and_kill(self, kill: Kill | None, seconds: float) -> bool:
        """Whether it was killed.

        Args:
            seconds: that a run takes which is not killed.
        """
        before, records = self.committed(), self.records()
        start = Start(self.job.words(self.output), self.num_ranks, self.logs, kill.planted if kill else ())
        left = 1 - sum(before.values()) / sum(self.job.loops.values())
        try:
            ended = start.end(kill.victims, kill.share * seconds * (1 + left) / 2) if kill else start.end()
        except TimeoutError as error:
            self.problems.append(f"{self.output}: {error}")
            return False
        self.check_end(ended)
        self.check_beginning(ended, before, records)
        if not ended.was_killed:
            return False
        assert kill is not None
        self.check_checkpoints(before)
        tally = self.tallies.setdefault(kill.kind, Tally())
        tally.kills += 1
        if any(status != -signal.SIGKILL for status in ended.statuses):
            tally.waits.append(ended.wait_seconds)
        self.pending.append(tally)
        return True

    def check_end(self, ended: Ended) -> None:
        """One that is left ends well, or because another is lost, or never came."""
        for status, said in zip(ended.statuses, ended.said, strict=True):
            is_expected = status in (0, -signal.SIGKILL, LOST)
            if not is_expected or (status and not ended.was_killed):
                self.problems.append(f"{self.output}: statuses {ended.statuses}\n{said}")

    def check_beginning(self, ended: Ended, before: dict[str, int], records: dict[str, bytes]) -> None:
        """It has gone on from what was committed, or began anew where nothing was."""
        repeated, has_begun = 0, False
        for loop, step in before.items():
            resumed = ended.resumed.get(self.output / loop)
            is_new = resumed is None and self.records()[loop] != records[loop]
            if resumed not in (None, step) or (is_new and step):
                self.problems.append(f"{self.output / loop}: went on from {resumed}, step {step} was committed")
            if resumed is not None or is_new:
                repeated += records[loop].count(b"\n") - (resumed or 0)
                has_begun = True
        if self.pending and has_begun:
            seconds = [] if ended.resume_seconds is None else [ended.resume_seconds]
            for tally in self.pending:
                tally.add(Tally(resumed=len(seconds), repeated=[repeated], seconds=seconds))
            self.pending = []

    def check_checkpoints(self, before: dict[str, int]) -> None:
        """None is lost, and the newest is at most one interval older than the newest that had begun to be saved.

        That one is told by what is left of it; and a step whose row was written comes after the saves of steps before.
        """
        for loop, step in self.committed().items():
            left = [int(path.name[6:-8]) for path in (self.output / loop / "checkpoints").glob(".step-*.partial")]
            begun = max([*left, (self.records()[loop].count(b"\n") - 1) // INTERVAL * INTERVAL])
            if step < before[loop] or step < begun - INTERVAL:
                text = f"step {step} is left, {before[loop]} was committed before, and step {begun} was being saved"
                self.problems.append(f"{self.output / loop}: {text}")

    def committed(self) -> dict[str, int]:
        """Loop → its newest checkpoint, or 0."""
        return {loop: max([0, *envelope.steps(self.output / loop / "checkpoints")]) for loop in self.job.loops}

    def records(self) -> dict[str, bytes]:
        """Loop → its metrics.jsonl."""
        paths = {loop: self.output / loop / "metrics.jsonl" for loop in self.job.loops}
        return {loop: path.read_bytes() if path.exists() else b"" for loop, path in paths.items()}

    def result(self) -> dict[str, Any]:
        """Every row, without what it says of the machine, and the hash of every file that was written in the end."""
        rows = {
            f"row {number} of {loop}": {key: value for key, value in row.items() if key not in OF_THE_MACHINE}
            for loop in self.job.loops
            for number, row in enumerate(read_metrics(self.output / loop / "metrics.jsonl"), start=1)
        }
        return rows | hashes(self.output / self.job.written)


class Whole(NamedTuple):
    """Of a run that was left alone: what came of it, and the seconds from its start to its end."""

    result: dict[str, Any]
    seconds: float

    @staticmethod
    def of(run: Run) -> "Whole":
        ended = run.start()
        assert not any(ended.statuses), ended.said
        return Whole(run.result(), ended.seconds)


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in directory.rglob("*") if path.is_file()}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def leftovers(directory: Path) -> list[Path]:
    """What a process that is killed leaves, and the next one has to clear away."""
    return [path for path in directory.rglob("*") if path.suffix in (".partial", ".tmp")]
