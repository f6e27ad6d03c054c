"""What stages that train into a directory share: claiming it, the device, the CPU threads."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from flexpert.config.groups import ParallelConfig
from flexpert.errors import UserError
from flexpert.parallel.environment import is_first
from flexpert.records import write_atomic

#: Keys that may change when a stage is started again in its directory: they do not change what it computes, or are what
#: a run that has stopped is to be mended by.
FREE_KEYS = (
    "monitor", "checkpoint", "resume", "parallel", "output_dir", "batch_sequences", "moe_backend", "device",
    "train.recompute", "train.step_timeout", "train.spike_threshold", "train.max_skipped",
    "local_copy",
)  # fmt: skip

#: What a kill leaves of a `resolved.yaml` that was being written.
UNFINISHED = ".resolved.yaml.*.tmp"

#: Changed keys that a message spells out.
NAMED_CHANGES = 3


def comparable(resolved: str) -> dict[str, Any]:
    """A resolved config as {dotted key: value}, without the free keys."""

    def flatten(node: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix.removesuffix("."): node}
        return {key: leaf for name, value in node.items() for key, leaf in flatten(value, f"{prefix}{name}.").items()}

    return {
        key: value
        for key, value in flatten(yaml.safe_load(resolved), "").items()
        if key not in FREE_KEYS and key.split(".")[0] not in FREE_KEYS
    }


def said(config: dict[str, Any], key: str) -> str:
    """The value of a key as a message shows it."""
    value = config.get(key)
    return "unset" if value is None else str(value)


def has_results(output: Path) -> bool:
    """Whether a stage left more here than its beginnings, which there is no need to keep."""
    beginnings = ("resolved.yaml", ".lock", "wandb")
    paths = [path for path in output.iterdir() if path.name not in beginnings and not path.match(UNFINISHED)]
    paths = [path for path in paths if path.name != "checkpoints" or any(path.glob("*step-*"))]
    return any(path.name != "metrics.jsonl" or path.stat().st_size > 0 for path in paths)


def check_directory(output: Path, resolved: str, resume: str) -> None:
    """Refuse a directory that is not this configuration's; writes nothing.

    Raises:
        UserError: it holds another configuration or other files, or `resume=never` and it holds one at all.
    """
    record = output / "resolved.yaml"
    if record.is_file():
        before, now = comparable(record.read_text(encoding="utf-8")), comparable(resolved)
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed and has_results(output):
            shown = ", ".join(
                f"{key} was {said(before, key)} and is {said(now, key)}" for key in changed[:NAMED_CHANGES]
            )
            more = f" (and {len(changed) - NAMED_CHANGES} more)" if len(changed) > NAMED_CHANGES else ""
            raise UserError(f"{output} holds another configuration: {shown}{more}; choose another output_dir")
        if resume == "never":
            raise UserError(f"{output} has been used already and resume=never; choose another output_dir")
    elif output.is_dir() and not all(path.match(UNFINISHED) for path in output.iterdir()):
        raise UserError(f"{output} holds files of something else; choose another output_dir")


def claim_directory(output: Path, resolved: str, resume: str) -> None:
    """Make `output` this configuration's directory: `check_directory`, then write `resolved.yaml` into it.

    To be called when nothing in the configuration can turn out wrong any more: a directory that was claimed by a
    mistake refuses the corrected command.

    Raises:
        UserError: as `check_directory`, or it cannot be written.
    """
    check_directory(output, resolved, resume)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for path in output.glob(UNFINISHED):
            path.unlink(missing_ok=True)
        write_atomic(output / "resolved.yaml", resolved)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from None


class Notes(logging.Handler):
    """Prints what rank 0 logs, on standard error: what `generate` prints on standard output is text alone."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_first():
            print(f"note: {record.getMessage()}", file=sys.stderr, flush=True)


def set_up_process(device: str, config: ParallelConfig) -> Any:
    """Choose the device, set CPU threads, join the other processes; returns the `torch.device`.

    Raises:
        UserError: a device that is unknown or not there; processes that cannot be reached.
    """
    import torch

    from flexpert.parallel.process import join_ranks

    if config.threads is not None:
        torch.set_num_threads(min(config.threads, os.cpu_count() or 1))
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={device} is not one of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but PyTorch finds no CUDA device here")
    kernels = logging.getLogger("flexpert_kernels")  # says which backend it has chosen
    kernels.setLevel(logging.INFO)
    if not kernels.handlers:
        kernels.addHandler(Notes())
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    return join_ranks(torch.device("cuda" if use_cuda else "cpu"), config.timeout)
