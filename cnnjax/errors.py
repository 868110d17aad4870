"""Errors that the user can fix."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error whose message says how to fix it. The command line prints it without a traceback."""

    # Not a ValueError: tyro would catch it, and print it as an error of parsing.


class StorageError(UserError, OSError):
    """The disk is full or cannot be written. Files saved before are kept."""


class NonFiniteLossError(UserError, FloatingPointError):
    """The loss or a parameter became infinite or NaN."""


def unknown_name(parameter: str, value: str, valid: Iterable[str]) -> UserError:
    """Returns the error for a `value` that is not in `valid`. It suggests the nearest names."""
    valid = sorted(valid)
    near = difflib.get_close_matches(value.lower(), valid, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Valid names: {', '.join(valid[:20])}."
    return UserError(f"`{parameter}` must be a known name, got {value!r}. {hint}")


def check(parameter: str, rule: str, valid: bool, value: object) -> None:
    """Raises a `UserError` unless `valid`: `parameter` must be `rule`, got `value`."""
    if not valid:
        raise UserError(f"`{parameter}` must be {rule}, got {value}.")


def check_name(parameter: str, value: str, valid: Iterable[str]) -> None:
    """Raises a `UserError` unless `value` is one of `valid`."""
    if value not in (valid := tuple(valid)):
        raise unknown_name(parameter, value, valid)
