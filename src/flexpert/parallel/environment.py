"""Which of several processes this is, as torchrun or srun says in the environment; without PyTorch."""

import os
from collections.abc import MutableMapping

#: What torchrun sets.
NUM_RANKS, RANK, LOCAL_RANK = "WORLD_SIZE", "RANK", "LOCAL_RANK"
ADDRESS, PORT = "MASTER_ADDR", "MASTER_PORT"
#: The same in a step of Slurm's. A batch script without srun has the job's variables, but not the step's.
SLURM = {NUM_RANKS: "SLURM_STEP_NUM_TASKS", RANK: "SLURM_PROCID", LOCAL_RANK: "SLURM_LOCALID"}
#: Ports that a job's steps meet at: 20000 to 39999, below those that systems give out.
FIRST_PORT, NUM_PORTS = 20000, 20000


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Under srun, say what torchrun would; what is set already stays.

    Rank 0 is on the first node, where a batch script runs: the address is that of the node where srun was called.
    """
    if NUM_RANKS in environment or int(environment.get(SLURM[NUM_RANKS], "1")) == 1:
        return
    for name, theirs in SLURM.items():
        environment[name] = environment[theirs]
    environment.setdefault(ADDRESS, environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
    step = 31 * int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    environment.setdefault(PORT, str(FIRST_PORT + step % NUM_PORTS))


def num_ranks() -> int:
    return int(os.environ.get(NUM_RANKS, "1"))


def rank() -> int:
    return int(os.environ.get(RANK, "0"))


def is_first() -> bool:
    """Whether this is the process that writes records and prints."""
    return rank() == 0
