"""Each benchmark runs, at a size that shows nothing: a figure in the README has a script that works."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {
    "train_step.py": ["--sizes", "check"],
    "generate.py": ["--repeats", "1", "--prompt", "8", "--new", "8"],
    "prepare.py": ["megabytes=1", "repeats=1"],
    "assemble.py": ["--sizes", "0.02", "--repeats", "1"],
    "gpu.py": ["--small"],
    "gpu_moe.py": ["--small"],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_a_benchmark_compares_with_its_peer(script: str, tmp_path: Path) -> None:
    for file in BENCHMARKS.glob("*.py"):  # results are written beside them
        shutil.copy(file, tmp_path)
    command = [sys.executable, tmp_path / script, *SMALL[script]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 or script == "assemble.py", done.stdout  # which says so that this is too slow
    assert any(word in done.stdout for word in ("ratio", "planned")) and done.stdout.count("\n|") >= 3, done.stdout
