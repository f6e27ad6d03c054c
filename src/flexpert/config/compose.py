"""From a command line to a locked config: compose with Hydra, set text past it, convert, check.

Hydra's override grammar gives a meaning to `=`, `(`, `[`, `,`, `~`, blanks and number-like text inside values, and
takes `model=DIR` for a choice in the group `model`. A path or a name must arrive as typed, so a value whose key the
schema knows to be text (`is_text`) never meets that grammar: it is set on the composed config. Numbers, booleans and
group choices go through Hydra. In text, `${KEY}` stands for the value of KEY, as in any Hydra config; in a prompt it
means nothing.
"""

import copy
import dataclasses
import difflib
import functools
import os
import re
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException, ValidationError

from flexpert.config.options import Lockable
from flexpert.config.presets import check_preset
from flexpert.config.schema import is_mapping, is_text, leaves_of
from flexpert.config.stages import STAGE_CONFIGS
from flexpert.config.tree import (
    EXPERIMENT,
    check_group_choice,
    check_no_stage,
    find,
    groups_of,
    own_directory,
)
from flexpert.errors import UserError

#: From this likeness on, a key is taken for a slip of another one.
ALIKE = 0.7
#: How Hydra is told of a preset: it may set keys anywhere, whatever its file says of that.
PRESET = f"+{EXPERIMENT}@_global_="
#: What Hydra says where the content of a file does not fit: the file, the kind of error, what it is, the key.
IN_FILE = re.compile(
    r"In '(?P<file>.+)': (?P<kind>\w+) raised while composing config:\n(?P<text>.*)\n\s+full_key: (?P<key>.*)"
)


class OwnDirectory(SearchPathPlugin):
    """Has Hydra look into the user's directory before `conf/`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        own = own_directory()
        if own is not None:
            search_path.prepend("flexpert", f"file://{own}", "main")


@contextmanager
def conf_tree(stage: str) -> Iterator[ConfigLoader]:
    """Hydra's composer, which knows the stage's schema, `conf/` and the user's directory while the block runs."""
    check_no_stage(stage)
    register_schema(stage)
    Plugins.instance().register(OwnDirectory)
    GlobalHydra.instance().clear()
    with initialize_config_module("flexpert.conf", version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@functools.cache
def register_schema(stage: str) -> None:
    """Make the stage's dataclass known to Hydra."""
    ConfigStore.instance().store(name=f"{stage}_schema", node=STAGE_CONFIGS[stage])


def split_items(text: str, opening: str = "[{(", closing: str = "]})") -> list[str]:
    """Split at commas that are outside quotes and brackets.

    A quote opens where an item or, after a colon, its value begins; elsewhere it is an apostrophe (`/home/o'brien`).
    """
    items, depth, quoted, item = [], 0, "", ""
    for char in text:
        if quoted:
            quoted = "" if char == quoted else quoted
        elif char in "'\"" and item.rstrip()[-1:] in ("", ":", "[", "{", ",", "="):
            quoted = char
        elif char in opening:
            depth += 1
        elif char in closing:
            depth -= 1
        if char == "," and depth == 0 and not quoted:
            items.append(item)
            item = ""
        else:
            item += char
    return [item.strip() for item in [*items, item] if item.strip()]


def unquote(text: str) -> str:
    """Take off quotes that the user put around a whole value, as Hydra's own grammar asks for in places."""
    is_quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" and text.count(text[0]) == 2
    return text[1:-1] if is_quoted else text


def list_items(key: str, text: str) -> list[str]:
    text = text.strip()
    if text.startswith("[") and not text.endswith("]"):
        raise UserError(f"{key}={text} is a list without its end: write [A,B,…], in quotes where it holds a blank")
    return split_items(text[1:-1] if text.startswith("[") else text)


def parse_text(key: str, text: str, hint: Any) -> Any:
    """The value of `key`, of type `hint`, `str`, `list[str]` or a mapping, exactly as typed; `null` is None."""
    if text == "null":
        return None
    if hint is str:
        return unquote(text)
    if is_mapping(hint):
        return parse_mapping(key, text, typing.get_args(hint)[1])
    return [unquote(item) for item in list_items(key, text)]


def parse_mapping(key: str, text: str, hint: Any) -> dict[str, Any]:
    """`{name:value,…}` where `hint` is the type of the values; the names are always text, also `2024_05`."""
    text = text.strip()
    if not (text.startswith("{") and text.endswith("}")):
        raise UserError(
            f"{key}={text} is not a mapping: write '{key}={{NAME:VALUE,…}}' with the quotes, without which the shell "
            f"splits it, or {key}.NAME=VALUE"
        )
    result = {}
    for item in split_items(text[1:-1]):
        quote = item[0] if item[0] in "'\"" else ""
        end = item.find(quote, 1) + 1 if quote else 0
        name, colon, value = item[end:].partition(":")
        name = item[:end] + name
        if not colon:
            raise UserError(f"'{item}' in {key}={text} has no value: write {{NAME:VALUE,…}}")
        result[unquote(name.strip())] = parse_text(key, value.strip(), hint if hint == list[str] else str)
    return result


def expand_home(content: Any) -> Any:
    """Paths with `~/`, which no shell expands behind `key=`."""
    if isinstance(content, dict):
        return {name: expand_home(path) for name, path in content.items()}
    if isinstance(content, list):
        return [expand_home(path) for path in content]
    return os.path.expanduser(content) if str(content).startswith("~/") else content


class TextOverride(NamedTuple):
    """An override that is set after Hydra has composed the rest.

    `merge` adds to a mapping; a `literal` (a prompt) is set last of all, so that `${` in it means nothing.
    """

    key: str
    value: Any
    merge: bool = False
    literal: bool = False


def whole_number(text: str) -> str:
    """`50e9` as the integer that it is; anything else as typed."""
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() and not text.lstrip("+-").isdecimal() else text


def parse_override(override: str, stage: str) -> str | TextOverride:
    """One override as typed: for Hydra, or to be set past it.

    Raises:
        UserError: not of the form `key=value`, or no such key; the message names the nearest one.
    """
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"'{override}' is not an override: write key=value (see `flexpert {stage} --help`)")
    name = key.lstrip("+")
    leaves = leaves_of(stage)
    if name in leaves:
        hint, field = leaves[name]
        if field.metadata.get("literal"):
            return TextOverride(name, value, literal=True)
        if is_text(hint):
            content = parse_text(name, value, hint)
            return TextOverride(name, expand_home(content) if "path" in field.metadata else content)
        return f"{name}={whole_number(value) if hint is int else value}"
    for parent, (hint, field) in leaves.items():
        if is_mapping(hint) and name.startswith(f"{parent}."):
            item, item_hint = name.removeprefix(f"{parent}."), typing.get_args(hint)[1]
            content = parse_text(name, value, item_hint if item_hint == list[str] else str)
            content = expand_home(content) if "path" in field.metadata else content
            return TextOverride(parent, {item: content}, merge=True)
    if name in groups_of(stage):
        check_group_choice(override)
        return override
    if name == EXPERIMENT:
        check_preset(stage, value)
        return f"{PRESET}{value}"
    raise UserError(
        f"unknown key '{name}' for stage {stage}{suggestion(name, stage)} (all keys: `flexpert {stage} --help`)"
    )


def suggestion(name: str, stage: str) -> str:
    """The key that was probably meant, or the stages that have this one."""

    def likeness(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one, other).ratio()

    # A group's name makes all of its keys alike: what counts is the part after the last dot.
    last = name.rpartition(".")[2]
    alike = [leaf for leaf in leaves_of(stage) if likeness(last, leaf.rpartition(".")[2]) >= ALIKE]
    if alike:
        return f"; did you mean {max(alike, key=lambda leaf: likeness(name, leaf))}?"
    others = [other for other in STAGE_CONFIGS if name in leaves_of(other)]
    return f"; it is a key of {', '.join(others)}" if others else ""


def as_typed(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{as_typed(item)}' for name, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(as_typed, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def expected(key: str, stage: str) -> str:
    """What a key takes, in words; `key` may be that of an item: `optim.betas[0]`, `pipeline.gates.NAME`."""
    leaves = leaves_of(stage)
    if key in leaves:
        hint, field = leaves[key]
        return words_for(hint) + (" or null" if type(None) in typing.get_args(field.type) else "")
    whole = next(leaf for leaf in leaves if key.startswith((f"{leaf}.", f"{leaf}[")))
    return words_for(typing.get_args(leaves[whole][0])[-1])


def words_for(hint: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(hint) or ("{NAME:VALUE,…}" if is_mapping(hint) else "[A,B,…]")


def one_line(error: Exception, stage: str) -> str:
    """What a Hydra or OmegaConf error says, with the full key where it has one; a wrong value in our own words."""
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read: write a number, true, false or null, and several as [A,B]"
    if (found := IN_FILE.match(str(error))) is not None:
        text = found["text"]
        if found["kind"] == "ConfigKeyError":
            text = f"unknown key '{found['key']}'{suggestion(found['key'], stage)}"
        elif found["key"]:
            text = f"{found['key']}: {text}"
        return f"{find(found['file'])[1]}: {text}"
    if isinstance(error, HydraException) and isinstance(error.__cause__, Exception):
        return one_line(error.__cause__, stage)
    key = error.full_key if isinstance(error, OmegaConfBaseException) else None
    if key and isinstance(error, ValidationError) and not isinstance(error, InterpolationResolutionError):
        return f"{key}={as_typed(error.value)}: expected {expected(key, stage)}"
    line = next(line.strip() for line in str(error).splitlines() if line.strip())
    return f"{key}: {line}" if key else line


def missing_keys(content: Any, prefix: str = "") -> list[str]:
    """Dotted keys of the mandatory values that are not given, in order."""
    if isinstance(content, dict):
        return [key for name, value in content.items() for key in missing_keys(value, f"{prefix}{name}.")]
    return [prefix.removesuffix(".")] if content == "???" else []


def lock_all(config: Any) -> list[str]:
    """Lock nested groups first, and check each one once its parts are; returns what is wrong, one line a group."""
    mistakes = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Lockable):
            mistakes += lock_all(value)
    config.lock()
    try:
        config.check()
    except UserError as error:
        mistakes.append(str(error))
    return mistakes


def understand(stage: str, overrides: list[str]) -> tuple[list[str], list[TextOverride]]:
    """What is for Hydra, and what is set past it, in order; of several presets, as of several values, the last one.

    Raises:
        UserError: an override that does not parse, an unknown key or choice, several values.
    """
    parsed = [parse_override(override, stage) for override in overrides]
    for_hydra = [override for override in parsed if isinstance(override, str)]
    presets = [override for override in for_hydra if override.startswith(PRESET)]
    for_hydra = [override for override in for_hydra if override not in presets] + presets[-1:]
    for understood in OverridesParser.create().parse_overrides(for_hydra):
        if understood.is_sweep_override():
            raise UserError(
                one_line(OverrideParseException(str(understood.input_line), "it stands for several runs"), stage)
            )
    return for_hydra, [override for override in parsed if isinstance(override, TextOverride)]


def compose_node(
    stage: str, for_hydra: list[str], texts: list[TextOverride], composed: dict[tuple[str, ...], Any] | None = None
) -> Any:
    """The stage's configuration with `${KEY}` as it stands there, and without literals.

    Args:
        composed: as in `compose`.
    """
    composed = {} if composed is None else composed
    if (stage, *for_hydra) not in composed:
        with conf_tree(stage):
            composed[stage, *for_hydra] = hydra_compose(config_name=stage, overrides=for_hydra)
    node = copy.deepcopy(composed[stage, *for_hydra])
    for key, value, merge, _ in (override for override in texts if not override.literal):
        before = (OmegaConf.select(node, key) or {}) if merge else {}  # a mapping that must be given is None
        with open_dict(node):
            OmegaConf.update(node, key, {**before, **value} if merge else value, merge=False)
    return node


def compose(stage: str, overrides: list[str], composed: dict[tuple[str, ...], Any] | None = None) -> tuple[Any, str]:
    """Compose, check and lock the config of a stage.

    Args:
        composed: what Hydra has made of stages and of overrides that it was given, for callers with many that differ in
            text alone, which it is not asked about again; added to.

    Returns:
        The stage's dataclass, read-only, and the resolved config as YAML.

    Raises:
        UserError: unknown key or group option, wrong type, a mandatory key not given, values that cannot work together.
    """
    OmegaConf.clear_resolver("oc.env")  # nothing from the environment can enter a config
    try:
        for_hydra, texts = understand(stage, overrides)
        node = compose_node(stage, for_hydra, texts, composed)
        missing = missing_keys(OmegaConf.to_container(node))
        if missing:
            raise UserError(f"{stage} needs {', '.join(f'{key}=…' for key in missing)}")
        config = OmegaConf.to_object(node)
        text = OmegaConf.to_yaml(node, resolve=True)
    except (InterpolationResolutionError, GrammarParseError) as error:
        raise UserError(
            f"{one_line(error, stage)} (${{KEY}} stands for the value of KEY; \\${{ is the text itself)"
        ) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error, stage)) from None
    except yaml.YAMLError as error:  # of a file, which it names
        raise UserError(f"cannot be read as YAML: {error}") from None
    for override in (override for override in texts if override.literal):
        setattr(config, override.key, override.value)
    if mistakes := lock_all(config):
        raise UserError("; also: ".join(mistakes))
    return config, text
