"""The files of `conf/`, and those of a directory of the user's own with the same folders.

`--config-dir=DIR` makes DIR/launcher/mysite.yaml a choice of the group `launcher`. DIR is looked into first: a file of
the same name as one of `conf/` takes its place. The command line hands DIR on in the environment, which the processes
of a pipeline and Slurm's jobs inherit; it is part of no configuration.
"""

import importlib
import os
from pathlib import Path
from typing import Any

from flexpert.errors import UserError

#: Environment variable with the directory, absolute.
CONFIG_DIR = "FLEXPERT_CONFIG_DIR"
FLAG = "--config-dir"
#: The folder of presets, which any stage can take whose keys they set.
EXPERIMENT = "experiment"


def take_config_dir(arguments: list[str]) -> list[str]:
    """Take `--config-dir=DIR`, or `--config-dir DIR`, out of a command line and into the environment.

    Raises:
        UserError: no directory behind it.
    """
    rest, words = [], iter(arguments)
    for word in words:
        flag, equals, directory = word.partition("=")
        if flag != FLAG:
            rest.append(word)
            continue
        directory = directory if equals else next(words, "")
        if not directory:
            raise UserError(f"{FLAG} needs a directory: {FLAG}=DIR")
        os.environ[CONFIG_DIR] = os.path.abspath(os.path.expanduser(directory))
    return rest


def conf_directory() -> Path:
    """`conf/` as installed: a package of its own, so that it is found from a wheel and from a checkout."""
    return Path(importlib.import_module("flexpert.conf").__path__[0])


def own_directory() -> Path | None:
    """The user's own.

    Raises:
        UserError: it is no directory.
    """
    own = os.environ.get(CONFIG_DIR)
    if not own:
        return None
    if not os.path.isdir(own):
        raise UserError(f"{FLAG}={own} ({CONFIG_DIR}) is not a directory: give one with folders like those of conf/")
    return Path(own)


def check_no_stage(stage: str) -> None:
    """Raises `UserError` where the user's directory has a file in the place of a stage's own defaults."""
    own = own_directory()
    if own is not None and (own / f"{stage}.yaml").exists():
        raise UserError(
            f"{own / stage}.yaml: the defaults of {stage} are not replaced; name them experiment/NAME.yaml and say "
            "experiment=NAME"
        )


def find(name: str) -> tuple[Path, str]:
    """A file of the tree by its path in it, and how it is called in messages: from `conf/` on, or whole.

    Args:
        name: with `/` and without `.yaml`: `optim/adamw`.
    """
    own = own_directory()
    if own is not None and (path := own / f"{name}.yaml").is_file():
        return path, str(path)
    return conf_directory() / f"{name}.yaml", f"conf/{name}.yaml"


def load(name: str) -> dict[str, Any]:
    """The content of a file of the tree, for its keys; values are read by OmegaConf, when Hydra composes.

    Raises:
        UserError: not YAML, or no mapping.
    """
    import yaml  # here, because `flexpert --help` does without

    path, label = find(name)
    try:
        content = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise UserError(f"{label} cannot be read as YAML: {error}") from None
    if not isinstance(content, dict | None):
        raise UserError(f"{label} holds a {type(content).__name__} where keys and values are expected")
    return content or {}


def group_options(group: str) -> list[str]:
    """The choices of a group, by name."""
    directories = [directory for directory in (conf_directory(), own_directory()) if directory is not None]
    return sorted({path.stem for directory in directories for path in (directory / group).glob("*.yaml")})


def groups_of(stage: str) -> list[str]:
    """The groups that a stage's defaults list chooses from."""
    entries = load(stage)["defaults"]
    return [str(name) for entry in entries if isinstance(entry, dict) for name in entry]


def check_group_choice(override: str) -> None:
    """Raises `UserError` where GROUP=NAME names no file of the group."""
    group, _, name = override.lstrip("+").partition("=")
    if name not in group_options(group):
        raise UserError(
            f"there is no {group}={name}: choose one of {', '.join(group_options(group))}; or {FLAG}=DIR with a file "
            f"{group}/{name}.yaml of your own"
        )
