"""A cluster that keeps accounts: who may submit, and what became of jobs that only its database still knows."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing, running, wait_for
from pipelines import Stock, alive, jobs, refused, rows, start, submitted

from flexpert.cli import run_stage

pytestmark = pytest.mark.slow

#: One job is killed before it can say anything, the other waits.
SETUP = 'launcher.setup=["case $FLEXPERT_NODE in experts/letters) echo no more; kill -9 $$ ;; esac"]'
HELD = "launcher.jobs={experts/numbers:[--hold]}"


@pytest.fixture(scope="module")
def accounted() -> Iterator[Cluster]:
    if reason := missing(accounts=True):
        pytest.skip(reason)
    with running(num_nodes=1, accounts=True) as found:
        yield found


def test_an_account_that_there_is_not_is_one_line_with_the_setting(
    accounted: Cluster, stock: Stock, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with refused("experts/letters: sbatch: ", "Invalid account", "(set launcher.account, or what launcher.jobs and"):
        start(accounted, stock.words(run, "launcher.account=nope"))
    assert not jobs(run)
    start(accounted, stock.words(run, "launcher.account=lab", "launcher.options=[--hold]"))
    assert {accounted.job(job)["Account"] for job in jobs(run).values()} == {"lab"}
    with accounted.login():
        run_stage("cancel", [f"run={run}"])


def test_jobs_that_the_controller_has_forgotten_are_known_by_the_accounts(
    accounted: Cluster, stock: Stock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    start(accounted, stock.words(run, SETUP, HELD))
    made = jobs(run)
    accounted.wait(made["experts/letters"], "FAILED")
    accounted.run("scancel", made["experts/numbers"])
    wait_for("the end of what needs both", lambda: not alive(accounted, run), 60)
    before = rows(accounted, run)
    assert before["experts/letters"].reason == "FAILED: no more" and before["experts/numbers"].state == "cancelled"

    names = ("sacct", "-Xn", "--format=JobName%50", "--jobs", ",".join(made.values()))
    wait_for("names in the database", lambda: accounted.run(*names).count(f"{run.name}/") == len(made), 120)
    accounted.kill_daemon("slurmctld")
    accounted.start_controller("-c")  # it begins with nothing
    assert not accounted.run("squeue", "--noheader", "--states=all")
    after = rows(accounted, run)
    assert {name: row.state for name, row in after.items()} == {name: row.state for name, row in before.items()}
    assert after["experts/letters"] == before["experts/letters"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended, accounted.login():
        run_stage("status", [f"run={run}"])
    assert ended.value.code == 1 and "keeps no accounts" not in capsys.readouterr().out
    accounted.wait_for_node("n1")
    start(accounted, stock.words(run, "launcher.options=[--hold]"))
    assert submitted(capsys.readouterr().out) == before.keys()
