"""A real Slurm on loopback, for tests: daemons in the foreground below one process, all files in a short directory.

Jobs run as whoever runs the tests, root or not. There are no cgroups and, where accounts are not asked for, no
database: what became of a job is asked of the controller, which forgets none of them.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

KEEPER = Path(__file__).with_name("keeper.py")
SCRIPTS = Path(__file__).parents[2] / "slurm"
#: Below the ports of Linux's choice, and below those that a job's ranks meet at.
PORTS = range(10000, 19000)
#: How often the state of something is asked for, seconds.
POLL = 0.2
#: States that a job does not leave by itself.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")

CONF = """
ClusterName=flexpert
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge/sock,cred_expire=10
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
{accounting}
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
PropagateResourceLimits=NONE
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
DefMemPerCPU=100
# Other clusters' jobs on this machine have other ids, and meet at other ports.
FirstJobId={first_job}
MinJobAge=86400
KillWait=10
{message_timeout}
InactiveLimit=0
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
GresTypes=gpu
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs={cpus} RealMemory=64000 {gres}
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE DefaultTime=60
"""

#: A machine that is busy with all of a cluster answers late.
MESSAGE_TIMEOUT = "MessageTimeout=60"
#: Accounts: nobody may submit a job without one.
ACCOUNTING = """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={directory}/munge/sock
AccountingStorageEnforce=associations"""
DATABASE_CONF = """
AuthType=auth/munge
AuthInfo=socket={directory}/munge/sock
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
PidFile={directory}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user}
"""


def missing(accounts: bool = False) -> str | None:
    """Why there can be no cluster here, or none that keeps accounts."""
    names = ["slurmctld", "slurmd", "sbatch", "munged"]
    packages = "slurmctld slurmd slurm-client munge"
    if accounts:
        names += ["slurmdbd", "mariadbd", "mariadb-install-db"]
        packages += " slurmdbd slurm-wlm-mysql-plugin mariadb-server-core mariadb-client-core"
    absent = [name for name in names if shutil.which(name, path=path()) is None]
    return f"no {', '.join(absent)}: apt-get install {packages}" if absent else None


def path() -> str:
    """Where programs are: this Python first, daemons, which are for root, too."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"


def wait_for(what: str, condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(POLL)


def free_ports(number: int) -> int:
    """The first of so many in a row that nobody listens at."""
    for _ in range(100):
        first = random.choice(PORTS)
        try:
            for port in range(first, first + number):
                with socket.socket() as trial:
                    trial.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError(f"no {number} free ports in a row")


def watching(processes: list[int]) -> set[int]:
    """The slurmstepd of each, which would report what becomes of it."""
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):  # it has ended
            parent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]
            if Path(f"/proc/{parent}/comm").read_text() == "slurmstepd\n":
                found.add(int(parent))
    return found


class Cluster:
    """Attributes:
        directory: with `log/`, of the daemons, and `slurm.conf`.
        nodes: names.
        environment: for Slurm's commands, and so for jobs.

    Args:
        num_nodes, cpus, gpus: how many nodes, and CPUs and pretended GPUs of each.
        within: a command in which each node is started.
        accounts: whether there is a database, with the account `lab`, in which the user of the tests is.
    """

    def __init__(
        self, directory: Path, num_nodes: int, cpus: int, gpus: int, within: list[str], accounts: bool
    ) -> None:
        self.directory, self.within, self.accounts = directory, within, accounts
        self.nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        # What a job around the tests has set is not for the jobs in here.
        outside = {name: v for name, v in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.environment = outside | {"SLURM_CONF": str(directory / "slurm.conf"), "PATH": path()}
        self.user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        self.processes: dict[str, int] = {}
        for name in ("munge", "state", "log", "dev", *(f"spool/{node}" for node in self.nodes)):
            (directory / name).mkdir(parents=True, mode=0o755)
        (directory / "munge/key").write_bytes(os.urandom(1024))
        (directory / "munge/key").chmod(0o600)
        self.configure(cpus, gpus)
        self.keeper = subprocess.Popen(
            [sys.executable, str(KEEPER)],
            env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def configure(self, cpus: int, gpus: int) -> None:
        nodes = f"n[1-{len(self.nodes)}]"
        port = free_ports(2 + len(self.nodes))
        common = {
            "directory": self.directory, "host": socket.gethostname().split(".")[0], "user": self.user, "port": port,
        }  # fmt: skip
        accounting = ACCOUNTING.format(**common) if self.accounts else "AccountingStorageType=accounting_storage/none"
        names = {
            **common, "message_timeout": MESSAGE_TIMEOUT, "accounting": accounting,
            "controller_port": port + 1, "node_ports": f"{port + 2}-{port + 1 + len(self.nodes)}",
            "nodes": nodes, "cpus": cpus, "gres": f"Gres=gpu:{gpus}" if gpus else "",
            "first_job": random.randrange(1, 60000),
        }  # fmt: skip
        (self.directory / "slurm.conf").write_text(CONF.format(**names))
        database = self.directory / "slurmdbd.conf"
        database.touch(mode=0o600)  # slurmdbd reads no other
        database.write_text(DATABASE_CONF.format(**common))
        for number in range(gpus):  # a device must be one, and no two may be the same
            (self.directory / f"dev/gpu{number}").symlink_to("/dev/null")
        devices = f"NodeName={nodes} Name=gpu File={self.directory}/dev/gpu[0-{gpus - 1}]\n" if gpus else ""
        (self.directory / "gres.conf").write_text(devices)

    def start(self) -> None:
        munge = self.directory / "munge"
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in files.items()]
        self.start_daemon("munged", "munged", "--foreground", "--force", "--num-threads=2", *options)
        wait_for("munged", (munge / "sock").exists, 30)
        if self.accounts:
            self.start_database()
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        for node in self.nodes:
            self.wait_for_node(node)

    def start_daemon(self, name: str, *command: str) -> None:
        assert self.keeper.stdin is not None and self.keeper.stdout is not None
        print(json.dumps([command, str(self.directory / "log" / name)]), file=self.keeper.stdin, flush=True)
        self.processes[name] = int(self.keeper.stdout.readline())

    def start_database(self) -> None:
        """MariaDB, with a socket alone, slurmdbd, and the one account."""
        data, server = self.directory / "database", self.directory / "mariadb.sock"
        options = ["--no-defaults", f"--datadir={data}", f"--user={self.user}"]
        self.run("mariadb-install-db", *options, "--auth-root-authentication-method=socket", "--skip-test-db")
        self.start_daemon("mariadbd", "mariadbd", *options, f"--socket={server}", "--skip-networking")
        wait_for("mariadbd", server.exists, 60)
        self.start_daemon("slurmdbd", "env", f"MYSQL_UNIX_PORT={server}", "slurmdbd", "-D")
        self.accounting("add", "cluster", "flexpert")
        self.accounting("add", "account", "lab")
        self.accounting("add", "user", self.user, "account=lab")

    def accounting(self, *words: str) -> None:
        """`sacctmgr`, without questions, until there is a database that has done it, now or for who asked before."""
        deadline = time.monotonic() + 120
        while True:
            command = ["sacctmgr", "--immediate", *words]
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
            if done.returncode == 0 or "already exist" in done.stdout + done.stderr:
                return
            assert time.monotonic() < deadline, f"{command}: {done.stdout}{done.stderr}"
            time.sleep(POLL)

    def start_controller(self, *options: str) -> None:
        self.start_daemon("slurmctld", "slurmctld", "-D", *options)
        wait_for("slurmctld", lambda: "is UP" in self.run("scontrol", "ping", check=False), 30)

    def start_node(self, node: str) -> None:
        self.start_daemon(node, *self.within, "slurmd", "-D", "-N", node)

    def wait_for_node(self, node: str) -> None:
        """Until it can take jobs."""
        wait_for(node, lambda: self.run("sinfo", "-hn", node, "-o", "%t").strip() in ("idle", "mix", "alloc"), 30)

    def kill_daemon(self, name: str) -> None:
        """SIGKILL; of a node its slurmd alone: jobs do not notice."""
        os.kill(self.processes.pop(name), signal.SIGKILL)

    def kill_node(self, node: str) -> None:
        """As if the power had failed: slurmd and every process of a job there; nothing is told to the controller."""
        processes = self.processes_on(node)
        self.kill_daemon(node)
        for process in [*watching(processes), *processes]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def processes_on(self, node: str) -> list[int]:
        """Those of jobs, from the batch script on."""
        here = {f"SLURM_CONF={self.directory}/slurm.conf".encode(), f"SLURMD_NODENAME={node}".encode()}
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if entry.name.isdecimal() and here <= set((entry / "environ").read_bytes().split(b"\0")):
                    found.append(int(entry.name))
        return found

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """One of Slurm's commands; returns what it prints."""
        done = subprocess.run(
            command, env=self.environment | environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    @contextlib.contextmanager
    def login(self, **environment: str) -> Iterator[None]:
        """While the block runs, this process is one on a login node of the cluster."""
        before = dict(os.environ)
        os.environ |= self.environment | environment
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def submit(self, *arguments: str | Path, **environment: str) -> int:
        """A job of `sbatch ARGUMENTS`; returns its id."""
        return int(self.run("sbatch", "--parsable", *map(str, arguments), check=True, **environment))

    def submit_stage(self, stage: str, words: list[str], *options: str, **environment: str) -> int:
        """`sbatch OPTIONS slurm/STAGE.sbatch WORDS`, as one would type it; one thread where nothing else is said."""
        environment = {"OMP_NUM_THREADS": "1", **environment}
        return self.submit(*options, SCRIPTS / f"{stage}.sbatch", *words, **environment)

    def job(self, number: int | str) -> dict[str, str]:
        """Everything that `scontrol show job` says: JobState, Reason, Restarts, ExitCode, …"""
        text = self.run("scontrol", "show", "job", "-o", str(number))
        return dict(re.findall(r"(?:^| )(\w[\w:/]*)=(.*?)(?= \w[\w:/]*=|\s*$)", text))

    def wait(self, number: int | str, *states: str, seconds: float = 60.0) -> dict[str, str]:
        """Until a job is in one of these states, or has ended where none is given; returns its `job`."""
        wanted, job = states or ENDED, self.job(number)
        deadline = time.monotonic() + seconds
        while job["JobState"] not in wanted:
            assert time.monotonic() < deadline, f"job {number} is not {' or '.join(wanted)}: {job}"
            time.sleep(POLL)
            job = self.job(number)
        return job

    def completed(self, number: int | str, seconds: float = 120.0) -> dict[str, str]:
        """`wait` for a job that ends well."""
        end = self.wait(number, seconds=seconds)
        assert end["JobState"] == "COMPLETED", f"{end}\n{self.log(number)}"
        return end

    def log(self, number: int | str) -> str:
        """What a job has printed, in all of its starts."""
        path = Path(self.job(number)["StdOut"])
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def requeued(self, number: int | str, restarts: int) -> None:
        """Until a job waits after its `restarts`-th requeue; who comes late finds it on its way again."""
        wait_for(f"requeue {restarts} of job {number}", lambda: int(self.job(number)["Restarts"]) >= restarts, 90)
        self.wait(number, "PENDING", "RUNNING", *ENDED)

    def start_again(self, number: int | str, restarts: int) -> None:
        """Start a job that is `requeued` without waiting until its credential has expired."""
        self.requeued(number, restarts)
        # A node takes no credential of the second in which it has killed the job.
        self.run("scontrol", "update", f"jobid={number}", "starttime=now+2", check=False)

    def stop(self) -> None:
        """Everything, jobs included."""
        assert self.keeper.stdin is not None
        self.keeper.stdin.close()
        self.keeper.wait()


@contextlib.contextmanager
def running(
    num_nodes: int = 3, cpus: int = 16, gpus: int = 0, within: Iterable[str] = (), accounts: bool = False
) -> Iterator[Cluster]:
    """A cluster while the block runs; arguments as `Cluster`'s."""
    # Slurm's sockets are in it, whose paths may have 108 bytes: pytest's own directories are too deep.
    directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        cluster = Cluster(directory, num_nodes, cpus, gpus, list(within), accounts)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(directory)
