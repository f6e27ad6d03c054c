"""Tab completion: `eval "$(flexpert completion bash)"`, or zsh, in the shell's start-up file.

The shell calls `flexpert complete SHELL LINE [BREAKS]` at each tab. The answer must come at once, so nothing here
imports Hydra or PyTorch.
"""

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterable

from flexpert.config.tree import EXPERIMENT, FLAG, group_options, groups_of, take_config_dir
from flexpert.errors import UserError

BASH = """
_flexpert() {{
    local reply
    COMPREPLY=()
    while IFS= read -r reply; do
        COMPREPLY+=("$reply")
    done < <({command} complete bash "${{COMP_LINE:0:COMP_POINT}}" "$COMP_WORDBREAKS" 2>/dev/null)
    # What goes on, KEY= or a directory, gets no blank.
    [[ ${{#COMPREPLY[@]}} = 1 && ${{COMPREPLY[0]}} = *[=/.] ]] && compopt -o nospace 2>/dev/null
    return 0
}}
complete -F _flexpert flexpert
"""
ZSH = """
_flexpert() {{
    local -a replies
    replies=(${{(f)"$({command} complete zsh "${{(j: :)words[1,CURRENT-1]}} $PREFIX" 2>/dev/null)"}})
    compadd -S '' -- ${{(M)replies:#*[=/.]}}
    compadd -- ${{replies:#*[=/.]}}
}}
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit -i }}
compdef _flexpert flexpert
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH}

#: What a directory is given for; other kinds of `path` are files, too.
DIRECTORIES = ("data", "contribution", "model", "run", "tokenizer", "output")
#: What bash would give a meaning to.
SPECIAL = re.compile(r"[^\w@%+=:,./~\[\]{}-]")
#: Before a path within a list or a mapping.
WITHIN = re.compile(r"[\[{,:]")


def script(arguments: list[str]) -> None:
    """`flexpert completion SHELL`: print what the shell is to evaluate.

    Raises:
        UserError: another shell.
    """
    if len(arguments) != 1 or arguments[0] not in SCRIPTS:
        raise UserError(f"completion needs a shell: flexpert completion {' or '.join(SCRIPTS)}")
    command = shlex.join([sys.executable, "-P", "-m", "flexpert"])
    print(SCRIPTS[arguments[0]].format(command=command).strip())


def complete(arguments: list[str], commands: Iterable[str]) -> None:
    """`flexpert complete SHELL LINE [BREAKS]`: print the completions of the last word of LINE, one a line.

    Args:
        arguments: BREAKS, for bash, are characters that its words end at: what is up to one of them is not repeated.
        commands: what can come first.
    """
    shell, line, *breaks = arguments
    words, quote = split(line)
    current = words[-1]
    is_bare = shell == "bash" and not quote  # zsh quotes what it is given
    kept = max((current.rfind(char) + 1 for char in "=:" if is_bare and char in "".join(breaks)), default=0)
    for found in candidates(words[1:], list(commands)) if words[1:] else ():
        if found.startswith(current):
            print(SPECIAL.sub(r"\\\g<0>", found[kept:]) if is_bare else found)


def split(line: str) -> tuple[list[str], str]:
    """The words of a line up to the cursor, the last one unfinished, and the quote that it is in; one empty word where
    a backslash ends the line.
    """
    end = "\0"  # with it, a blank at the end begins a word
    for quote in ("", "'", '"'):
        with contextlib.suppress(ValueError):  # no closing quotation
            words = shlex.split(line + end + quote)
            return [*words[:-1], words[-1].removesuffix(end)], quote
    return [""], ""


def candidates(words: list[str], commands: list[str]) -> list[str]:
    """What may stand in the place of the last of the words behind `flexpert`, whether it begins like that or not.

    Raises:
        UserError: `--config-dir` names no directory.
    """
    *before, current = words
    if current.startswith(f"{FLAG}=") or before[-1:] == [FLAG]:
        value = current.removeprefix(f"{FLAG}=")
        return [current.removesuffix(value) + path for path in paths(value, only_directories=True)]
    before = take_config_dir(before)
    if not before:
        return [*commands, "--help", "--version"]
    if before[0] == "completion":
        return list(SCRIPTS)
    if before[0] == "config":
        before = before[1:]
    # The stages are those with a schema; to import it takes a quarter of a second.
    from flexpert.config.stages import STAGE_CONFIGS

    if not before:
        return list(STAGE_CONFIGS)
    if before[0] not in STAGE_CONFIGS:
        return []
    return values(before[0], current) if "=" in current else keys(before[0], current)


def keys(stage: str, current: str) -> list[str]:
    """Keys and choices of a stage with their `=`, and flags."""
    from flexpert.config.schema import is_mapping, leaves_of

    plus = current[: len(current) - len(current.lstrip("+"))]
    named = [f"{plus}{name}=" for name in [*leaves_of(stage), *groups_of(stage), EXPERIMENT]]
    named += [f"{plus}{key}." for key, (hint, _) in leaves_of(stage).items() if is_mapping(hint)]
    return [*named, "--help", "--multirun", f"{FLAG}="]


def values(stage: str, current: str) -> list[str]:
    """What may stand behind KEY=."""
    from flexpert.config.presets import presets_of
    from flexpert.config.schema import is_mapping, leaves_of

    key, _, value = current.partition("=")
    name = key.lstrip("+")
    if name == EXPERIMENT:
        return [f"{key}={preset}" for preset in presets_of(stage)]
    leaf = next(
        (leaf for leaf, (hint, _) in leaves_of(stage).items() if is_mapping(hint) and name.startswith(f"{leaf}.")), name
    )
    if leaf not in leaves_of(stage):
        return [f"{key}={choice}" for choice in group_options(name)] if name in groups_of(stage) else []
    hint, field = leaves_of(stage)[leaf]
    if hint is bool:
        return [f"{key}=true", f"{key}=false"]
    kind = field.metadata.get("path")
    if kind is None:
        return []
    # A comma may be a part of a name where there is one path, the others are separated by it.
    begun = [found.end() for found in WITHIN.finditer(value)] if hint is not str and leaf == name else []
    begin = max(begun, default=0)
    return [f"{key}={value[:begin]}{path}" for path in paths(value[begin:], kind in DIRECTORIES)]


def paths(begun: str, only_directories: bool) -> list[str]:
    """Directories, with `/` at the end, and files that `begun` may become."""
    folder, slash, name = begun.rpartition("/")
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder + slash) or "."), key=lambda entry: entry.name)
    except OSError:  # there is none, or it may not be read
        return []
    shown = [entry for entry in entries if entry.name.startswith(".") <= name.startswith(".")]
    return [
        f"{folder}{slash}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in shown
        if entry.is_dir() or not only_directories
    ]
