"""The rank that the others wait for is named, and nobody where nobody is slow."""

import re
import socket
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from flexpert.parallel import straggler
from flexpert.parallel.layout import Layout
from flexpert.parallel.mesh import build_meshes
from flexpert.parallel.ranks import ALONE, Ranks
from flexpert.parallel.straggler import Straggler

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def looks(reading: float, slow_reader: int, computing: float, slow_computer: int) -> list[str | None]:
    """Three looks, each after two steps, of a rank that reads for long and one that has four times the product.

    Args:
        reading, computing: seconds of the slow reader and of all ranks.
    """
    rank = dist.get_rank()
    socket.gethostname = lambda: f"node{rank + 4}"  # in a process of its own
    if rank == slow_computer:
        straggler.CPU_SIZE = 400
    if slow_reader >= 0:
        straggler.probe = lambda _: 0.001  # on a crowded machine two might differ
    watch = Straggler(Ranks(build_meshes(Layout(3), CPU)))
    messages = []
    for step in range(6):
        started = time.perf_counter()
        time.sleep(reading if rank == slow_reader else 0)
        watch.waited(time.perf_counter() - started)
        dist.barrier()
        time.sleep(computing)
        if step % 2:
            messages.append(watch.look(CPU))
    return messages


def test_a_rank_that_waits_for_its_data_is_named_on_the_first_one_and_once() -> None:
    first, *others = run_ranks(looks, 3, 0.3, 1, 0.0, -1)
    assert others == [[None] * 3, [None] * 3]
    assert first[0] is None and first[2] is None
    told = re.fullmatch(r"rank 1 \(node5\) takes (.*) s a step to get its data where the others take (.*) s", first[1])
    assert told is not None and float(told[1]) >= 0.3 > float(told[2])


def test_a_rank_that_computes_slowly_is_named() -> None:
    first, *_ = run_ranks(looks, 3, 0.0, -1, 0.3, 2)
    told, *later = [line.partition("; ")[0] for line in filter(None, first)]
    assert not any("rank 2 " in line for line in later), "once"
    assert told.startswith("rank 2 (node6) computes ") and told.endswith(" times slower than the others")
    assert float(told.split()[4]) > straggler.SLOWDOWN


def test_of_equal_ranks_none_is_named() -> None:
    assert run_ranks(looks, 3, 0.0, -1, 0.01, -1) == [[None] * 3] * 3


def test_one_process_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(straggler, "probe")
    watch = Straggler(ALONE)
    watch.waited(9.0)
    assert watch.look(CPU) is None


def rank_0(num_ranks: int) -> Straggler:
    """What rank 0 has, when the others are told of by tensors."""
    watch = Straggler(ALONE)
    watch.hosts = [f"node{rank // 8}" for rank in range(num_ranks)]
    return watch


def all_but(num_ranks: int, waits: dict[int, float], probes: dict[int, float] | None = None) -> Tensor:
    """Seconds of all ranks, equal but for these."""
    all_R2 = torch.tensor([[0.01, 2e-4]], dtype=torch.float64).repeat(num_ranks, 1)
    for axis, seconds in enumerate((waits, probes or {})):
        for rank, value in seconds.items():
            all_R2[rank, axis] = value
    return all_R2


def test_what_does_not_change_is_said_again_after_ten_looks_and_what_is_new_at_once() -> None:
    watch = rank_0(4)
    said = [watch.report(all_but(4, {3: 0.5}), 1.0) for _ in range(13)]
    assert [number for number, message in enumerate(said) if message] == [1, 11]
    assert said[1] == said[11] == "rank 3 (node0) takes 0.50 s a step to get its data where the others take 0.01 s"
    both = [watch.report(all_but(4, {3: 0.5}, {0: 4.2e-4}), 1.0) for _ in range(2)]
    assert both == [None, f"rank 0 (node0) computes 2.1 times slower than the others; {said[1]}"]
    assert [watch.report(all_but(4, {3: 0.5}), 1.0) for _ in range(5)] == [None] * 5


def test_a_hiccup_is_not_a_straggler() -> None:
    watch = rank_0(4)
    assert not any(watch.report(all_but(4, {look % 2: 5.0}, {look % 3: 1.0}), 9.0) for look in range(12))


def test_what_costs_little_of_a_step_is_not_said() -> None:
    for waits, probes, step_seconds in (
        ({2: 0.1}, {}, 0.2), ({2: 1.0}, {}, 30.0), ({}, {2: 6e-4}, 0.1), ({}, {2: 2.8e-4}, 30.0)
    ):  # fmt: skip
        watch = rank_0(4)
        assert not any(watch.report(all_but(4, waits, probes), step_seconds) for _ in range(3))


def test_of_two_ranks_the_slower_is_named() -> None:
    watch = rank_0(2)
    found = [watch.report(all_but(2, {}, {0: 4e-4}), 1.0) for _ in range(2)]
    assert found[1] == "rank 0 (node0) computes 2.0 times slower than the others"


def test_of_hundreds_a_line_names_those_that_cost_most() -> None:
    watch = rank_0(512)
    waits = {rank: 1.0 + rank / 100 for rank in range(100, 300)}
    (_, message) = (watch.report(all_but(512, waits), 5.0) for _ in range(2))
    assert message is not None
    assert message.startswith("rank 299 (node37) takes 3.99 s") and message.endswith("; and 192 more")
    assert message.count("rank ") == 8
