"""The benchmark of submissions runs, at a size that shows nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
from cluster import missing

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks/submission.py"


def test_a_submission_is_timed_beside_bare_sbatch(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    result = tmp_path / "results/submission.md"
    command = [sys.executable, SCRIPT, "--experts", "3", "--repeats", "1", "--output", result]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    rows = [line.split(" | ") for line in result.read_text(encoding="utf-8").splitlines() if " jobs | 1" in line]
    # Four texts, the public model, three experts, assembly, evaluation, report; in arrays three texts, three experts.
    assert [row[1:3] for row in rows] == [["11", "11"]] and "| arrays | 11 | 7 |" in done.stdout
