"""What the scripts in slurm/ start, and when they start it again, with small programs in the place of the stages."""

import json
import re
import shlex
from pathlib import Path

import pytest
from cluster import SCRIPTS, Cluster, wait_for
from toy import SHAPE

from flexpert.config.compose import compose

pytestmark = pytest.mark.slow

#: What a shell, Slurm and the stages' own grammar could each make something else of.
WORDS = [
    "name=a",
    """title=Müller & "Söhne" d'Or = $HOME `id` *? {a,b} \\ 漢字""",
    "",
    "two\nlines",
    "-n3",
    "~",
    "a  b",
]
#: In the place of `FLEXPERT_RUN`'s container; whether a start is worthwhile, these words would not let it say.
RECORD = """
import json, os, sys
if "flexpert.launch.job" in sys.argv: sys.exit()
names = "SLURM_STEP_NUM_TASKS SLURM_PROCID SLURM_LOCALID SLURMD_NODENAME CUDA_VISIBLE_DEVICES OMP_NUM_THREADS"
with open(f"{os.environ['RECORDS']}/{os.environ['SLURM_PROCID']}", "w") as file:
    json.dump([sys.argv[1:], {name: os.environ.get(name) for name in names.split()}], file)
"""


@pytest.mark.parametrize("stage", sorted(path.stem for path in SCRIPTS.glob("*.sbatch")))
def test_the_example_in_a_script_is_a_command_of_its_stage(stage: str) -> None:
    text = (SCRIPTS / f"{stage}.sbatch").read_text(encoding="utf-8")
    found = re.search(rf"#   sbatch .* slurm/{stage}\.sbatch (?:\\\n#       )?(.*)\n", text)
    assert found is not None
    compose(stage, shlex.split(found[1]))


@pytest.mark.parametrize(
    ("options", "num_nodes", "each", "threads"),
    [
        ("--nodes=2 --gpus-per-node=3 --cpus-per-gpu=2", 2, 3, 2),
        ("--nodes=2 --gpus-per-node=2", 2, 2, 1),
        ("--nodes=2 --cpus-per-task=4", 2, 1, 4),
        ("--nodes=1 --gpus-per-node=4 --ntasks-per-node=2 --cpus-per-task=3", 1, 2, 3),
    ],
    ids=["as many as GPUs", "as many as GPUs, on one CPU", "one on each node", "fewer than GPUs, as asked"],
)
def test_tasks_are(cluster: Cluster, tmp_path: Path, options: str, num_nodes: int, each: int, threads: int) -> None:
    """Words reach every one of them unchanged."""
    (tmp_path / "record.py").write_text(RECORD)
    (tmp_path / "records").mkdir()
    job = cluster.submit_stage(
        "expert", WORDS, *options.split(), f"--output={tmp_path}/log", OMP_NUM_THREADS="",
        FLEXPERT_RUN=f"python {tmp_path}/record.py", RECORDS=f"{tmp_path}/records",
    )  # fmt: skip
    cluster.completed(job)
    tasks = [json.loads(path.read_text()) for path in sorted((tmp_path / "records").iterdir())]
    assert len(tasks) == num_nodes * each
    gpus = re.search(r"--gpus-per-node=(\d)", options)
    for index, (words, names) in enumerate(tasks):
        assert words == ["python", "-P", "-m", "flexpert", "expert", *WORDS]
        assert (names["SLURM_PROCID"], names["SLURM_LOCALID"]) == (str(index), str(index % each))
        assert (names["SLURM_STEP_NUM_TASKS"], names["OMP_NUM_THREADS"]) == (str(len(tasks)), str(threads))
        if gpus is not None:
            assert names["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, range(int(gpus[1]))))
    assert len({names["SLURMD_NODENAME"] for _, names in tasks}) == num_nodes


def test_a_job_that_is_lost_at_every_start_is_given_up_with_the_reason(cluster: Cluster, tmp_path: Path) -> None:
    """As where a container cannot start: every task is killed before it has done anything."""
    (tmp_path / "lost").write_text('[[ "$*" == *launch.job* ]] && exec "$@"\nkill -9 $$')
    words = [*SHAPE, "data.dir=nowhere", "train.steps=4", f"output_dir={tmp_path}/run"]
    job = cluster.submit_stage("pretrain", words, f"--output={tmp_path}/log", FLEXPERT_RUN=f"bash {tmp_path}/lost")
    for restart in (1, 2):
        cluster.start_again(job, restart)
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "2", "2:0")
    log = (tmp_path / "log").read_text()
    assert log.count("task 0: Killed") == 3
    reason = [line for line in log.splitlines() if line.startswith("flexpert: ")]
    assert len(reason) == 1 and f"3 starts of this job in a row made no new checkpoint in {tmp_path}/run" in reason[0]


def test_a_job_that_is_cancelled_stays_so_whatever_its_tasks_say(cluster: Cluster, tmp_path: Path) -> None:
    told = f"trap 'touch {tmp_path}/told; exit 75' TERM; touch {tmp_path}/runs; while :; do sleep 0.1; done"
    (tmp_path / "told.sh").write_text(f'[[ "$*" == *launch.job* ]] && exec "$@"\n{told}')
    job = cluster.submit_stage(
        "assemble", ["base=a", "contributions=b"], f"--output={tmp_path}/log", FLEXPERT_RUN=f"bash {tmp_path}/told.sh"
    )
    wait_for("the task", (tmp_path / "runs").exists, 60)
    cluster.run("scancel", str(job))
    end = cluster.wait(job)
    assert (tmp_path / "told").exists()
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0")


def test_a_mistake_ends_the_job_with_its_line(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit_stage("pretrain", ["train.stepz=4"], f"--output={tmp_path}/log", "--nodes=2")
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "0", "2:0")
    start, line = (tmp_path / "log").read_text().splitlines()
    assert re.fullmatch(rf"--- pretrain: job {job}, start 1 at \S+ on n\[\d-\d\]", start)
    assert line.startswith("flexpert: unknown key 'train.stepz' for stage pretrain; did you mean train.steps?")
