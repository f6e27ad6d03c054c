"""What makes a step directory a checkpoint: it is whole, it is this run's, and it is as it was written.

    checkpoints/.key                       made with the run, for its owner's eyes alone
    checkpoints/step-000000200/            committed: the name is the marker
        __0_0.distcp, …, .metadata         of torch distributed checkpoint
        checkpoint.json                    every file's SHA-256, and an HMAC of it all with the key
    checkpoints/.step-000000300.partial    being written, or what a kill left of that

Files are on the disk before checkpoint.json names them, that is before the directory takes its name by `rename`, and
the renaming before anything older is deleted. A step that is there is never written again. The key keeps out what
somebody else put there: another run's step, an older one's list, files made to do harm. Who can read the key, or is the
owner, can forge.
"""

import errno
import hmac
import json
import os
import re
import secrets
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flexpert.checkpoint.store import fsync_path
from flexpert.errors import UserError
from flexpert.records import canonical_json, read_record, sha256_file, write_record
from flexpert.testing import reached

STEP_NAME = re.compile(r"step-(\d{9})")
FILE_NAME = re.compile(r"\.metadata|__\d+_\d+\.distcp")
RECORD_NAME, KEY_NAME = "checkpoint.json", ".key"
KEY_BYTES = 32
#: Hashing lets other threads run, so this many files are read at a time.
HASHED_AT_A_TIME = min(8, os.cpu_count() or 1)
#: What the operating system says when there is no room.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Damaged(Exception):
    """A checkpoint is not what was written; the message names the file."""


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:09d}"


def partial_path(directory: Path, step: int) -> Path:
    return directory / f".step-{step:09d}.partial"


def steps(directory: Path) -> list[int]:
    """Steps that have a committed checkpoint, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(match[1]) for path in directory.iterdir() if (match := STEP_NAME.fullmatch(path.name)))


def open_key(directory: Path) -> bytes:
    """The run's key, which is made where there is none yet.

    Raises:
        UserError: there are checkpoints and no key; it is somebody else's, or others can read it.
    """
    path = directory / KEY_NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not path.exists() and not path.is_symlink():
            if steps(directory):
                raise UserError(
                    f"{path} is missing, with which this run's checkpoints are signed: put it back, or choose another "
                    "output_dir to begin anew (those of schema 1 have none: go on with the version that wrote them)"
                )
            make_key(path)
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), encoding="ascii") as file:
            facts, text = os.fstat(file.fileno()), file.read().strip()
    except UnicodeDecodeError:
        raise UserError(f"{path} is no key of ours") from None
    except OSError as error:
        raise UserError(f"{path} cannot be used as the key of this run's checkpoints: {error.strerror}") from None
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        raise UserError(
            f"{path} must be a file of yours with mode 600, or others could pass off files as this run's checkpoints; "
            "if you trust those that could read it, chmod 600 it"
        )
    if re.fullmatch(rf"[0-9a-f]{{{2 * KEY_BYTES}}}", text) is None:
        raise UserError(f"{path} is no key of ours")
    return bytes.fromhex(text)


def make_key(path: Path) -> None:
    temporary = path.with_name(f"{KEY_NAME}.{os.getpid()}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(secrets.token_hex(KEY_BYTES) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    fsync_path(path.parent)


def authenticator(record: dict[str, Any], key: bytes) -> str:
    """HMAC-SHA256 of all of a record but this."""
    return hmac.new(key, canonical_json({**record, "hmac": None}), "sha256").hexdigest()


def commit(directory: Path, step: int, files: dict[str, str], content: dict[str, Any], key: bytes) -> None:
    """Make a checkpoint of the partial directory of a step.

    Args:
        files: name → SHA-256 of every file, on the disk already.
        content: JSON that goes with it.

    Raises:
        OSError: it cannot be written; files of other machines are not here.
    """
    temporary = partial_path(directory, step)
    if files.keys() != {path.name for path in temporary.iterdir()}:
        raise OSError(errno.ENOENT, f"not all ranks write to the same {directory}: is its file system a shared one?")
    reached("manifest", step)
    record = {"step": step, "files": dict(sorted(files.items())), **content, "hmac": None}
    write_record(temporary / RECORD_NAME, "flexpert.checkpoint", record | {"hmac": authenticator(record, key)})
    fsync_path(temporary)
    reached("commit", step)
    os.rename(temporary, step_path(directory, step))


def make_durable(directory: Path, step: int) -> None:
    """After `commit`, and before anything older may go."""
    reached("committed", step)
    fsync_path(directory)


def read_checked(directory: Path, step: int, key: bytes) -> dict[str, Any]:
    """The record of a step, which names every file that is there; the files' content is for `check_file`.

    Raises:
        Damaged: it is not this run's or not this step's, files are missing, or there are others.
        UserError: the file system does not let it be read.
    """
    path = step_path(directory, step)
    if path.is_symlink() or not path.is_dir():
        raise Damaged(f"{path} is no directory")
    try:
        found = {entry.name: entry for entry in os.scandir(path)}
        for name, entry in sorted(found.items()):
            if not entry.is_file(follow_symlinks=False):
                raise Damaged(f"{path / name} is no file")
        if RECORD_NAME not in found:
            raise Damaged(f"{path / RECORD_NAME} is missing")
        written = (path / RECORD_NAME).read_bytes()
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    try:
        record = read_record(path / RECORD_NAME, "flexpert.checkpoint")
        signature = authenticator({name: record[name] for name in record.keys() - {"kind", "schema_version"}}, key)
    except UserError as error:
        raise Damaged(str(error)) from None
    except UnicodeEncodeError:
        raise Damaged(f"{path / RECORD_NAME} holds half a character") from None
    if not hmac.compare_digest(str(record.get("hmac")).encode(), signature.encode()):
        raise Damaged(f"{path / RECORD_NAME} was altered, or is another run's")
    if written != (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode():
        raise Damaged(f"{path / RECORD_NAME} was altered, if not in what it says")
    if record["step"] != step:
        raise Damaged(f"{path / RECORD_NAME} is that of step {record['step']}")
    for name in sorted(found):
        if name != RECORD_NAME and name not in record["files"]:
            raise Damaged(f"{path / name} is not listed in {RECORD_NAME}")
    for name in record["files"]:
        if FILE_NAME.fullmatch(name) is None:
            raise Damaged(f"{path / RECORD_NAME} lists {name!r}, which is no name of ours")
        if name not in found:
            raise Damaged(f"{path / name} is missing")
    return record


def damaged_files(path: Path, files: dict[str, str]) -> list[str]:
    """Those of `files` (name → SHA-256) whose content is another one; raises OSError where one cannot be read."""
    with ThreadPoolExecutor(HASHED_AT_A_TIME) as pool:
        digests = pool.map(lambda name: sha256_file(path / name), files)
        return [name for name, digest in zip(files, digests, strict=True) if digest != files[name]]


def set_aside(directory: Path, step: int) -> Path:
    """Give a damaged checkpoint another name: its own can be given again, and nothing is lost."""
    path, number = step_path(directory, step), 0
    while (aside := directory / f"damaged-{path.name}{f'-{number}' if number else ''}").exists():
        number += 1
    os.rename(path, aside)
    fsync_path(directory)
    return aside


def retain(directory: Path, keep: int, every: int | None) -> None:
    """Delete all but the `keep` newest checkpoints and those of steps that divide by `every`."""
    for step in older(directory, keep, every):
        discard(directory, step)


def older(directory: Path, keep: int, every: int | None) -> list[int]:
    return [step for step in steps(directory)[:-keep] if every is None or step % every]


def discard(directory: Path, step: int) -> None:
    """Delete a checkpoint; a kill in between leaves nothing that looks like one."""
    path = step_path(directory, step)
    if path.is_symlink():
        path.unlink()
        return
    removed = path.with_name(f".{path.name}.partial")
    os.rename(path, removed)
    reached("retention", step)
    shutil.rmtree(removed)


def sweep(directory: Path) -> None:
    """Delete what a kill left of a saving or a deletion; for who holds the run's lock."""
    for leftover in [*directory.glob(".step-*.partial"), *directory.glob(f"{KEY_NAME}.*.tmp")]:
        shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()


def check_room(directory: Path, num_bytes: int, every: int | None = None) -> None:
    """Raises `UserError` where the next checkpoint has no room, with what `make_room` can delete for it."""
    free = shutil.disk_usage(directory).free
    paths = [step_path(directory, step) for step in older(directory, 1, every)]
    if free + sum(file.stat().st_size for path in paths for file in path.glob("*")) < num_bytes:
        raise UserError(
            f"{directory} has {free / 2**20:,.0f} MiB free and a checkpoint takes {num_bytes / 2**20:,.0f} MiB: "
            "make room, or choose an output_dir on another file system"
        )


def make_room(directory: Path, num_bytes: int, every: int | None = None) -> None:
    """Delete older checkpoints as long as the next one has no room; never the newest, nor those that shall stay."""
    for step in older(directory, 1, every):
        if shutil.disk_usage(directory).free >= num_bytes:
            break
        discard(directory, step)
