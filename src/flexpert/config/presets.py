"""Presets: `experiment=NAME` sets keys anywhere in a stage's configuration, as conf/experiment/NAME.yaml has them."""

from typing import Any

from flexpert.config.schema import leaves_of
from flexpert.config.stages import STAGE_CONFIGS
from flexpert.config.tree import EXPERIMENT, check_group_choice, find, group_options, groups_of, load
from flexpert.errors import UserError


def unknown_keys(stage: str, content: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys of `content` that the stage does not have, each as short as it says that."""
    leaves, unknown = leaves_of(stage), []
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and any(leaf.startswith(f"{key}.") for leaf in leaves):
            unknown += unknown_keys(stage, value, f"{key}.")
        elif key not in leaves:
            unknown.append(key)
    return unknown


def foreign_to(stage: str, name: str, within: tuple[str, ...] = ()) -> list[str]:
    """Keys and groups that a preset sets and the stage does not have; those of presets that it names count as its own.

    Args:
        within: presets that name this one.

    Raises:
        UserError: the file cannot be read, chooses what is not there, or names itself.
    """
    if name in within:
        raise UserError(f"{label(name)} names itself in its defaults")
    content = load(f"{EXPERIMENT}/{name}")
    foreign = []
    for entry in content.pop("defaults", None) or []:
        for group, choice in entry.items() if isinstance(entry, dict) else ():
            group = str(group).removeprefix("override ").lstrip("/").partition("@")[0]
            if group not in groups_of(stage):
                foreign.append(group)
            elif choice is not None:
                check_group_choice(f"{group}={choice}")
        if isinstance(entry, str) and entry != "_self_":
            check_group_choice(f"{EXPERIMENT}={entry}")
            foreign += foreign_to(stage, entry, (*within, name))
    return foreign + unknown_keys(stage, content)


def presets_of(stage: str) -> list[str]:
    """The presets that a stage can take."""
    return [name for name in group_options(EXPERIMENT) if not foreign_to(stage, name)]


def check_preset(stage: str, name: str) -> None:
    """Raises `UserError` where there is no such preset, or it sets what the stage does not have."""
    check_group_choice(f"{EXPERIMENT}={name}")
    if foreign := foreign_to(stage, name):
        fitting = [other for other in STAGE_CONFIGS if not foreign_to(other, name)]
        remedy = f"it is for {', '.join(fitting)}" if fitting else f"no stage has it: correct {label(name)}"
        raise UserError(f"{EXPERIMENT}={name} sets {foreign[0]}, which {stage} does not have; {remedy}")


def label(name: str) -> str:
    return find(f"{EXPERIMENT}/{name}")[1]
