"""Nodes that are not fit for a stage: they are named, with the reason, and the job runs without them."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cluster import SCRIPTS, Cluster, wait_for
from toy import SHAPE, with_toy

from flexpert.launch import health
from flexpert.launch.health import Unfit, check_disk, check_gpus, check_memory

#: In the place of `FLEXPERT_RUN`'s container: the stage says where it is, and all else is real, but that one node, the
#: first that makes the link, or all have what $SICKNESS makes of them.
RUN = """
if [[ $* == *"-m flexpert pretrain"* ]]; then
    echo "ran on $SLURMD_NODENAME"
    exit
fi
if [[ $* == *health* ]]; then
    ln -s "$SLURMD_NODENAME" "$SICK" 2> /dev/null
    [[ $ALL || $(readlink "$SICK") == "$SLURMD_NODENAME" ]] && eval "$SICKNESS"
fi
exec "$@"
"""


def submit(cluster: Cluster, path: Path, sickness: str, *options: str, **environment: str) -> int:
    """A job of two nodes that looks at them first."""
    (path / "run.sh").write_text(RUN)
    words = with_toy(*SHAPE, "data.dir=nowhere", f"output_dir={path}/run")
    return cluster.submit_stage(
        "pretrain", words, "--nodes=2", "--ntasks=3", f"--output={path}/log", *options,
        FLEXPERT_SETUP=f". {SCRIPTS}/check_nodes.sh",
        FLEXPERT_RUN=f"bash {path}/run.sh", SICK=f"{path}/sick", SICKNESS=sickness,
        TMPDIR=str(path), **environment,
    )  # fmt: skip


def ran_on(log: str) -> set[str]:
    return set(re.findall(r"ran on (\w+)", log))


@pytest.mark.slow
def test_a_job_leaves_out_a_bad_node_beside_those_that_it_was_told_to_and_names_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, f"export TMPDIR={tmp_path}/nowhere", "--exclude=n4")
    cluster.start_again(job, 1)
    end, log = cluster.completed(job), cluster.log(job)
    sick = os.readlink(tmp_path / "sick")
    assert log.count(f"{sick}: TMPDIR={tmp_path}/nowhere: No such file or directory\n") == 1
    assert set(cluster.run("scontrol", "show", "hostnames", end["ExcNodeList"]).split()) == {"n4", sick}
    assert ran_on(log) == set(cluster.nodes) - {"n4", sick} and end["Restarts"] == "1"
    said = log.partition("No such file or directory\n")[2].splitlines()
    said = [line for line in said if "ran on" not in line and not re.match(r"slurmstepd|srun|---", line)]
    assert len(said) == 2, said  # which nodes are left out, before; afterwards, that all are fit


@pytest.mark.slow
def test_a_task_that_hangs_is_told_of_by_the_other_and_costs_no_more_than_its_node(
    cluster: Cluster, tmp_path: Path
) -> None:
    """What waits for it is the collective, and Slurm ends it."""
    hurried = "from flexpert.launch import health; health.LIMIT = 15.0; health.main()"
    sickness = f"((SLURM_LOCALID)) && exec sleep 1000; exec python -P -c '{hurried}' \"${{@:5}}\""
    job = submit(cluster, tmp_path, sickness, SLURM_WAIT="40")
    cluster.start_again(job, 1)
    end, log = cluster.completed(job), cluster.log(job)
    sick = os.readlink(tmp_path / "sick")
    assert f"{sick}: a collective of its two tasks: no end within 15 s\n" in log
    assert end["ExcNodeList"] == sick and sick not in ran_on(log) and len(ran_on(log)) == 2


@pytest.mark.slow
def test_where_no_node_is_fit_the_job_ends_for_it_is_not_the_nodes(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, f"export TMPDIR={tmp_path}/nowhere", ALL="1")
    end, log = cluster.wait(job), cluster.log(job)
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "0", f"{health.UNFIT}:0")
    for node in cluster.run("scontrol", "show", "hostnames", end["NodeList"]).split():
        assert log.count(f"{node}: TMPDIR={tmp_path}/nowhere: No such file or directory\n") == 1
    assert not ran_on(log)


@pytest.mark.slow
def test_of_an_array_only_the_element_that_has_the_bad_node_starts_again(cluster: Cluster, tmp_path: Path) -> None:
    """The last one, whose id is the array's, too. What is asked here is answered without a look."""
    (tmp_path / "run.sh").write_text(
        r"""
        [[ $* == *job\ begin* ]] && exit
        [[ $* == *job\ end* ]] && exit "$6"
        if [[ $* == *health* ]]; then
            ((SLURM_ARRAY_TASK_ID == 0 || SLURM_RESTART_COUNT)) && echo "$SLURMD_NODENAME"
            exit
        fi
        ((SLURM_ARRAY_TASK_ID == 0)) && until [[ -e $DONE ]]; do sleep 0.2; done
        touch "$DONE"
        """
    )
    array = cluster.submit_stage(
        "pretrain", ["name=a"], "--array=0-1", f"--output={tmp_path}/%a", FLEXPERT_SETUP=f". {SCRIPTS}/check_nodes.sh",
        FLEXPERT_RUN=f"bash {tmp_path}/run.sh", DONE=f"{tmp_path}/done",
    )  # fmt: skip

    def elements() -> list[tuple[str, ...]]:
        shown = cluster.run("scontrol", "show", "job", "-o", str(array))
        return sorted(re.findall(r"ArrayTaskId=(\d) .* JobState=(\w+) .* Restarts=(\d)", shown))

    wanted = [("0", "COMPLETED", "0"), ("1", "COMPLETED", "1")]
    wait_for(f"{wanted} of the array", lambda: elements() == wanted, 60)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_disk_without_room_or_that_takes_nothing_is_not_fit(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unfit, match=f"TMPDIR={small_disk}: 64 MiB are free, 1024 are needed"):
        check_disk("TMPDIR", small_disk)
    monkeypatch.setattr(health, "MIN_FREE_BYTES", 1 << 20)
    check_disk("TMPDIR", small_disk)
    assert not list(small_disk.iterdir())
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(Unfit, match=f"TMPDIR={small_disk}: Read-only file system"):
        check_disk("TMPDIR", small_disk)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_node_whose_gpus_are_not_seen_is_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    check_gpus()
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")  # of the task, which was bound to these
    with pytest.raises(Unfit, match="Slurm gives 2 GPUs, and PyTorch sees 0"):
        check_gpus()


def test_a_node_whose_memory_is_taken_is_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_MEM_PER_NODE", raising=False)
    check_memory()
    monkeypatch.setenv("SLURM_MEM_PER_NODE", str(1 << 30))
    with pytest.raises(Unfit, match=r"GiB of memory are available of the 1048576\.0 GiB that Slurm gave"):
        check_memory()
