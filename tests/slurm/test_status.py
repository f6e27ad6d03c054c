"""`flexpert status`, `logs` and `cancel`, of jobs that fail, run, wait, were cancelled or are forgotten."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, wait_for
from pipelines import Faults, Stock, jobs, refused, rows, start

from flexpert.checkpoint.envelope import steps
from flexpert.cli import run_stage
from flexpert.launch.job import job_path
from flexpert.records import read_record, write_record

pytestmark = pytest.mark.slow

#: What rich would take for its own: styles, the end of one, a picture.
REASON = "contributions=[red] and [/some/a b] are :warning: nothing"
SETUP = f"""
case $FLEXPERT_NODE in
experts/letters) echo '0: flexpert: {REASON}'; echo 'srun: error: n1: task 0: Exited with exit code 2'; exit 2 ;;
experts/numbers) echo '0: expert /a/run  step 4/40  loss 3.5  900 tokens/s'; exec sleep 1000 ;;
esac
"""


def flexpert(cluster: Cluster, *words: str) -> None:
    with cluster.login():
        run_stage(words[0], list(words[1:]))


@pytest.fixture(scope="module")
def run(cluster: Cluster, stock: Stock, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One expert has failed, the other runs until it is cancelled."""
    root = tmp_path_factory.mktemp("status")
    (root / "setup.sh").write_text(SETUP)
    run = root / "run"
    start(cluster, stock.words(run, f"launcher.setup=[. {root}/setup.sh]"))
    cluster.wait(jobs(run)["experts/letters"])
    log = run / "logs/experts.numbers.log"
    wait_for("a line of the other", lambda: log.exists() and "step" in log.read_text(), 60)
    wait_for("the end of what needs both", lambda: rows(cluster, run)["report"].state == "cancelled", 60)
    yield run
    for job in jobs(run).values():
        cluster.run("scancel", job)


def test_a_row_says_where_each_stage_stands_and_why(
    cluster: Cluster, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        flexpert(cluster, "status", f"run={run}")
    assert ended.value.code == 1
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    lines = {line.split()[0]: line for line in printed if line.strip()}
    made = jobs(run)
    assert lines["experts/letters"].split()[1:3] == [made["experts/letters"], "failed"]
    assert lines["experts/letters"].endswith(f"FAILED: {REASON}")
    assert lines["experts/numbers"].split()[1:3] == [made["experts/numbers"], "running"]
    assert lines["experts/numbers"].endswith("step 4/40  loss 3.5  900 tokens/s")
    assert lines["assembled"].split()[1:] == [made["assembled"], "cancelled", "DependencyNeverSatisfied"]
    assert not [line for line in printed if line.strip().startswith("note")]


def test_logs_are_printed_and_followed(cluster: Cluster, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flexpert(cluster, "logs", f"run={run}", "stage=experts/letters", "lines=1")
    assert capsys.readouterr().out == "srun: error: n1: task 0: Exited with exit code 2\n"
    flexpert(cluster, "logs", f"run={run}")
    assert capsys.readouterr().out.splitlines() == [
        f"experts/letters: {run}/logs/experts.letters.log", f"experts/numbers: {run}/logs/experts.numbers.log",
        "assembled: nothing yet", "evaluation: nothing yet", "report: nothing yet",
    ]  # fmt: skip
    with refused("stage=letters is not one of", "did you mean experts/letters?"):
        flexpert(cluster, "logs", f"run={run}", "stage=letters")
    with refused("stage=code is not one of experts/letters, experts/numbers, assembled"):
        flexpert(cluster, "logs", f"run={run}", "stage=code")
    command = [sys.executable, "-m", "flexpert", "logs", f"run={run}", "stage=experts/numbers", "follow=true"]
    with subprocess.Popen(command, env=cluster.environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith("900 tokens/s\n")
        with open(run / "logs/experts.numbers.log", "a") as file:
            file.write("0: more\n")
        assert process.stdout.readline() == "0: more\n"
        process.kill()


def test_one_stage_is_cancelled(cluster: Cluster, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last but one test of this run, which it changes."""
    job = jobs(run)["experts/numbers"]
    flexpert(cluster, "cancel", f"run={run}", "stages=[experts/letters,experts/numbers]")
    assert capsys.readouterr().out == f"cancelled: experts/numbers (job {job})\n"
    assert cluster.job(job)["JobState"] == "CANCELLED"
    flexpert(cluster, "cancel", f"run={run}")
    assert capsys.readouterr().out == "cancelled: nothing, no job is under way\n"
    assert rows(cluster, run)["experts/numbers"].state == "cancelled"
    with refused("report has printed nothing, and nobody makes it now"):
        flexpert(cluster, "logs", f"run={run}", "stage=report", "follow=true")
    flexpert(cluster, "logs", f"run={run}", "stage=experts/numbers", "lines=1", "follow=true")  # ends as the stage has
    assert capsys.readouterr().out.count("\n") == 1


def test_a_job_that_slurm_has_forgotten_is_lost_and_a_cluster_without_accounts_is_named(
    cluster: Cluster, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a week later: the id is one that the cluster does not know."""
    path = job_path(run, "experts/letters")
    record = read_record(path, "flexpert.job")
    write_record(path, "flexpert.job", record | {"job": "66000001"})
    row = rows(cluster, run)["experts/letters"]
    assert (row.state, row.reason) == ("lost", f"forgotten by Slurm: {REASON}")
    with pytest.raises(SystemExit):
        flexpert(cluster, "status", f"run={run}")
    assert "note: this cluster keeps no accounts" in capsys.readouterr().out
    later = (run / "logs/experts.letters.log").stat().st_mtime + 1
    write_record(path, "flexpert.job", record | {"job": "66000001", "submitted": later})
    reason = rows(cluster, run)["experts/letters"].reason
    assert reason.startswith("forgotten by Slurm before its first line"), "what is in the log is of a job before it"


def test_a_job_that_was_cancelled_by_hand_has_not_failed(cluster: Cluster, stock: Stock, tmp_path: Path) -> None:
    """It is told to stop, saves, and says so."""
    run = tmp_path / "run"
    slow = [{"action": "sleep", "phase": "optimizer", "times": -1, "seconds": 1.5}]
    words = Faults(tmp_path / "faults.sh", letters_=slow).words
    start(cluster, stock.words(run, *words, "launcher.jobs={experts/numbers:[--hold]}"))
    job = jobs(run)["experts/letters"]
    wait_for("a checkpoint", lambda: steps(run / "experts/letters/checkpoints"), 90)
    server = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": "online"}
    # Started again meanwhile, it would find its directory in use.
    with refused(f"not all is told: job {job} makes {run}/experts/letters"), cluster.login(**server):
        run_stage("sync", [f"run={run}"])
    cluster.run("scancel", *jobs(run).values())
    cluster.wait(job)
    wait_for("the end", lambda: rows(cluster, run)["experts/letters"].state != "completing", 30)
    row = rows(cluster, run)["experts/letters"]
    assert row.state == "cancelled" and "told to stop" in (run / "logs/experts.letters.log").read_text()
    assert row.checkpoint is not None
