"""The keys of a stage, as its dataclasses say; without Hydra, which takes longer to import than completion may take."""

import dataclasses
import functools
import types
import typing
from typing import Any

from flexpert.config.stages import STAGE_CONFIGS


def unwrap_optional(hint: Any) -> Any:
    """`X | None` to `X`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def field_hints(schema: type) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {field.name: unwrap_optional(hints[field.name]) for field in dataclasses.fields(schema)}


def all_keys(schema: type, prefix: str = "") -> list[tuple[str, Any, "dataclasses.Field[Any]"]]:
    """(dotted key, type, field) of every leaf of a schema, in order."""
    keys = []
    hints = field_hints(schema)
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            keys += all_keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            keys.append((prefix + field.name, hints[field.name], field))
    return keys


@functools.cache
def leaves_of(stage: str) -> dict[str, tuple[Any, "dataclasses.Field[Any]"]]:
    """(type, field) of every key of a stage by its dotted name."""
    return {key: (hint, field) for key, hint, field in all_keys(STAGE_CONFIGS[stage])}


def is_mapping(hint: Any) -> bool:
    return typing.get_origin(hint) is dict


def is_text(hint: Any) -> bool:
    return hint in (str, list[str]) or is_mapping(hint)
