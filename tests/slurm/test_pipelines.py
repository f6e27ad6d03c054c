"""`flexpert pipeline launcher=slurm` on a real Slurm: the same result as without, whatever befalls its jobs.

Slurm looks at time limits every 30 s, and starts again what was requeued after 10 s, so all pipelines are submitted at
once, and run side by side. The last test disturbs the controller, when the others have no more jobs.
"""

import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cluster import Cluster, wait_for
from pipelines import (
    EXPERT,
    Faults,
    Stock,
    alive,
    complete,
    evaluation,
    files_with,
    finished,
    hang,
    jobs,
    log,
    model,
    named,
    rows,
    start,
    submitted,
    wandb_runs,
)
from toy import SHAPE, with_toy, write_texts

from flexpert.checkpoint.envelope import steps
from flexpert.cli import run_stage
from flexpert.launch.status import Status
from flexpert.records import read_json

pytestmark = pytest.mark.slow

#: What a shell, Slurm, YAML and the grammar of overrides could each make something else of.
TITLE = """Müller & "Söhne" d'Or = $HOME `id` *? {a,b} \\ 漢字 %j"""
SECRETS = {"WANDB_API_KEY": "5ec2e7" * 6 + "abcd", "AWS_SECRET_ACCESS_KEY": "q8Rv" * 10, "HF_TOKEN": "hf_" + "Xy7" * 11}
#: What a job around the command would leave in its environment.
OUTER = {
    "SLURM_JOB_ID": "7", "SLURM_NTASKS": "7", "SLURM_TASKS_PER_NODE": "7", "SLURM_RESTART_COUNT": "9",
    "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "7", "SBATCH_PARTITION": "nope",
}  # fmt: skip
#: Every step takes so long that the time limit comes first.
SLOW = [{"action": "sleep", "phase": "optimizer", "times": -1, "seconds": 3.5}]
#: The nodes of a `Stock`'s pipeline after the experts.
REST = {"assembled", "evaluation", "report"}
ALL = {"experts/letters", "experts/numbers", *REST}


class Runs(NamedTuple):
    """Attributes:
    root: has the directory of every pipeline.
    stock: what they begin with.
    words, faults: by the name of the pipeline.
    """

    root: Path
    stock: Stock
    words: dict[str, list[str]]
    faults: dict[str, Faults]


#: Blanks and what Slurm, in names of files, and YAML take for something else.
WHOLE = "100% a=(1) #2"


def whole_words(root: Path) -> list[str]:
    """The whole graph from texts, with experts of two processes."""
    toy = [word for word in EXPERT if not word.startswith(("train.steps", "train.microbatch"))]
    expert = [*toy, "train.steps=6", "train.microbatch_sequences=4"]
    data = {name: f"data.documents={root}/texts_{name}/*.txt,valid_fraction=0.3" for name in ("public", "math", "news")}
    return [
        "pipeline=smoke", "pipeline.name=whole", "pipeline.dense=null", "pipeline.prepare=[]", "seed=3",
        "monitor.wandb=offline",
        f"pipeline.public_data=[{data['public']},train_tokenizer.vocab_size=300]",
        f"pipeline.public=[{','.join(with_toy(*SHAPE))}]", f"pipeline.expert=[{','.join(expert)}]",
        f"pipeline.experts={{math:[{data['math']}],news:[{data['news']}]}}", f"pipeline.owners.math=[title={TITLE}]",
        "pipeline.evaluate=[data.max_documents=2]", "pipeline.processes={expert:2}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(cluster: Cluster, stock: Stock, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    given: dict[str, list[str]] = {}
    faults: dict[str, Faults] = {}

    def add(name: str, *words: str, **cases: list[dict[str, Any]]) -> list[str]:
        faults[name] = Faults(root / f"{name}.sh", **cases)
        given[name] = stock.words(root / name, *faults[name].words, *words)
        return given[name]

    # One is told to stop shortly before its time limit, the other is requeued and loses its node.
    start(cluster, add(
        "stopped", "monitor.wandb=offline",
        "launcher.jobs={experts/letters:[--time=3,--signal=USR1@60],experts/numbers:[--exclusive,--ntasks=1]}",
        letters_0=SLOW, numbers_0=hang(7), numbers_1=hang(13),
    ))  # fmt: skip
    with open(faults["stopped"].path, "a") as file:  # a second limit would say nothing more, on a slow machine
        file.write("if ((SLURM_RESTART_COUNT)); then scontrol update jobid=$SLURM_JOB_ID timelimit=30; fi\n")
    twice = [
        subprocess.Popen(
            [sys.executable, "-m", "flexpert", "pipeline", *words, "launcher=slurm"],
            env=cluster.environment | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for words in [add("disturbed", letters_0=hang(7), numbers_0=hang(7))] * 2
    ]  # fmt: skip
    start(cluster, add(
        "without", "pipeline.required=[letters]", "launcher.max_jobs=1",
        numbers_=[{"action": "kill", "phase": "startup", "times": -1}],
    ))  # fmt: skip
    for name, word in (("public", "cat"), ("math", "two"), ("news", "today")):
        write_texts(root / f"texts_{name}", [word, "the", "sat", "on", "is", "and", "saw", name], 40, seed=len(name))
    given["whole"] = [*whole_words(root), "pipeline.resources={expert:[--nodes=2]}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        start(cluster, [*given["whole"], f"output_dir={WHOLE}"], **SECRETS, **OUTER)
    texts = f"data.documents={root}/later/[a-z]*.txt,valid_fraction=0.3"
    start(cluster, add(
        "missing", f"pipeline.prepared={{public:{stock.data['public']},letters:{stock.data['letters']}}}",
        f"pipeline.experts={{letters:[],numbers:[{texts}]}}",
    ))  # fmt: skip
    start(cluster, add(
        "array", "launcher.array=true", "launcher.max_jobs=1",
        f"pipeline.dense=[{','.join(with_toy('train.steps=2'))}]",
        numbers_0=[{"action": "USR1", "phase": "optimizer", "step": 7}],
    ))  # fmt: skip
    printed = [process.communicate()[0] for process in twice]
    check_twice([process.returncode for process in twice], printed)
    return Runs(root, stock, given, faults)


def check_twice(statuses: list[int], printed: list[str]) -> None:
    """Of two commands at the same time, one submits all, the other nothing."""
    assert sorted(map(len, map(submitted, printed))) == [0, len(ALL)], printed
    if statuses != [0, 0]:  # else the one came when the other was done
        assert sorted(statuses) == [0, 2] and "is in use by another process" in "".join(printed), printed


@pytest.fixture(scope="module")
def reference(runs: Runs) -> Path:
    """The pipeline that most of them are, without Slurm and without a fault."""
    run = runs.root / "reference"
    run_stage("pipeline", runs.stock.words(run, "launcher=local"))
    return run


def again(cluster: Cluster, runs: Runs, name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Start a pipeline again; returns what it prints."""
    capsys.readouterr()
    start(cluster, runs.words[name])
    return capsys.readouterr().out


def never_two_at_a_time(cluster: Cluster, run: Path) -> bool:
    """Of a run that is over: the last starts of its jobs."""
    found = [cluster.job(job) for job in jobs(run).values()]
    times = sorted((job["StartTime"], job["EndTime"]) for job in found)
    return all(first[1] <= second[0] for first, second in pairwise(times))


def test_a_requeued_job_and_one_that_loses_its_node_go_on_where_they_were(cluster: Cluster, runs: Runs) -> None:
    """What comes of it is looked at when all is done, below."""
    run = runs.root / "stopped"
    checkpoints, job = run / "experts/numbers/checkpoints", jobs(run)["experts/numbers"]
    wait_for("the first hanging step", lambda: 6 in steps(checkpoints), 240)
    row = rows(cluster, run)["experts/numbers"]
    assert (row.state, row.checkpoint, row.job) == ("running", 6, job)
    assert rows(cluster, run)["assembled"].reason == "Dependency"
    cluster.run("scontrol", "requeue", job)
    cluster.start_again(job, 1)
    wait_for("the second hanging step", lambda: 12 in steps(checkpoints), 240)
    node = cluster.job(job)["BatchHost"]
    cluster.kill_node(node)
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    cluster.start_again(job, 2)
    cluster.wait(job, "RUNNING", "COMPLETED")
    cluster.start_node(node)
    cluster.wait_for_node(node)


def test_a_pipeline_makes_the_same_as_without_slurm(
    cluster: Cluster, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, local = runs.root / WHOLE, runs.root / "local"
    monkeypatch.chdir(runs.root)
    run_stage("pipeline", [*whole_words(runs.root), f"output_dir={local}", "launcher=local"])
    assert {row.state for row in Status(local).rows()} == {"complete"}, "known without Slurm, too"
    complete(cluster, run)
    assert cluster.job(jobs(run)["experts/math"])["NumNodes"] == "2"
    assert model(run) == model(local)
    assert evaluation(run) == evaluation(local)
    assert read_json(run / "experts/math/contribution/contribution.json")["title"] == TITLE
    assert [len(wandb_runs(run / f"experts/{name}")) for name in ("math", "news")] == [1, 1]
    capsys.readouterr()
    start(cluster, [*runs.words["whole"], f"output_dir={WHOLE}"])
    printed = capsys.readouterr().out
    assert "  all 8 stages are complete\n  report: written\n" in printed and "held-out bits per byte" in printed


def test_no_secret_of_the_environment_is_in_a_file(cluster: Cluster, runs: Runs) -> None:
    complete(cluster, runs.root / WHOLE)
    assert files_with(runs.root / WHOLE, ["train.steps=6"]), "the search finds what there is"
    assert not files_with(runs.root / WHOLE, SECRETS.values())


def test_what_is_not_required_is_left_out_and_made_up_for_later(
    cluster: Cluster, runs: Runs, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An expert that is killed at every start; no two jobs at a time, before and after."""
    run = runs.root / "without"
    found = finished(cluster, run)
    assert {name: row.state for name, row in found.items() if row.state != "complete"} == {"experts/numbers": "failed"}
    reason = found["experts/numbers"].reason
    assert reason.startswith("status 137: expert: 3 starts of this job in a row made no new checkpoint in ")
    assert found["assembled"].reason == "without experts/numbers"
    assert cluster.job(jobs(run)["experts/numbers"])["Restarts"] == "2"
    assert never_two_at_a_time(cluster, run)
    assert {name for name in model(reference) if name not in model(run)} == {"expert-numbers.safetensors"}
    note = r"^note: .*/experts/numbers/contribution does not exist and is left out$"
    assert re.search(note, log(run, "assembled"), re.MULTILINE)

    runs.faults["without"].mend()
    before = jobs(run)
    printed = again(cluster, runs, "without", capsys)
    assert submitted(printed) == ALL - {"experts/letters"} and named(printed, "complete") == {"experts/letters"}
    complete(cluster, run)
    assert jobs(run)["experts/letters"] == before["experts/letters"]
    assert never_two_at_a_time(cluster, run)
    assert model(run) == model(reference) and evaluation(run) == evaluation(reference)


def test_where_all_are_required_nothing_is_made_without_one_until_it_is_mended(
    cluster: Cluster, runs: Runs, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.root / "missing"
    found = finished(cluster, run)
    assert found.pop("experts/letters").state == "complete"
    failed = found.pop("data/numbers")
    texts = runs.root / "later"
    assert failed.state == "failed" and not (run / "assembled").exists()
    assert failed.reason == f"status 2: data.documents={texts}/[a-z]*.txt matches no file"
    assert {row.state for row in found.values()} == {"cancelled"} and len(found) == 4
    with cluster.login(), pytest.raises(SystemExit) as ended:
        run_stage("status", [f"run={run}"])
    assert ended.value.code == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["data/numbers"]]
    assert line.split()[1:3] == [failed.job, "failed"] and line.rstrip().endswith(failed.reason)

    texts.mkdir()
    for path in (runs.stock.data["numbers"].parent / "texts").iterdir():
        (texts / f"a{path.name}").write_bytes(path.read_bytes())
    printed = again(cluster, runs, "missing", capsys)
    assert submitted(printed) == ALL - {"experts/letters"} | {"data/numbers"}
    complete(cluster, run)
    tensors = {name for name in model(reference) if name.endswith(".safetensors")}
    assert {name: model(run)[name] for name in tensors} == {name: model(reference)[name] for name in tensors}
    assert evaluation(run) == evaluation(reference)


def test_an_array_makes_the_same_and_only_the_element_that_asks_is_requeued(
    cluster: Cluster, runs: Runs, reference: Path
) -> None:
    """The last element, whose id is the whole array's."""
    run = runs.root / "array"
    complete(cluster, run)
    made = jobs(run)
    for parent in ("experts", "dense"):
        assert made[f"{parent}/letters"].replace("_0", "_1") == made[f"{parent}/numbers"]
    assert len({job.partition("_")[0] for job in made.values()}) == 5
    restarts = [cluster.job(made[f"experts/{name}"])["Restarts"] for name in ("letters", "numbers")]
    assert restarts == ["0", "1"] and "told to stop" in log(run, "experts/numbers")
    assert never_two_at_a_time(cluster, run)
    assert model(run) == model(reference)


def test_a_pipeline_whose_jobs_were_stopped_on_their_way_ends_as_if_nothing_had_happened(
    cluster: Cluster, runs: Runs, reference: Path
) -> None:
    run = runs.root / "stopped"
    complete(cluster, run)
    made = {name: cluster.job(job) for name, job in jobs(run).items()}
    restarts = {name: job["Restarts"] for name, job in made.items()}
    assert restarts == dict.fromkeys(REST, "0") | {"experts/letters": "1", "experts/numbers": "2"}
    assert all(made["assembled"]["StartTime"] >= made[f"experts/{n}"]["EndTime"] for n in ("letters", "numbers"))
    assert re.findall(r"^0: resuming .* from step (\d+)$", log(run, "experts/numbers"), re.M) == ["6", "12"]
    assert model(run) == model(reference) and evaluation(run) == evaluation(reference)
    assert [len(wandb_runs(run / f"experts/{name}")) for name in ("letters", "numbers")] == [1, 1]
    records = [read_json(path / "stages/experts.numbers.json")["files"] for path in (run, reference)]
    assert records[0] == records[1]


def test_jobs_are_adopted_cancelled_and_go_on_also_when_the_controller_was_away(
    cluster: Cluster, runs: Runs, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.root / "disturbed"
    experts = ("letters", "numbers")
    for name in experts:
        wait_for("the hanging step", lambda: 6 in steps(run / f"experts/{name}/checkpoints"), 240)  # noqa: B023
    names = cluster.run("squeue", "--noheader", "--states=all", "--format=%j").split()
    assert {names.count(f"disturbed/{node.replace('/', '.')}") for node in ALL} == {1}
    before = jobs(run)
    cluster.kill_daemon("slurmctld")
    cluster.start_controller()
    printed = again(cluster, runs, "disturbed", capsys)
    assert named(printed, "under way") == ALL and not submitted(printed) and jobs(run) == before

    with cluster.login():
        run_stage("cancel", [f"run={run}"])
    assert set(re.findall(r"(\S+) \(job", capsys.readouterr().out)) == ALL
    assert {cluster.job(job)["JobState"] for job in before.values()} == {"CANCELLED"}
    assert {row.state for row in rows(cluster, run).values()} == {"cancelled"}
    assert not (run / "experts/letters/contribution").exists()
    time.sleep(1)  # a moment in which a requeued one would be found
    assert not alive(cluster, run)

    runs.faults["disturbed"].mend()
    assert submitted(again(cluster, runs, "disturbed", capsys)) == ALL
    complete(cluster, run)
    for name in experts:
        assert "0: resuming" in log(run, f"experts/{name}")
        assert cluster.job(jobs(run)[f"experts/{name}"])["Restarts"] == "0"
    assert model(run) == model(reference)
