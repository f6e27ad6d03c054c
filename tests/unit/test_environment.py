"""Which process this is, under torchrun, under srun, in a batch script and alone."""

import socket
import sys

import pytest

from flexpert.errors import UserError
from flexpert.parallel.environment import FIRST_PORT, NUM_PORTS, adopt_slurm
from flexpert.parallel.layout import Layout
from flexpert.parallel.mesh import process_groups

JOB = {"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}
STEP = JOB | {"SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
              "SLURM_STEP_NODELIST": "gpu[003-006,9],cpu1"}  # fmt: skip
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def adopted(environment: dict[str, str]) -> dict[str, str]:
    """What is new in it."""
    before = dict(environment)
    adopt_slurm(environment)
    assert before.items() <= environment.items()
    return {name: value for name, value in environment.items() if name not in before}


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Host names that resolve."""
    known: set[str] = set()

    def getaddrinfo(name: str, port: None) -> None:
        if name not in known:
            raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu[003-006,9],cpu1", "gpu003"), ("cpu1,gpu[3-4]", "cpu1"), ("n-1-[07]", "n-1-07"), ("", "")]
)
def test_the_meeting_place_is_the_first_node_of_the_step(nodes: str, first: str, names: set[str]) -> None:
    assert adopted(STEP | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == "10.0.0.7"
    names.add(first)
    assert adopted(STEP | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == (first or "10.0.0.7")


def test_a_step_of_srun_says_what_torchrun_would() -> None:
    new = adopted(dict(STEP))
    port = int(new.pop("MASTER_PORT"))
    assert new == {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.7"}
    assert FIRST_PORT <= port < FIRST_PORT + NUM_PORTS
    assert int(adopted(STEP | {"SLURM_STEP_ID": "3"})["MASTER_PORT"]) != port  # two steps of one job
    assert int(adopted(STEP | {"SLURM_PROCID": "6"})["MASTER_PORT"]) == port


@pytest.mark.parametrize("given", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_meeting_place_that_is_given_stays(given: str) -> None:
    assert given not in adopted(STEP | {given: "4242"})


@pytest.mark.parametrize(
    "environment",
    [{}, JOB, STEP | {"SLURM_STEP_NUM_TASKS": "1"}, TORCHRUN, STEP | TORCHRUN],
    ids=["alone", "a batch script without srun", "one task", "torchrun", "torchrun in a step"],
)
def test_nothing_is_adopted_elsewhere(environment: dict[str, str]) -> None:
    assert adopted(dict(environment)) == {}


def test_several_processes_without_megatron_core_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(UserError, match=r"several processes need the parallel extra: pip install flexpert\[parallel\]"):
        process_groups(Layout(2), "cpu")
