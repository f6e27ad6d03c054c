"""`flexpert config STAGE key=value …`: what the stage would run with, and where each value comes from.

The YAML is that of resolved.yaml, with a comment behind each value; a literal, which is not kept there, is put in.
"""

from typing import Any

import yaml
from hydra.types import RunMode
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from flexpert.config.compose import PRESET, compose, conf_tree, understand
from flexpert.config.stages import STAGE_CONFIGS
from flexpert.config.tree import find, groups_of, load
from flexpert.errors import UserError

TYPED = "command line"
DEFAULT = "default"


def show(arguments: list[str]) -> None:
    """Print the configuration of `STAGE key=value …`.

    Raises:
        UserError: no stage, or what is wrong with its configuration.
    """
    if arguments[:1] and arguments[0] in ("-h", "--help"):
        print("usage: flexpert config STAGE [key=value …]      what it would run with, and where each value comes from")
        return
    if not arguments or arguments[0] not in STAGE_CONFIGS:
        named = f", and there is none called '{arguments[0]}'" if arguments else ""
        raise UserError(
            f"config needs a stage{named}: flexpert config STAGE [key=value …] of one of {', '.join(STAGE_CONFIGS)}"
        )
    print(annotated(arguments[0], arguments[1:]), end="")


def annotated(stage: str, overrides: list[str]) -> str:
    """The resolved config as YAML, the origin of each value as a comment behind it.

    Raises:
        UserError: as `compose`.
    """
    _, text = compose(stage, overrides)
    origins = origins_of(stage, overrides)
    literals = {override.key: override.value for override in understand(stage, overrides)[1] if override.literal}
    pieces, end = [], len(text)
    for key, start, stop in reversed(spans(yaml.compose(text, Loader=yaml.SafeLoader), text)):
        line_end = text.index("\n", stop)
        value = as_yaml(literals[key]) if key in literals else text[start:stop]
        pieces += [text[line_end:end], f"  # {origins.find(key)}", text[stop:line_end], value]
        end = start
    return text[:end] + "".join(reversed(pieces))


def as_yaml(text: str) -> str:
    """Any text in double quotes, on one line."""
    return str(yaml.safe_dump(text, default_style='"', width=float("inf"))).strip()


def spans(node: Node | None, text: str, prefix: str = "") -> list[tuple[str, int, int]]:
    """(dotted key, start, end) of each value that gets a comment; of a list over several lines it is the empty span
    behind its key.
    """
    assert isinstance(node, MappingNode)
    found = []
    for name, value in node.value:
        key = f"{prefix}{name.value}"
        if isinstance(value, MappingNode) and value.value:
            found += spans(value, text, f"{key}.")
        elif isinstance(value, SequenceNode) and value.value:
            after = text.index("\n", name.end_mark.index)
            found.append((key, after, after))
        else:
            assert isinstance(value, (ScalarNode, SequenceNode, MappingNode))
            found.append((key, value.start_mark.index, value.end_mark.index))
    return found


class Origins:
    """Dotted key → what has set it last."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def set(self, key: str, value: Any, name: str) -> None:
        """Note that `value` was merged into `key`."""
        if isinstance(value, dict) and value:
            for item, content in value.items():
                self.set(f"{key}.{item}".lstrip("."), content, name)
        else:
            self.replace(key, name)

    def replace(self, key: str, name: str) -> None:
        """Note that `key` was set with all that is in it."""
        self.names = {known: old for known, old in self.names.items() if not known.startswith(f"{key}.")}
        self.names[key] = name

    def find(self, key: str) -> str:
        """What has set the key, or the mapping that it is in."""
        while key not in self.names and "." in key:
            key = key.rpartition(".")[0]
        return " ".join(self.names.get(key, DEFAULT).split())


def origins_of(stage: str, overrides: list[str]) -> Origins:
    """Where the keys come from that have not the schema's defaults: files in Hydra's order, then what was typed."""
    for_hydra, texts = understand(stage, overrides)
    origins = Origins()
    with conf_tree(stage) as tree:
        files = tree.compute_defaults_list(stage, for_hydra, RunMode.RUN).defaults
    for file in files:
        if file.config_path is None or file.config_path.startswith("hydra/") or file.config_path == f"{stage}_schema":
            continue
        content = load(file.config_path)
        content.pop("defaults", None)
        origins.set(file.package, content, find(file.config_path)[1])
    for override in for_hydra:
        key = override.lstrip("+").partition("=")[0]
        if key not in groups_of(stage) and not override.startswith(PRESET):
            origins.replace(key, TYPED)
    for text in texts:
        if text.merge:
            origins.set(text.key, text.value, TYPED)
        else:
            origins.replace(text.key, TYPED)
    return origins
