"""What `flexpert pipeline` writes and submits, and what it refuses: nothing is submitted half."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import MESSAGE_TIMEOUT, Cluster, missing, running, wait_for
from pipelines import Stock, alive, jobs, named, refused, rows, start, submitted
from toy import with_toy

from flexpert.cli import run_stage
from flexpert.launch.job import job_path
from flexpert.launch.submit import in_header
from flexpert.records import read_record, write_record

pytestmark = pytest.mark.slow

#: Jobs that wait until they are cancelled, and jobs that run until then.
HELD, ENDLESS = "launcher.options=[--hold]", "launcher.setup=[sleep 1000]"
NODES = ["experts/letters", "experts/numbers", "assembled", "evaluation", "report"]


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """A run directory whose jobs are gone when the test ends."""
    path = tmp_path / f"run-{time.monotonic_ns()}"  # also the pipeline's name, and so the beginning of its jobs'
    yield path
    for node in [*NODES, "dense-array", "experts-array"]:
        cluster.run("scancel", f"--name={path.name}/{node.replace('/', '.')}")


REFUSALS = [
    (["launcher.partition=nope"], "experts/letters", "invalid partition specified: nope", "set launcher.partition"),
    (["launcher.jobs={experts/numbers:[--partition=nope]}"], "experts/numbers", "nope", "set launcher.partition"),
    (
        ["launcher.jobs={report:[--gpus-per-node=8]}"],
        "report",
        "configuration is not available",
        "nodes have less than",
    ),
    (["launcher.jobs={assemble:[--mem=9000G]}"], "assembled", "Memory specification", "nodes have less than"),
    (["launcher.options=[--frobnicate=2]"], "experts/letters", "unrecognized option '--frobnicate=2'", "launcher.jobs"),
    (["launcher.jobs={evaluate:[--time=soon]}"], "evaluation", "Invalid --time specification", "set --time among"),
]


@pytest.mark.parametrize(("words", "node", "said", "advice"), REFUSALS, ids=[refusal[1] for refusal in REFUSALS])
def test_what_slurm_refuses_is_one_line_and_nothing_stays_submitted(
    cluster: Cluster, stock: Stock, run: Path, words: list[str], node: str, said: str, advice: str
) -> None:
    """An unknown account is in `test_accounting`: without a database, Slurm charges any."""
    with refused(f"{node}: sbatch: ", said, advice):
        start(cluster, stock.words(run, ENDLESS, *words))
    wait_for("the end of those that were submitted before", lambda: not alive(cluster, run), 90)
    assert not jobs(run)


def test_without_slurm_it_says_so_before_anything_is_written(
    cluster: Cluster, stock: Stock, run: Path, tmp_path: Path
) -> None:
    with refused("launcher=slurm: there is no sbatch on the PATH", "launcher=local"):
        start(cluster, stock.words(run), PATH=str(tmp_path))
    assert not (run / "pipeline.yaml").exists()


def test_without_a_controller_it_is_one_line(stock: Stock, run: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    with running(num_nodes=1) as cluster:
        start(cluster, stock.words(run, HELD))
        cluster.kill_daemon("slurmctld")
        conf = cluster.directory / "slurm.conf"
        conf.write_text(conf.read_text().replace(MESSAGE_TIMEOUT, "MessageTimeout=1"))  # so long a command tries again
        for stage, words in (("status", [f"run={run}"]), ("cancel", [f"run={run}"])):
            with refused("squeue: ", "Slurm's controller does not answer: try again"), cluster.login():
                run_stage(stage, words)
        with refused("Slurm's controller does not answer: try again"):
            start(cluster, stock.words(run.with_name("other"), HELD))
        assert not jobs(run.with_name("other"))
        cluster.start_controller()


def test_a_dry_run_writes_all_that_would_be_submitted(
    cluster: Cluster, stock: Stock, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = stock.words(
        run, "launcher.jobs={expert:[--nodes=2],experts/numbers:[--time=0:07:00,--comment=a b],data/music:[--qos=x]}",
        "pipeline.resources={expert:[--nodes=3,--mem=1G]}", "launcher.setup=[module() { :; },module load x]",
        "launcher.run=env A=b",
    )  # fmt: skip
    start(cluster, [*words, "launcher.dry_run=true"], PATH=f"{tmp_path}:/usr/bin:/bin")
    printed = capsys.readouterr().out
    assert "  5 jobs written to " in printed and "note: launcher.jobs.data/music is for no node of this" in printed
    assert not alive(cluster, run) and not jobs(run)
    directory = run / "slurm"
    scripts = {path.stem: path.read_text() for path in directory.glob("*.sbatch")}
    assert set(scripts) == {node.replace("/", ".") for node in NODES} == {p.stem for p in directory.glob("*.yaml")}
    for name in scripts:
        subprocess.run(["bash", "-n", directory / f"{name}.sbatch"], check=True)
        cluster.run("sbatch", "--test-only", str(directory / f"{name}.sbatch"))
    header = [line for line in scripts["experts.numbers"].splitlines() if line.startswith("#SBATCH")]
    for option in ("nodes=3", "mem=1G", "time=0:07:00", 'comment="a b"', "requeue", "open-mode=append"):
        assert f"#SBATCH --{option}" in header
    assert "name: numbers" in (directory / "experts.numbers.yaml").read_text()
    assert (directory / "code.txt").read_text().startswith("flexpert ")

    start(cluster, [*words, HELD])
    for name, job in jobs(run).items():
        script = directory / f"{name.replace('/', '.')}.sbatch"
        assert cluster.run("scontrol", "write", "batch_script", job, "-") == script.read_text()
        assert script.read_text().replace("#SBATCH --hold\n", "") == scripts[script.stem], "but for --hold, as written"


def test_jobs_that_wait_are_submitted_anew_only_where_they_would_be_others(
    cluster: Cluster, stock: Stock, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(cluster, stock.words(run, HELD))
    before = jobs(run)
    with refused("jobs of Slurm's are at work here", "flexpert cancel"):
        run_stage_here(cluster, stock.words(run, "launcher=local"))
    with refused("jobs of Slurm's are at work here", "a dry run needs another output_dir"):
        start(cluster, stock.words(run, "launcher.dry_run=true"))
    capsys.readouterr()
    start(cluster, stock.words(run, HELD, "pipeline.evaluate=[data.max_documents=3]"))
    printed, after = capsys.readouterr().out, jobs(run)
    assert named(printed, "under way") == {"experts/letters", "experts/numbers", "assembled"}
    assert submitted(printed) == {"evaluation", "report"}
    assert {name for name in NODES if after[name] != before[name]} == {"evaluation", "report"}
    assert len(alive(cluster, run)) == len(NODES)
    words = [HELD, "pipeline.evaluate=[data.max_documents=3]", "launcher.jobs={report:[--time=9]}"]
    start(cluster, stock.words(run, *words))
    printed = capsys.readouterr().out
    assert submitted(printed) == {"report"} and named(printed, "under way") == set(NODES) - {"report"}
    assert cluster.job(jobs(run)["report"])["TimeLimit"] == "00:09:00"
    start(cluster, stock.words(run, *words, "launcher.setup=[module load mended]"))
    assert submitted(capsys.readouterr().out) == set(NODES), "with the setup that was mended"


def test_a_job_that_waits_without_what_it_needs_by_now_is_submitted_anew(
    cluster: Cluster, stock: Stock, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where what it needs was complete when it was submitted, and was deleted since."""
    start(cluster, stock.words(run, HELD))
    path = job_path(run, "assembled")
    write_record(path, "flexpert.job", read_record(path, "flexpert.job") | {"after": {}})
    capsys.readouterr()
    start(cluster, stock.words(run, HELD))
    assert submitted(capsys.readouterr().out) == {"assembled", "evaluation", "report"}
    assert len(alive(cluster, run)) == len(NODES)


def test_jobs_keep_their_place_where_slurm_refuses_what_would_follow_them(
    cluster: Cluster, stock: Stock, run: Path
) -> None:
    start(cluster, stock.words(run, HELD))
    before = jobs(run)
    content = (run / "pipeline.yaml").read_bytes()
    with refused("report: sbatch: ", "Invalid --time specification"):
        start(cluster, stock.words(run, HELD, "launcher.jobs={report:[--time=soon]}"))
    with refused("experts/letters: sbatch: ", "set launcher.partition"):
        start(cluster, stock.words(run, HELD, "launcher.partition=nope", "seed=5"))
    assert jobs(run) == before and len(alive(cluster, run)) == len(NODES)
    assert (run / "pipeline.yaml").read_bytes() == content, "which they would not start with another one"


def test_jobs_are_known_where_scancel_fails(
    cluster: Cluster, stock: Stock, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(cluster, stock.words(run, HELD))
    before = jobs(run)
    said = "scancel: error: Unable to contact slurm controller"
    (tmp_path / "scancel").write_text(f"#!/bin/sh\necho {said} >&2; exit 1\n")
    (tmp_path / "scancel").chmod(0o755)
    failing = {"PATH": f"{tmp_path}:{cluster.environment['PATH']}"}
    with refused("Slurm's controller does not answer"), cluster.login(**failing):
        run_stage("cancel", [f"run={run}"])
    assert not any(read_record(job_path(run, name), "flexpert.job")["cancelled"] for name in NODES)
    with refused("scancel: ", f"others have taken the place of are left: scancel {before['report']}"):
        start(cluster, stock.words(run, HELD, "launcher.jobs={report:[--time=9]}"), **failing)
    waits_for = cluster.job(jobs(run)["report"])["Dependency"]
    assert f"afterany:{before['report']}" in waits_for, "two at a time would delete each other's output"


def test_jobs_that_cannot_be_asked_about_are_not_taken_for_gone(
    cluster: Cluster, stock: Stock, run: Path, tmp_path: Path
) -> None:
    start(cluster, stock.words(run, HELD))
    before = jobs(run)
    with refused("submitted on the cluster flexpert", f"cancel run={run}"), cluster.login(PATH=str(tmp_path)):
        run_stage("pipeline", stock.words(run, "launcher=local"))
    path = job_path(run, "experts/letters")
    record = read_record(path, "flexpert.job")
    write_record(path, "flexpert.job", record | {"cluster": "another"})
    with refused(f"job {before['experts/letters']} of experts/letters was submitted on the cluster another"):
        start(cluster, stock.words(run, HELD))
    write_record(path, "flexpert.job", record)
    assert jobs(run) == before and len(alive(cluster, run)) == len(NODES)


def test_a_file_that_cannot_be_written_is_one_line(cluster: Cluster, stock: Stock, run: Path) -> None:
    run.mkdir()
    (run / "slurm").write_text("in the way")
    with refused(f"output_dir={run} cannot be used: ", f"{run}/slurm"):
        start(cluster, stock.words(run, HELD))
    assert not alive(cluster, run)


def test_what_sbatch_warns_of_and_why_a_job_waits_for_ever_is_told(
    cluster: Cluster, stock: Stock, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process on two nodes; more nodes than there are."""
    options = "launcher.jobs={experts/numbers:[--nodes=2],experts/letters:[--nodes=70]}"
    start(cluster, stock.words(run, ENDLESS, "pipeline.processes={experts/numbers:1}", options))
    assert capsys.readouterr().err.count("note: sbatch: Warning: can't run 1 processes on 2 nodes") == 1
    reason = rows(cluster, run)["experts/letters"].reason
    assert reason.startswith("PartitionConfig: it asks for more than the partition gives")


def test_jobs_of_stages_that_the_pipeline_no_longer_has_are_cancelled(
    cluster: Cluster, stock: Stock, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(cluster, stock.words(run, HELD))
    capsys.readouterr()
    start(cluster, stock.words(run, HELD, "pipeline.experts={letters:[]}"))
    assert named(capsys.readouterr().out, "cancelled, as this pipeline has no such stages") == {"experts/numbers"}
    left = set(NODES) - {"experts/numbers"}
    assert set(jobs(run)) == left and len(alive(cluster, run)) == len(left)


def test_a_job_that_was_told_to_end_and_has_not_is_not_doubled(cluster: Cluster, stock: Stock, run: Path) -> None:
    """As where `scancel` has failed."""
    start(cluster, stock.words(run, HELD))
    path = job_path(run, "experts/letters")
    write_record(path, "flexpert.job", read_record(path, "flexpert.job") | {"cancelled": True})
    with refused("of experts/letters was told to end and has not yet", f"flexpert cancel run={run}"):
        start(cluster, stock.words(run, HELD))
    assert len(alive(cluster, run)) == len(NODES)


def test_what_goes_on_without_slurm_is_told_without_its_jobs(
    cluster: Cluster, stock: Stock, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(cluster, stock.words(run, HELD))
    with cluster.login():
        run_stage("cancel", [f"run={run}"])
    monkeypatch.setenv("FLEXPERT_FAULTS", json.dumps([{"action": "kill", "phase": "data", "step": 1}]))
    with pytest.raises(SystemExit):
        run_stage_here(cluster, stock.words(run, "launcher=local"))
    found = {name: (row.job, row.state) for name, row in rows(cluster, run).items()}
    assert found == dict.fromkeys(NODES, ("", "not started")) | dict.fromkeys(NODES[:2], ("", "failed"))


def test_a_job_to_which_another_cluster_has_given_the_same_id_is_left_alone(
    cluster: Cluster, stock: Stock, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(cluster, stock.words(run, HELD))
    path = job_path(run, "experts/letters")
    write_record(path, "flexpert.job", read_record(path, "flexpert.job") | {"name": "somebody's/job"})
    capsys.readouterr()
    with cluster.login():
        run_stage("cancel", [f"run={run}"])
    assert "experts/letters" not in capsys.readouterr().out
    assert list(alive(cluster, run)) == [f"{run.name}/experts.letters"]


def run_stage_here(cluster: Cluster, words: list[str]) -> None:
    with cluster.login():
        run_stage("pipeline", words)


def test_a_job_that_runs_is_not_replaced_by_another(cluster: Cluster, stock: Stock, run: Path) -> None:
    words = [ENDLESS, "launcher.jobs={experts/letters:[--hold]}"]
    start(cluster, stock.words(run, *words))
    before, content = jobs(run), (run / "pipeline.yaml").read_bytes()
    cluster.wait(before["experts/numbers"], "RUNNING")
    with refused("experts/numbers runs with other overrides", f"flexpert cancel run={run}"):
        start(cluster, stock.words(run, *words, "seed=5"))  # which would also submit the one that waits anew
    assert jobs(run) == before and (run / "pipeline.yaml").read_bytes() == content
    assert len(alive(cluster, run)) == len(NODES)


def test_the_log_of_an_arrays_element_is_where_its_record_says(
    cluster: Cluster, stock: Stock, run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "50%array %a" / run.name
    words = ["launcher.array=true", "launcher.setup=[echo it is $FLEXPERT_NODE,exit 3]"]
    start(cluster, stock.words(run, *words, f"pipeline.dense=[{','.join(with_toy('train.steps=2'))}]"))
    for name in ("experts/letters", "experts/numbers", "dense/letters", "dense/numbers"):
        cluster.wait(jobs(run)[name])
        row = rows(cluster, run)[name]
        assert (row.state, row.reason) == ("failed", f"FAILED: it is {name}")


def test_a_directory_that_a_node_does_not_see_is_told(stock: Stock, run: Path, tmp_path: Path) -> None:
    """A node that has an empty file system in the place of the run's."""
    if reason := missing():
        pytest.skip(reason)
    hidden = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{tmp_path}" && exec "$@"', "sh"]
    if subprocess.run([*hidden, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a file system in a namespace of its own")
    with running(num_nodes=1, within=hidden) as cluster:
        start(cluster, stock.words(run, f"launcher.options=[--chdir={cluster.directory}]"))
        job = jobs(run)["experts/letters"]
        cluster.wait(job)
        row = rows(cluster, run)["experts/letters"]
        assert (row.state, row.reason) == ("failed", f"FAILED on n1 before its first line: do the nodes see {run}?")


def test_what_goes_on_without_a_cancelled_expert_is_not_said_to_end(
    cluster: Cluster, stock: Stock, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(cluster, stock.words(run, HELD, "pipeline.required=[letters]"))
    capsys.readouterr()
    with cluster.login():
        run_stage("cancel", [f"run={run}", "stages=[experts/numbers]"])
    assert "note" not in capsys.readouterr().out
    assert len(alive(cluster, run)) == len(NODES) - 1


def test_a_job_that_the_pipeline_does_not_know_touches_nothing(
    cluster: Cluster, stock: Stock, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Submitted by hand: one beside a job that waits, one after the job was cancelled."""
    start(cluster, stock.words(run, HELD))
    with cluster.login():
        run_stage("cancel", [f"run={run}", "stages=[experts/numbers]"])
    assert "note: Slurm cancels what needs them: assembled, evaluation, report\n" in capsys.readouterr().out
    strays = {}
    for name in ("experts.letters", "experts.numbers"):
        strays[name] = cluster.submit(f"--output={run}/stray-{name}", run / f"slurm/{name}.sbatch")
        cluster.run("scontrol", "release", str(strays[name]))
    for name, stray in strays.items():
        assert cluster.wait(stray)["JobState"] == "FAILED"
        assert f"job {stray} is not, or no longer, the one that makes this" in (run / f"stray-{name}").read_text()
    assert not (run / "experts").exists() and not any((run / "stages").iterdir())


@pytest.mark.parametrize("value", ["plain", "a b", 'say "hi"', "it's # \\ $HOME;"])
def test_sbatch_reads_a_value_in_a_header_as_it_was_meant(cluster: Cluster, tmp_path: Path, value: str) -> None:
    script = tmp_path / "script"
    script.write_text(f"#!/bin/bash\n#SBATCH --output=/dev/null\n#SBATCH --comment={in_header(value)}\ntrue\n")
    job = cluster.submit("--hold", script)
    try:
        assert cluster.job(job)["Comment"].strip() == value
    finally:
        cluster.run("scancel", str(job))
