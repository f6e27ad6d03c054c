"""The directories of a config, looked at before the stage's module, and PyTorch with it, is imported.

An option names the kind of directory that it takes: `opt(…, path="model")`; or `output`, what a stage writes; or
`input`, a file; or `file`, what the stage itself looks at. A pipeline composes the configs of stages
whose inputs are still to be made, so composing does not look; the command that starts a stage does.
"""

import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

from flexpert.config.schema import leaves_of
from flexpert.errors import UserError


class Kind(NamedTuple):
    """What a directory can be: how it is called, the file that tells it, and the remedy where there is none."""

    noun: str
    marker: str
    remedy: str


KINDS = {
    "data": Kind("a data set", "manifest.json", "give a directory that `flexpert prepare` wrote"),
    "contribution": Kind(
        "a contribution", "contribution.json", "give the directory `contribution` that `flexpert expert` wrote"
    ),
    "model": Kind("a model", "config.json", "give a Hugging Face model directory on this machine, with config.json"),
    "run": Kind("a pipeline's run", "pipeline.yaml", "give the run directory of a `flexpert pipeline`"),
    # The last, because models have one too.
    "tokenizer": Kind("a tokenizer", "tokenizer.json", "give a model, or another directory with tokenizer.json"),
}

#: What stages write into their output directories, which is easily given in place of these.
PARTS = ("model", "contribution", "tokenizer", "assembled")

#: Directories that a message proposes at most.
MOST_GUESSES = 3


def check_paths(stage: str, config: Any) -> None:
    """Raises `UserError` for an input directory that is missing or of another kind, an output that cannot be made."""
    optional = getattr(config, "optional", [])
    for key, (_, field) in leaves_of(stage).items():
        kind = field.metadata.get("path")
        for name, path in named_paths(key, functools.reduce(getattr, key.split("."), config)) if kind else []:
            if key == "optional":
                continue
            if path in optional and not os.path.lexists(path):
                print(f"note: {name}={path} does not exist and is left out", flush=True)
            elif kind == "output":
                check_output(name, Path(path))
            elif kind == "input" and (not os.path.exists(path) or os.path.isdir(path)):
                raise UserError(f"{name}={path} is not a file")
            elif kind in KINDS:
                check_path(name, Path(path), kind)


def check_output(key: str, path: Path) -> None:
    """Raises `UserError` where what is nearest to `path` and exists is no directory that takes files."""
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not os.path.isdir(nearest):
        raise UserError(f"{key}={path} cannot be written: {nearest} is not a directory")
    if not os.access(nearest, os.W_OK):
        is_read_only = os.statvfs(nearest).f_flag & os.ST_RDONLY
        why = f"the file system of {nearest} is read-only" if is_read_only else f"no permission to write into {nearest}"
        raise UserError(f"{key}={path} cannot be written: {why}")


def named_paths(key: str, value: str | list[str] | dict[str, str] | None) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [(f"{key}.{name}", path) for name, path in value.items()]
    return [(key, path) for path in ([value] if isinstance(value, str) else value or [])]


def check_path(key: str, path: Path, kind: str) -> None:
    noun, marker, remedy = KINDS[kind]
    if is_a(path, marker):
        return
    nearby = [*(path / part for part in PARTS), path.parent]
    nearby = [place for place in nearby if is_a(place, marker)] or below(path, marker)
    meant = " or ".join(map(str, nearby[:MOST_GUESSES]))
    found = "a file" if os.path.isfile(path) else next((k.noun for k in KINDS.values() if is_a(path, k.marker)), None)
    if kind == "run" and os.path.isdir(path) and not (meant or found):
        return  # there is a report on what an interrupted run left, whatever that is
    if not os.path.exists(path):
        fault = "does not exist"
    else:
        fault = f"is {found}, not {noun}" if found else f"is not {noun}, it has no {marker}"
    raise UserError(f"{key}={path} {fault}: {f'did you mean {meant}?' if meant else remedy}")


def below(path: Path, marker: str) -> list[Path]:
    return sorted(place.parent for place in path.glob(f"*/{marker}")) if os.path.isdir(path) else []


def is_a(path: Path, marker: str) -> bool:
    return os.path.isfile(path / marker)  # False, and no error, also for a path that is too long or not permitted
