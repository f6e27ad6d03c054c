"""How often to save: what share of a run's time trains, where runs fail now and then.

A failure may come at any instant and knows no past (its times are exponential), also while the run is starting again.
It costs the restart and all steps since the newest checkpoint that was on the disk; the one that was being written
then is lost, too. The law of renewals then gives the share exactly: every failure begins the same story anew.
"""

import math
from dataclasses import dataclass

from flexpert.config.stages import PlanConfig
from flexpert.planning.job import Job
from flexpert.planning.memory import FULL, HALF
from flexpert.planning.search import Choice

# Assumptions, as no run on such a cluster has measured them.
#: Mean time between failures of a run, and from a failure to started processes: noticed, queued, libraries and NCCL up.
HOURS_BETWEEN_FAILURES, RESTART_SECONDS = 3.0, 180.0
#: What a GPU copies to the host's pinned memory, GB/s: two thirds of what 16 lanes of PCIe 4.0 carry.
HOST_COPY_GBS = 20.0
#: What a save costs beside the copying: a copy is begun for each of some thousand tensors, and ranks wait for the last.
SAVE_SECONDS = 0.1


@dataclass(frozen=True)
class Saving:
    """A run that saves now and then. Times are in seconds.

    Attributes:
        step: an optimiser step.
        stall: how long training stands still for a save.
        write: how long it is written after that, beside the steps. A save that is due meanwhile waits for its end.
        restart: from a failure to the first step, unless another failure comes in between.
        between_failures: on average.
    """

    step: float
    stall: float
    write: float
    restart: float
    between_failures: float = 3600 * HOURS_BETWEEN_FAILURES

    def goodput(self, interval: int) -> float:
        """Share of the time that goes into steps that count in the end, where every `interval`-th one is saved.

        Where nothing is in the way, checkpoint i is on the disk i (work + stall) + write seconds after a start, which
        as many seconds without a failure must follow. From one failure to the next pass, on average,
        `between_failures` e^(restart / between_failures) seconds.
        """
        work, rate = interval * self.step, 1 / self.between_failures
        first, following = work + self.stall + self.write, max(work, self.write) + self.stall
        num_saved = math.exp(-rate * first) / -math.expm1(-rate * following)
        return work * num_saved * rate * math.exp(-rate * self.restart)

    def best_interval(self) -> int:
        """The interval of the highest goodput, which rises with the interval until there, and falls from there on."""
        low, high = 1, max(1, math.ceil(self.between_failures / self.step))
        while low < high:
            middle = (low + high) // 2
            if self.goodput(middle) < self.goodput(middle + 1):
                low = middle + 1
            else:
                high = middle
        return low


def checkpoint_bytes(job: Job) -> int:
    """A trained parameter and its two moments, in fp32; what is frozen is not saved again."""
    return 3 * FULL * job.num_trained()


def saving_of(choice: Choice, config: PlanConfig) -> Saving:
    """A stage in one of its layouts.

    A restart reads the checkpoint twice, to hash it and to load it, and once what is frozen, at the rate of writing.
    """
    job, rate = choice.job, config.cluster.write_gbs * 1e9
    saved, frozen = checkpoint_bytes(job), HALF * (job.model.num_params() - job.num_trained())
    staged = choice.memory.gradients + choice.memory.optimizer  # as many bytes as trained weights and moments
    return Saving(
        step=choice.cost.seconds,
        stall=SAVE_SECONDS + staged / (HOST_COPY_GBS * 1e9),
        write=saved / rate,
        restart=RESTART_SECONDS + (2 * saved + frozen) / rate,
    )
