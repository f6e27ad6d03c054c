"""Submitting a federation of many owners: `flexpert pipeline launcher=slurm` and `status` beside Slurm's own commands.

    python benchmarks/submission.py [--experts 64] [--repeats 5]        (about five minutes on two free cores)

A real Slurm on this machine (tests/slurm/cluster.py; Debian's slurmctld, slurmd, slurm-client and munge), a new one for
each repeat. The pipeline has a public model, an expert for each owner, and what comes with them: a `prepare` for each
text, assembly, evaluation and report. All jobs are held, so that nothing runs beside what is timed. Times are of whole
processes, from their start to their end: Python, imports, reading conf/, checking the configuration of every stage,
writing the scripts, sbatch. Submitted as separate jobs and as arrays. The peer is as many bare calls of `sbatch
--parsable`, one after the other, and of `squeue` by the same user.

Prints a table in Markdown and writes it to `benchmarks/results/submission.md`; exits with status 1 where submission
takes 10 s or more, or `status` 1 s or more.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[1] / "tests/slurm"))
from cluster import Cluster, missing, running

RESULT = Path(__file__).parent / "results/submission.md"
MOST_SUBMISSION_SECONDS, MOST_STATUS_SECONDS = 10.0, 1.0
WAYS = {"separate jobs": "false", "arrays": "true"}


class Times(NamedTuple):
    """Seconds; and how many jobs there were in how many calls of sbatch."""

    pipeline: float
    sbatch: float
    status: float
    squeue: float
    jobs: int
    calls: int


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(cluster: Cluster, run: Path, num_experts: int, array: str) -> Times:
    def flexpert(*words: str) -> str:
        command = (sys.executable, "-m", "flexpert", *words)
        done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    experts = ",".join(f"owner-{number}:[data=demo_math]" for number in range(num_experts))
    words = [
        "pipeline=smoke", "pipeline.dense=null", f"pipeline.experts={{{experts}}}", "launcher=slurm",
        "launcher.options=[--hold]", f"launcher.array={array}", f"output_dir={run}",
    ]  # fmt: skip
    pipeline = timed(lambda: flexpert("pipeline", *words))
    status = timed(lambda: flexpert("status", f"run={run}"))
    squeue = timed(lambda: cluster.run("squeue", "--me", "--array"))
    listed = cluster.run("squeue", "--me", "--noheader", "--array").splitlines()
    calls = len(list((run / "slurm").glob("*.sbatch")))
    cluster.run("scancel", "--me")
    bare = ("--parsable", "--hold", "--output=/dev/null", "--wrap=true")
    sbatch = timed(lambda: [cluster.run("sbatch", *bare) for _ in range(calls)])
    cluster.run("scancel", "--me")
    return Times(pipeline, sbatch, status, squeue, len(listed), calls)


def spread(times: list[float]) -> str:
    return f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"


def table(times: dict[str, list[Times]], num_experts: int, slurm: str) -> str:
    repeats = len(next(iter(times.values())))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {slurm}"
    lines = [
        f"`flexpert pipeline launcher=slurm` of a public model and {num_experts} experts, and `flexpert status`; "
        f"{date.today()}, {machine}.",
        f"Seconds of whole processes, medians of {repeats} (smallest to largest); jobs are held; the peers are as many "
        "bare calls of sbatch, and squeue.",
        "",
        "| | jobs | calls of sbatch | `flexpert pipeline` | sbatch alone | ratio | `flexpert status` | squeue alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, runs in times.items():
        ratio = statistics.median(run.pipeline for run in runs) / statistics.median(run.sbatch for run in runs)
        cells = [
            way, str(runs[0].jobs), str(runs[0].calls), spread([run.pipeline for run in runs]),
            spread([run.sbatch for run in runs]), f"{ratio:.1f}", spread([run.status for run in runs]),
            spread([run.squeue for run in runs]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if reason := missing():
        sys.exit(f"submission.py: {reason}")
    times: dict[str, list[Times]] = {way: [] for way in WAYS}
    for _ in range(arguments.repeats):
        with running(num_nodes=1) as cluster, tempfile.TemporaryDirectory() as folder:
            slurm = cluster.run("sbatch", "--version").strip()
            for way, array in WAYS.items():
                times[way].append(measure(cluster, Path(folder) / array, arguments.experts, array))
    text = table(times, arguments.experts, slurm)
    print(text)
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(text, encoding="utf-8")
    pipeline, status = (
        max(statistics.median(getattr(run, name) for run in runs) for runs in times.values())
        for name in ("pipeline", "status")
    )
    sys.exit(pipeline >= MOST_SUBMISSION_SECONDS or status >= MOST_STATUS_SECONDS)


if __name__ == "__main__":
    main()
