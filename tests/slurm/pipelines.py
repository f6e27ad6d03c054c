"""Pipelines at toy size: their words, what befalls their stages, their jobs and results."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cluster import Cluster
from toy import TOY, write_texts

from flexpert.cli import run_stage
from flexpert.errors import UserError
from flexpert.launch.job import job_path
from flexpert.launch.status import Row, Status
from flexpert.monitor.wandb import RUN_DIRECTORY
from flexpert.records import read_record

NUMBERS = ["one", "two", "three", "twelve", "forty", "plus", "is", "less"]
#: An expert; eight sequences a step.
EXPERT = [
    *(word for word in TOY if not word.startswith(("train.steps", "monitor"))), "train.steps=40",
    "router.init=unit_mean",
    "router.documents=8", "parallel.threads=1",
]  # fmt: skip


class Stock(NamedTuple):
    """What pipelines begin with. Attributes: model, the public one; data, sets by name."""

    model: Path
    data: dict[str, Path]

    def words(self, output: Path | str, *more: str) -> list[str]:
        """Two experts, of letters and of numbers, trained from what there is; `output` names the pipeline, too."""
        sets = ",".join(f"{name}:{path}" for name, path in self.data.items())
        return [
            "pipeline=smoke", f"pipeline.name={Path(output).name}", f"output_dir={output}",
            f"pipeline.base={self.model}", f"pipeline.prepared={{{sets}}}", "pipeline.experts={letters:[],numbers:[]}",
            f"pipeline.expert=[{','.join(EXPERT)}]", "pipeline.dense=null", "pipeline.evaluate=[data.max_documents=2]",
            "monitor.wandb=off", *more,
        ]  # fmt: skip


def make_stock(road: Path, directory: Path) -> Stock:
    """Of the public model and the data of `road`, and numbers."""
    write_texts(directory / "texts", NUMBERS, 40, seed=2)
    tokenizer = road / "data/public/tokenizer"
    words = [f"data.documents={directory}/texts/*.txt", f"tokenizer={tokenizer}", "valid_fraction=0.3"]
    run_stage("prepare", [*words, f"output_dir={directory}/numbers"])
    data = {"public": road / "data/public", "letters": road / "data/letters", "numbers": directory / "numbers"}
    return Stock(road / "public/model", data)


class Faults:
    """What befalls the stages of a pipeline's jobs: shell lines that each of them runs first.

    Attributes:
        words: for the pipeline.
    """

    def __init__(self, path: Path, **cases: list[dict[str, Any]]) -> None:
        self.path, self.words = path, [f"launcher.setup=[. {path}]"]
        self.plant(cases)

    def plant(self, cases: dict[str, list[dict[str, Any]]]) -> None:
        """Faults by node and number of the restart: `letters_0`, or `letters_` for all of its starts."""
        lines = ['case "$FLEXPERT_NODE $((SLURM_RESTART_COUNT))" in']
        for case, faults in cases.items():
            name, _, restart = case.partition("_")
            lines.append(f"'experts/{name} '{restart or '*'}) export FLEXPERT_FAULTS='{json.dumps(faults)}' ;;")
        self.path.write_text("\n".join([*lines, "esac", ""]))

    def mend(self) -> None:
        """From the next start on nothing befalls them."""
        self.plant({})


def hang(step: int) -> list[dict[str, Any]]:
    """Stand still in a step, for ever."""
    return [{"action": "hang", "phase": "optimizer", "step": step}]


def start(cluster: Cluster, words: list[str], **environment: str) -> None:
    """`flexpert pipeline` on a login node of the cluster, every job with one thread."""
    with cluster.login(OMP_NUM_THREADS="1", **environment):
        run_stage("pipeline", [*words, "launcher=slurm"])


def jobs(run: Path) -> dict[str, str]:
    """The last job of every node of a run."""
    records = {path.stem: read_record(path, "flexpert.job")["job"] for path in (run / "slurm/jobs").glob("*.json")}
    return {name.replace(".", "/"): job for name, job in records.items()}


def rows(cluster: Cluster, run: Path) -> dict[str, Row]:
    """What `flexpert status` knows of every node of a run."""
    with cluster.login():
        return {row.node.name: row for row in Status(run).rows()}


def finished(cluster: Cluster, run: Path, seconds: float = 400.0) -> dict[str, Row]:
    """`rows` when no job of a run is left."""
    for job in jobs(run).values():
        cluster.wait(job, seconds=seconds)
    return rows(cluster, run)


def complete(cluster: Cluster, run: Path) -> None:
    """Until a run is complete, which it must become."""
    left = {name: (row.state, row.reason) for name, row in finished(cluster, run).items() if row.state != "complete"}
    assert not left, left


def log(run: Path, node: str) -> str:
    path = job_path(run, node)
    return Path(read_record(path, "flexpert.job")["log"]).read_text(encoding="utf-8")


def model(run: Path) -> dict[str, bytes]:
    """Every file of a run's assembled model."""
    found = {path.name: path.read_bytes() for path in (run / "assembled").rglob("*") if path.is_file()}
    assert any(name.endswith(".safetensors") for name in found)
    return found


def evaluation(run: Path) -> dict[str, Any]:
    return read_record(run / "evaluation/evaluation.json", "flexpert.evaluation")


def wandb_runs(stage: Path) -> set[str]:
    """Ids of the W&B runs of a stage."""
    found = [RUN_DIRECTORY.fullmatch(path.name) for path in (stage / "wandb").iterdir()]
    return {match[2] for match in found if match is not None}


def submitted(printed: str) -> set[str]:
    """The nodes for which `flexpert pipeline` has said that it submits a job."""
    return set(re.findall(r"^  (\S+): job [\d_]+$", printed, re.MULTILINE))


def named(printed: str, what: str) -> set[str]:
    """The nodes that it has said are `complete` or `under way`."""
    found = re.search(rf"^  {what}: (.*)$", printed, re.MULTILINE)
    return set(found[1].split(", ")) if found is not None else set()


def files_with(directory: Path, texts: Iterable[str]) -> list[Path]:
    """Files below a directory that hold one of these texts."""
    wanted = [text.encode() for text in texts]
    paths = [Path(folder, name) for folder, _, names in os.walk(directory) for name in names]
    return [path for path in paths if path.is_file() and any(text in path.read_bytes() for text in wanted)]


@contextmanager
def refused(*parts: object) -> Iterator[None]:
    """The block must raise a UserError of one line that holds every part."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and caught.value.status == 2
    for part in parts:
        assert str(part) in message


def alive(cluster: Cluster, run: Path) -> list[str]:
    """Names of the jobs of a pipeline that may still run, whatever its records say."""
    listed = cluster.run("squeue", "--noheader", "--format=%j").splitlines()
    return [name for name in listed if name.startswith(f"{run.name}/")]
