"""What a schema is made of: options with a default and a help text, checks of their values, locking."""

import math
import re
from dataclasses import FrozenInstanceError, field
from typing import Any

from flexpert.errors import UserError

#: Ids become file names, so they are short enough for every file system.
EXPERT_ID = re.compile(r"[a-z][a-z0-9-]{0,63}")

_LICENSE = r"[A-Za-z0-9.+-]+( WITH [A-Za-z0-9.+-]+)?"
#: An SPDX expression without parentheses.
SPDX_EXPRESSION = rf"{_LICENSE}( (AND|OR) {_LICENSE})*"


def opt(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with a default and a help text; lists and dicts get a fresh copy each."""
    metadata["help"] = help
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{key}={value} is not one of {', '.join(choices)}")


def check_positive(group: str, config: Any, *names: str) -> None:
    """Numbers of `config`, which is the group `group` of its stage ("": the stage itself), are positive or null."""
    for name in names:
        value = getattr(config, name)
        key = f"{group}.{name}".removeprefix(".")
        require(value is None or 0 < value < math.inf, f"{key}={value} must be positive")


def check_not_negative(group: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        key = f"{group}.{name}".removeprefix(".")
        require(value is None or 0 <= value < math.inf, f"{key}={value} must not be negative or infinite")


def check_seed(seed: int) -> None:
    require(0 <= seed < 2**32, f"seed={seed} must be in [0, 2^32)")


def check_license(key: str, value: str | None) -> None:
    """The syntax of SPDX expressions; whether an id is on SPDX's list, which grows, is not looked at."""
    if value is None:
        return
    before, expression = "", value
    while expression != before:  # from the inside out, what is in parentheses becomes one id
        before, expression = expression, re.sub(rf"\( ?{SPDX_EXPRESSION} ?\)", "id", expression)
    require(
        re.fullmatch(SPDX_EXPRESSION, expression) is not None,
        f"{key}={value} is not an SPDX expression, such as MIT or 'Apache-2.0 OR CC-BY-4.0': give one, or "
        "LicenseRef-NAME for terms of your own",
    )


class Lockable:
    """Assignment raises once `lock` was called: stages share one config and none may bend it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_locked"):
            raise FrozenInstanceError(f"the config is read-only: cannot set {name}")
        object.__setattr__(self, name, value)

    def lock(self) -> None:
        object.__setattr__(self, "_locked", True)

    def check(self) -> None:
        """Raise `UserError` for values that cannot work together."""

    def notes(self) -> list[str]:
        """What the user should know before the stage starts, and is no mistake; one line each."""
        return []
