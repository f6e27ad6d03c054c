"""Each benchmark runs, at a size that shows nothing: a figure in the README has a script that works."""

import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {
    "train_step.py": ["--sizes", "check", "--job", "4 of 8"],
    "generate.py": ["--repeats", "1", "--prompt", "8", "--new", "8", "--threads", "1"],
    "prepare.py": ["megabytes=1", "repeats=1", "workers=2"],
    "checkpoint.py": ["--sizes", "check", "--repeats", "1"],
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
    if script == "gpu_moe.py":
        assert "Goals of speed and memory are for a GPU" in done.stdout and "TFLOP/s or more" not in done.stdout
        assert find_spec("liger_kernel") is not None or "| Liger fused_moe | not installed |" in done.stdout


@pytest.mark.parametrize("script", ["gpu.py", "gpu_moe.py"])
def test_without_a_gpu_it_is_one_line_of_status_2(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.syspath_prepend(BENCHMARKS)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    line = f"{script}: there is no CUDA device here; --small shows that the script runs\n"
    assert (ended.value.code, *capsys.readouterr()) == (2, "", line)
