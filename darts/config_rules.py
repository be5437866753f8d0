"""The error that a bad setting gets, and the rules that the blocks of `darts:` share.

Contract: pure. Each function checks one value and raises a `ConfigError` that names the key, the value, the rule and
the fix.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work. The message names the key, the value, the rule and the fix."""

    def __init__(self, key: str, value: object, rule: str, fix: str) -> None:
        super().__init__(f"{key}={value!r}: {rule} Fix: {fix}")
        self.key = key
        self._given = key, value, rule, fix

    def __reduce__(self) -> Any:
        """Ray carries it from the trainer's process to the user's."""
        return type(self), self._given


def check_flag(key: str, value: object, default: bool) -> bool:
    """True or false, or the default for None."""
    flag = or_default(value, default)
    require(key, flag, isinstance(flag, bool), "must be true or false.", f"set {key}={str(default).lower()}.")
    return flag


def check_seconds(key: str, value: object, default: float, *, positive: bool) -> float:
    """A finite number of seconds, or the default for None."""
    seconds = or_default(value, default)
    require(
        key,
        seconds,
        is_number(seconds) and (seconds > 0 if positive else seconds >= 0),
        f"must be a finite number of seconds {'above 0' if positive else 'of at least 0'}.",
        f"set {key}={default:g}.",
    )
    return float(seconds)


def refuse_unknown(prefix: str, block: Mapping[str, Any], known: list[str]) -> None:
    """Refuses a key that a block does not know, with the nearest one that it does."""
    for key in block:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            fix = f"did you mean {prefix}.{near[0]}?" if near else "remove it."
            raise ConfigError(f"{prefix}.{key}", block[key], f"unknown key; known are {', '.join(known)}.", fix)


def check_choice(key: str, value: object, default: str, choices: tuple[str, ...]) -> str:
    """One of the choices, or the default for None."""
    # YAML reads a bare `off` as false.
    choice = "off" if value is False and "off" in choices else or_default(value, default)
    require(key, choice, choice in choices, f"must be one of {', '.join(choices)}.", f"set {key}={default}.")
    return choice


def require(key: str, value: object, holds: bool, rule: str, fix: str) -> None:
    """Raises the error unless the rule holds."""
    if not holds:
        raise ConfigError(key, value, rule, fix)


def or_default(value: Any, default: Any) -> Any:
    """The value, or the default for None."""
    return default if value is None else value


def is_int(value: object) -> bool:
    """Whether this is an integer, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether this is a finite number, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
