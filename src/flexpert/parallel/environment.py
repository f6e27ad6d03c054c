"""Which of several processes this is, as torchrun or srun says in the environment; without PyTorch."""

import contextlib
import os
import re
import secrets
import socket
from collections.abc import Mapping, MutableMapping

#: What torchrun sets.
NUM_RANKS, RANK, LOCAL_RANK = "WORLD_SIZE", "RANK", "LOCAL_RANK"
ADDRESS, PORT = "MASTER_ADDR", "MASTER_PORT"
#: The same in a step of Slurm's. A batch script without srun has the job's variables, but not the step's.
SLURM = {NUM_RANKS: "SLURM_STEP_NUM_TASKS", RANK: "SLURM_PROCID", LOCAL_RANK: "SLURM_LOCALID"}
#: Ports that processes meet at: 20000 to 31999, below those that Linux gives to anyone who asks for one.
FIRST_PORT, NUM_PORTS = 20000, 12000


def free_port() -> int:
    """One that nobody listens at, for the processes that are about to be started here."""
    while True:
        port = FIRST_PORT + secrets.randbelow(NUM_PORTS)
        with contextlib.suppress(OSError), socket.socket() as trial:
            trial.bind(("", port))
            return port


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Under srun, say what torchrun would; what is set already stays.

    Rank 0 is on the step's first node. Where its name does not resolve, the address is that of the node where srun was
    called, which is the same one in a batch script.
    """
    if NUM_RANKS in environment or int(environment.get(SLURM[NUM_RANKS], "1")) == 1:
        return
    for name, theirs in SLURM.items():
        environment[name] = environment[theirs]
    environment.setdefault(ADDRESS, first_node(environment))
    step = 31 * int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    environment.setdefault(PORT, str(FIRST_PORT + step % NUM_PORTS))


def first_node(environment: Mapping[str, str]) -> str:
    """Of a list such as `gpu[003-006,9],cpu1`: gpu003, or an address in its place."""
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", environment.get("SLURM_STEP_NODELIST", ""))
    name = "".join(filter(None, found.groups())) if found is not None else ""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        name = ""
    return name or environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")


def num_ranks() -> int:
    return int(os.environ.get(NUM_RANKS, "1"))


def rank() -> int:
    return int(os.environ.get(RANK, "0"))


def is_first() -> bool:
    """Whether this is the process that writes records and prints."""
    return rank() == 0
