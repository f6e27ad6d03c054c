"""`--multirun` over Slurm: each run a job of its own, by Hydra's launcher for submitit."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cluster import Cluster

pytestmark = pytest.mark.slow


def test_the_runs_of_a_sweep_are_jobs_and_one_that_fails_is_told(cluster: Cluster, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    (tmp_path / "a, b").mkdir()
    (tmp_path / "a, b/1.txt").write_text("one two three\n" * 30)
    slurm = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=main", "hydra.launcher.timeout_min=3"]
    words = ["train_tokenizer.vocab_size=300", "valid_fraction=0", "output_dir=out"]
    done = subprocess.run(
        [
            sys.executable, "-m", "flexpert", "prepare", "--multirun",
            "data.documents='a, b/1.txt',none/*.txt", *words, *slurm,
        ],
        cwd=tmp_path, env=cluster.environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    record = yaml.safe_load((tmp_path / "out/sweep.yaml").read_text())
    assert [run["status"] for run in record["runs"]] == [0, 2]
    resolved = yaml.safe_load((tmp_path / "out/0/resolved.yaml").read_text())
    assert resolved["data"]["documents"] == "a, b/1.txt"
    assert not (tmp_path / "out/1").exists()
    rows = done.stdout.splitlines()[-2:]
    assert rows[0].endswith("done") and "none/*.txt" in rows[1].partition("status 2: ")[2]
    assert done.stderr.strip().splitlines()[-1].startswith("flexpert: 1 of 2 runs of prepare have failed: 1;")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0", "sweep", "sweep.yaml"]
    assert "note: sacct says nothing here" in done.stdout  # this Slurm has no database
    # Jobs, not processes of the command's.
    logs = [path.read_text() for path in (tmp_path / "out/sweep").rglob("*_log.out")]
    assert sum("--- run 0" in log for log in logs) == 1 and sum("--- run 1" in log for log in logs) == 1


def test_what_slurm_refuses_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    (tmp_path / "1.txt").write_text("one two three\n")
    words = ["prepare", "--multirun", "data.documents=1.txt", "train_tokenizer.vocab_size=300,310", "output_dir=out"]
    slurm = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=nope"]
    done = subprocess.run(
        [sys.executable, "-m", "flexpert", *words, *slurm],
        cwd=tmp_path, env=cluster.environment, capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("flexpert: no run of prepare has started: ") and "invalid partition specified: nope" in last
