"""Which rank the others wait for, in a line for the log.

All meet in every collective, so by the time that a step takes no rank is slower than another. What tells them apart is
what each does alone: the seconds before a step's first collective, and how fast its device computes the same product.
"""

import socket
import statistics
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flexpert.monitor.stopwatch import Stopwatch
from flexpert.parallel.collectives import all_gather
from flexpert.parallel.ranks import Ranks

#: Seconds that all lose at every step for one rank, from which it is worth a line: less is the noise of small runs, of
#: crowded CPUs, or the records that rank 0 writes.
LOST_SECONDS = 0.1
#: The same as a share of a step: a run of 30 s a step has no straggler in one that is a second late.
LOST_SHARE = 0.05
#: Times the others' time for the product: a throttled or a shared device is beyond it, or one of an older kind. Equal
#: ones must not be: of 420 probes by 3 and 4 ranks that crowd 2 CPU cores, none took more than 1.47 times the median.
SLOWDOWN = 1.5
#: The product, square: 137 GFLOP in bf16 with 64 MiB, below a millisecond on a data centre's GPU; 34 MFLOP in fp32, as
#: long on a CPU's core.
CUDA_SIZE, CPU_SIZE = 4096, 256
#: Times that it is computed; the smallest counts, and not what starting or another process adds.
NUM_PROBES = 6
#: Looks until what was said, and has not changed, is said again.
REPEAT = 10
#: Ranks that a line names, those first that cost most.
NUM_NAMED = 8


class Slow(NamedTuple):
    """Attributes: seconds that the others lose by it at every step; rank; whether it computes slowly; how to say it."""

    lost: float
    rank: int
    computes: bool
    words: str


class Straggler:
    """Watches for ranks that are slow twice in a row; with one process it does nothing.

    Args:
        ranks: those that train together; all of them make this object together, and call `look` together.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.is_alone = ranks.meshes is None
        self.hosts: list[str] = []
        self.spent, self.num_steps, self.since = 0.0, 0, time.monotonic()
        self.last: set[tuple[int, bool]] = set()  # slow in the last look
        self.told: set[tuple[int, bool]] = set()
        self.looks_since_told = 0
        if not self.is_alone:
            self.hosts = [""] * dist.get_world_size()
            dist.all_gather_object(self.hosts, socket.gethostname())

    def waited(self, seconds: float) -> None:
        """Once a step: what this rank has spent on its own before the step's first collective."""
        self.spent += seconds
        self.num_steps += 1

    def look(self, device: torch.device) -> str | None:
        """Compare all ranks over the steps since the last look; collective.

        Returns:
            on rank 0, a line that names those that the others wait for, when there is something to say.
        """
        if self.is_alone:
            return None
        now, num_steps = time.monotonic(), max(1, self.num_steps)
        own = torch.tensor([[self.spent / num_steps, probe(device)]], dtype=torch.float64, device=device)
        step_seconds = (now - self.since) / num_steps
        assert dist.group.WORLD is not None
        all_R2 = all_gather(own, 0, dist.group.WORLD)
        self.spent, self.num_steps, self.since = 0.0, 0, time.monotonic()
        return self.report(all_R2.cpu(), step_seconds) if dist.get_rank() == 0 else None

    def report(self, all_R2: Tensor, step_seconds: float) -> str | None:
        """What there is to say of each rank's own seconds a step and seconds for the product, [ranks, 2]."""
        found = {(slow.rank, slow.computes): slow for slow in self.slow(all_R2, step_seconds)}
        again, self.last = found.keys() & self.last, set(found)  # a hiccup, or a neighbour's, is not seen twice
        self.looks_since_told += 1
        if not again or (again <= self.told and self.looks_since_told < REPEAT):
            return None
        self.told, self.looks_since_told = again, 0
        worst = sorted((found[key] for key in again), reverse=True)
        more = [f"and {len(worst) - NUM_NAMED} more"] if len(worst) > NUM_NAMED else []
        return "; ".join([slow.words for slow in worst[:NUM_NAMED]] + more)

    def slow(self, all_R2: Tensor, step_seconds: float) -> list[Slow]:
        waits, probes = all_R2.T.tolist()
        # The lower one of two in the middle: of two ranks, the faster.
        usual_wait, usual_probe = statistics.median_low(waits), statistics.median_low(probes)
        found = []
        for rank, (host, wait, seconds) in enumerate(zip(self.hosts, waits, probes, strict=True)):
            if wait - usual_wait > max(LOST_SECONDS, LOST_SHARE * step_seconds):
                what = "to get its data and write the records" if rank == 0 else "to get its data"
                words = f"takes {wait:.2f} s a step {what} where the others take {usual_wait:.2f} s"
                found.append(Slow(wait - usual_wait, rank, False, f"rank {rank} ({host}) {words}"))
            lost = (1 - usual_probe / seconds) * step_seconds  # a step takes as long as on the slowest
            if seconds > SLOWDOWN * usual_probe and lost > LOST_SECONDS:
                words = f"computes {seconds / usual_probe:.1f} times slower than the others"
                found.append(Slow(lost, rank, True, f"rank {rank} ({host}) {words}"))
        return found


def probe(device: torch.device) -> float:
    """Seconds that the device takes for a small product of matrices."""
    on_gpu = device.type == "cuda"
    size, dtype = (CUDA_SIZE, torch.bfloat16) if on_gpu else (CPU_SIZE, torch.float32)
    x = torch.ones(size, size, dtype=dtype, device=device)  # no random numbers: training's are not to move
    out = torch.empty_like(x)
    watch = Stopwatch(device)
    for number in range(NUM_PROBES):
        torch.mm(x, x, out=out)
        watch.end(str(number))
    if on_gpu:
        torch.cuda.synchronize(device)
    return min(watch.seconds().values())
