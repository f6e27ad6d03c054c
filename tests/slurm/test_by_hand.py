"""The scripts in slurm/ used by hand: the road from texts to an evaluation, and training that is stopped on its way.

Slurm looks at time limits every 30 s, so all jobs are submitted at once, and run side by side.
"""

import json
import multiprocessing
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import megatron.core.parallel_state  # noqa: F401 (the ranks are forked from here)
import pytest
from cluster import Cluster, free_ports, wait_for
from toy import SHAPE, with_toy, write_texts

from flexpert.checkpoint.envelope import steps
from flexpert.cli import main, run_stage
from flexpert.records import read_json

pytestmark = pytest.mark.slow

#: What a shell, Slurm and the stage's own grammar could each make something else of.
TITLE = """Müller & "Söhne" d'Or = $HOME `id` *? {a,b} \\ 漢字"""
#: Every step takes so long that there is time to stop a job; a job's last start is as fast as it can.
SLOW = json.dumps([{"action": "sleep", "phase": "optimizer", "times": -1, "seconds": 2.0}])


class Road(NamedTuple):
    """Attributes:
    root: has the stages' directories.
    jobs: of every stage, under the name of its directory.
    """

    root: Path
    jobs: dict[str, int]


def pretrain_words(root: Path, *words: str) -> list[str]:
    length = ["train.steps=40", "checkpoint.keep=100"]
    return with_toy(*SHAPE, *length, "parallel.threads=1", f"data.dir={root}/data/public", *words)


def expert_words(root: Path) -> list[str]:
    return with_toy(
        f"base={root}/public/model", f"data.dir={root}/data/letters", "name=letters", f"title={TITLE}",
        "router.init=unit_mean", f"public_data={root}/data/public", "router.documents=8", "parallel.threads=1",
        "train.microbatch_sequences=4",
    )  # fmt: skip


@pytest.fixture(scope="module")
def road(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Road:
    """data/{public,letters}, public, expert, assembled, evaluation; and stopped, a second public model."""
    root = tmp_path_factory.mktemp("by_hand")
    write_texts(root / "public_texts", ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "birds"], 40, seed=0)
    write_texts(root / "letters_texts", ["dear", "sir", "yours", "faithfully", "invoice"], 40, seed=1)
    jobs: dict[str, int] = {}

    def add(stage: str, name: str, after: str | None, words: list[str], *options: str, **environment: str) -> None:
        if after is not None:
            options = (f"--dependency=afterok:{jobs[after]}", "--kill-on-invalid-dep=yes", *options)
        words = [*words, f"output_dir={root}/{name}"]
        jobs[name] = cluster.submit_stage(stage, words, f"--chdir={root}", *options, **environment)

    def prepare_words(name: str) -> list[str]:
        return [f"data.documents={root}/{name}_texts/*.txt", "valid_fraction=0.3"]

    add("prepare", "data/public", None, [*prepare_words("public"), "train_tokenizer.vocab_size=300"])
    # Its time limit is set when it has a checkpoint, and the signal comes within a minute of that: a machine may be so
    # slow that none is there in any limit that is known before. SETUP is run at every start.
    limit = (
        "if ((SLURM_RESTART_COUNT)); then unset FLEXPERT_FAULTS; scontrol update jobid=$SLURM_JOB_ID timelimit=30; else"
        f" (until [[ -e {root}/public/checkpoints/step-000000002 ]]; do sleep 0.2; done;"
        " scontrol update jobid=$SLURM_JOB_ID timelimit=$((SECONDS / 60 + 2))) & fi"
    )
    add(
        "pretrain", "public", "data/public", pretrain_words(root, "monitor.wandb=offline"),
        "--time=30", "--signal=USR1@60", FLEXPERT_FAULTS=SLOW, FLEXPERT_SETUP=limit,
    )  # fmt: skip
    # On a node of its own, which it will lose.
    add(
        "pretrain", "stopped", "data/public", pretrain_words(root),
        "--exclusive", "--ntasks=1", FLEXPERT_FAULTS=SLOW,
        FLEXPERT_SETUP="if ((SLURM_RESTART_COUNT >= 3)); then unset FLEXPERT_FAULTS; fi",
    )  # fmt: skip
    add(
        "prepare", "data/letters", "data/public", [*prepare_words("letters"), f"tokenizer={root}/data/public/tokenizer"]
    )
    add("expert", "expert", "public", expert_words(root), "--nodes=2")
    add("assemble", "assembled", "expert", [f"base={root}/public/model", f"contributions=[{root}/expert/contribution]"])
    data = f"data.dirs={{public:{root}/data/public,letters:{root}/data/letters}}"
    add("evaluate", "evaluation", "assembled", [f"model={root}/assembled", data, "data.max_documents=2"])
    return Road(root, jobs)


def outcome(run: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """A public model's tensors, and of every step what does not depend on how fast it was."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: row[key] for key in ("step", "tokens", "loss", "grad_norm", "lr")} for row in rows]
    return {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}, kept


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, road: Road) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """`outcome` of the same training here."""
    cluster.completed(road.jobs["data/public"])
    run_stage("pretrain", pretrain_words(road.root, f"output_dir={road.root}/uninterrupted"))
    return outcome(road.root / "uninterrupted")


def run_without_slurm(num_ranks: int, words: list[str]) -> None:
    """The command in several processes, which know each other by what torchrun would say."""
    port, context = free_ports(1), multiprocessing.get_context("fork")

    def rank(index: int) -> None:
        names = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
        main(words)

    ranks = [context.Process(target=rank, args=(index,)) for index in range(num_ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * num_ranks


def resumed(log: str) -> list[int]:
    """The steps that a job has gone on from."""
    return [int(step) for step in re.findall(r"^0: resuming .* from step (\d+)$", log, re.MULTILINE)]


def test_training_that_is_told_to_stop_requeued_and_loses_its_node_ends_as_if_nothing_had_happened(
    cluster: Cluster, road: Road, uninterrupted: tuple[dict[str, bytes], list[dict[str, Any]]]
) -> None:
    job, checkpoints = road.jobs["stopped"], road.root / "stopped/checkpoints"

    lost: list[str] = []

    def lose_node() -> None:
        lost.append(cluster.job(job)["BatchHost"])
        cluster.kill_node(lost[0])
        cluster.run("scontrol", "update", f"nodename={lost[0]}", "state=down", "reason=test")

    events = (
        lambda: cluster.run("scancel", "--signal=USR1", str(job)),
        lambda: cluster.run("scontrol", "requeue", str(job)),
        lose_node,
    )
    saved: list[int] = []
    for restart, event in enumerate(events, start=1):
        num_before = len(steps(checkpoints))
        wait_for("two more checkpoints", lambda: len(steps(checkpoints)) >= num_before + 2, 90)  # noqa: B023
        event()
        cluster.requeued(job, restart)
        saved.append(steps(checkpoints)[-1])
        cluster.start_again(job, restart)
    end, log = cluster.completed(job), cluster.log(job)
    assert end["Restarts"] == "3" and end["BatchHost"] != lost[0]
    assert resumed(log) == saved and "flexpert: told to stop" in log
    assert outcome(road.root / "stopped") == uninterrupted
    cluster.start_node(lost[0])
    cluster.wait_for_node(lost[0])


def test_the_road_goes_on_beyond_a_time_limit_and_leads_where_it_does_without_slurm(
    cluster: Cluster, road: Road, uninterrupted: tuple[dict[str, bytes], list[dict[str, Any]]]
) -> None:
    root, job = road.root, road.jobs["public"]
    assert cluster.completed(job)["Restarts"] == "1"
    log = cluster.log(job)
    assert len(resumed(log)) == 1 and "flexpert: told to stop" in log
    assert outcome(root / "public") == uninterrupted
    assert len({path.name.rpartition("-")[2] for path in (root / "public/wandb").glob("offline-run-*")}) == 1

    cluster.completed(road.jobs["expert"])
    run_without_slurm(2, ["expert", *expert_words(root), f"output_dir={root}/without"])
    made, wanted = (root / run / "contribution" for run in ("expert", "without"))
    assert (made / "expert.safetensors").read_bytes() == (wanted / "expert.safetensors").read_bytes()
    assert read_json(made / "contribution.json") == read_json(wanted / "contribution.json")
    assert read_json(made / "contribution.json")["title"] == TITLE

    cluster.completed(road.jobs["evaluation"])
    assert (root / "evaluation/evaluation.json").exists()
