"""Weights & Biases, as a copy of `metrics.jsonl`: offline unless a key is set, and no more than an allowlist leaves."""

import contextlib
import hashlib
import importlib.util
import os
import queue
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexpert.checkpoint import envelope
from flexpert.config.groups import MonitorConfig
from flexpert.errors import UserError
from flexpert.monitor.jsonl import read_metrics
from flexpert.records import read_json

#: Groups and keys whose numbers and switches W&B may see. Paths, titles, prompts and anything new stay here.
ALLOWED_GROUPS = ("model.", "optim.", "train.")
ALLOWED_KEYS = ("router.bias", "seed")
#: Keys whose text it may see: choices and the expert's id.
ALLOWED_TEXT = ("optim.schedule", "train.device", "router.init", "name")

#: Seconds that W&B may take to reach its server, and for all of its start.
INIT_SECONDS, START_SECONDS = 30.0, 120.0
#: Seconds for what is not yet uploaded when a run ends, and to end after its process was killed.
FINISH_SECONDS, END_SECONDS = 30.0, 5.0
#: Rows that W&B may be behind: minutes at the least, for it takes thousands a second.
MAX_ROWS = 1000
#: What its client says where a server has understood and refused, as it does for a key that is not valid.
REFUSED = re.compile(r"returned error 4\d\d")
ADVICE = "; monitor.wandb=offline goes on without its server"
#: The directory that W&B's client makes for each start of a run: when, and the run's id, one of ours.
RUN_DIRECTORY = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-([0-9a-f]{16})")


def is_allowed(key: str, value: Any) -> bool:
    """Whether one {dotted key: value} may be uploaded."""
    if isinstance(value, str):
        return key in ALLOWED_TEXT and "/" not in value
    if not (key in ALLOWED_KEYS or key.startswith(ALLOWED_GROUPS)):
        return False
    return all(
        item is None or isinstance(item, (int, float)) for item in (value if isinstance(value, list) else [value])
    )


def allowed_config(flat: dict[str, Any]) -> dict[str, Any]:
    """The part of {dotted key: value} that may be uploaded."""
    return {key: value for key, value in flat.items() if is_allowed(key, value)}


def wandb_mode(config: MonitorConfig) -> str:
    """off, offline or online. Raises `UserError` when W&B is asked for by name and is not installed."""
    installed = importlib.util.find_spec("wandb") is not None
    if config.wandb == "auto":
        site = os.environ.get("WANDB_MODE", "")
        if not installed or site == "disabled":
            return "off"
        return "online" if os.environ.get("WANDB_API_KEY") and site != "offline" else "offline"
    if config.wandb != "off" and not installed:
        raise UserError(f"monitor.wandb={config.wandb} needs the wandb extra: pip install flexpert[wandb]")
    return config.wandb


def run_id(output: Path, resolved: str) -> str:
    """The same for a run that is started again in its directory, so that W&B continues it."""
    return hashlib.sha256(f"{output.resolve()}\n{resolved}".encode()).hexdigest()[:16]


class UnreachableError(UserError):
    """W&B's server does not answer, or with an error of its own."""


def start_run(
    config: MonitorConfig, mode: str, stage: str, output: Path, flat: dict[str, Any], identity: str | None = None
) -> Any:
    """A run of W&B's.

    Args:
        config: the group `monitor`.
        mode: offline or online.
        stage: job type.
        output: the stage's directory; W&B's files go below it.
        flat: the whole config; filtered here.
        identity: of `run_id`; None: that of the config.

    Raises:
        UserError: the key is missing, malformed or refused, or the run is.
        UnreachableError: the server did not answer within `INIT_SECONDS`.
    """
    # Reports of W&B's own errors, which it sends to its server from an offline run, too.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    settings = wandb.Settings(
        console="off",
        host="-",  # left out, it is this machine's name
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        init_timeout=INIT_SECONDS,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
        silent=True,
    )
    try:
        return wandb.init(
            mode="online" if mode == "online" else "offline",
            id=identity or default_id(output, flat),
            resume="allow" if mode == "online" else None,
            project=config.project,
            entity=config.entity,
            group=config.group,
            job_type=stage,
            name=f"{stage}-{flat['name']}" if "name" in flat else stage,
            dir=str(output),
            config=allowed_config(flat),
            settings=settings,
        )
    except wandb.errors.Error as error:
        reason = describe(error)
        is_refused = isinstance(error, (wandb.errors.UsageError, wandb.errors.AuthenticationError))
        kind = UserError if is_refused or REFUSED.search(reason) else UnreachableError
        raise kind(f"W&B: {reason}{ADVICE}") from None


def default_id(output: Path, flat: dict[str, Any]) -> str:
    return run_id(output, repr(sorted(allowed_config(flat).items())))


def recorded_id(output: Path) -> str | None:
    """The id that the run in a stage's directory has, wherever that was when it began; None: it was given none yet."""
    starts = [match.groups() for path in output.glob("wandb/*") if (match := RUN_DIRECTORY.fullmatch(path.name))]
    if starts:
        return str(max(starts)[1])
    checkpoints = output / "checkpoints"
    if not (steps := envelope.steps(checkpoints)):
        return None
    found = read_json(envelope.step_path(checkpoints, steps[-1]) / envelope.RECORD_NAME).get("wandb_id")
    return found if isinstance(found, str) and re.fullmatch(r"[0-9a-f]{16}", found) else None


def tell_missing(run: Any, rows: list[dict[str, Any]]) -> int:
    """Log those of a stage's rows that W&B's server does not have; returns how many these are.

    The server takes a run's steps in their order alone and tells a client that resumes the run which one is next. So
    where each start of a run begins with this, what the server has is the beginning of the rows, without gaps.

    Args:
        run: W&B's, resumed and online.
        rows: all of the stage's, in order.
    """
    first = run.starting_step
    missing = [row for row in rows if row["step"] >= first]
    for row in missing:
        run.log(row, step=row["step"])
    return len(missing)


class WandbRun:
    """The run of a stage that trains.

    W&B never ends or holds up the training. Its calls are made by a thread of their own, and whoever waits for that
    waits for a limited time. At the first error, or where its process is dead or stands still, one line says so, the
    process is killed, and the rest of the run goes without it. A server that cannot be reached when the run begins
    makes it an offline one.

    Args:
        config, mode, stage, output, flat: as of `start_run`.
        identity: of the run, as a checkpoint has it, so that a run that was moved goes on under it; None: see `run_id`.

    Attributes:
        id: the identity.

    Raises:
        UserError: the key is missing, malformed or refused.
    """

    def __init__(
        self,
        config: MonitorConfig,
        mode: str,
        stage: str,
        output: Path,
        flat: dict[str, Any],
        identity: str | None = None,
    ) -> None:
        self.id = identity or default_id(output, flat)
        self.config, self.stage, self.output, self.flat = config, stage, output, flat
        #: Rows, and at the end the exit code.
        self.rows: queue.Queue[dict[str, Any] | int] = queue.Queue(MAX_ROWS)
        self.error: BaseException | None = None  # that ended the thread
        self.is_left = False
        self.started = threading.Event()
        self.thread = threading.Thread(target=self.work, args=(mode,), name="wandb", daemon=True)
        self.thread.start()
        if not self.started.wait(START_SECONDS):
            self.leave(f"did not start within {START_SECONDS:g} s")
        elif isinstance(self.error, UserError) and not isinstance(self.error, UnreachableError):
            raise self.error
        elif self.error is not None:
            self.leave(f"did not start ({describe(self.error)})")

    def log(self, row: dict[str, Any]) -> None:
        """Pass a row of metrics on; it must not change any more."""
        if self.is_left:
            return
        if self.error is not None:
            self.leave(f"ended ({describe(self.error)})")
            return
        try:
            self.rows.put_nowait(row)
        except queue.Full:
            self.leave(f"has not taken {MAX_ROWS} rows")

    def close(self, failed: bool = False) -> None:
        """W&B shows a run as finished or, with an exit code other than 0, as failed."""
        if self.is_left:
            return
        with contextlib.suppress(queue.Full):
            self.rows.put_nowait(int(failed))
        self.thread.join(FINISH_SECONDS)
        if self.error is not None:
            self.leave(f"ended ({describe(self.error)})")
        elif self.thread.is_alive():
            self.leave(f"did not finish within {FINISH_SECONDS:g} s")

    def leave(self, what: str) -> None:
        self.is_left = True
        print(f"note: W&B {what}: nothing more is sent, and metrics.jsonl has every row", flush=True)
        kill_service()  # which ends what the thread waits for
        self.thread.join(END_SECONDS)

    def work(self, mode: str) -> None:
        """All that W&B does, in the thread."""
        try:
            run = self.start(mode)
            run.define_metric("*", step_metric="tokens")
            if mode == "online" and not run.offline:  # what an earlier start could not tell
                tell_missing(run, read_metrics(self.output / "metrics.jsonl"))
            self.started.set()
            while isinstance(row := self.rows.get(), dict):
                run.log(row, step=row["step"])
            run.finish(exit_code=row)
        except BaseException as error:  # also SystemExit
            kill_service()
            self.error = error
        finally:
            forget()
            self.started.set()

    def start(self, mode: str) -> Any:
        return start_reachable(
            lambda mode: start_run(self.config, mode, self.stage, self.output, self.flat, self.id), mode, self.output
        )[0]


def start_reachable(start: Callable[[str], Any], mode: str, output: Path) -> tuple[Any, str]:
    """What `start` returns for the mode, or for offline where the server cannot be reached; and that mode."""
    try:
        return start(mode), mode
    except UnreachableError as error:
        if mode == "offline":
            raise
        kill_service()  # which still holds the run's name
        forget()
        later = f"`flexpert sync run={output}` uploads it"
        print(f"note: {describe(error)}: this run is recorded offline, and {later}", flush=True)
        return start("offline"), "offline"


def describe(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].removesuffix(ADVICE)


def forget() -> None:
    """Have W&B end what it still has, as a run that failed: else it does so when this process ends, without a limit of
    time and with a traceback, and takes the next run for the same.
    """
    with contextlib.suppress(Exception, SystemExit):
        import wandb

        with contextlib.suppress(Exception):
            wandb.finish()
        wandb.teardown()


def kill_service() -> None:
    """Kill W&B's processes that this one has started."""
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread or the process has ended
            for child in children.read_text(encoding="ascii").split():
                if Path(f"/proc/{child}/comm").read_text(encoding="utf-8") == "wandb-core\n":
                    os.kill(int(child), signal.SIGKILL)
