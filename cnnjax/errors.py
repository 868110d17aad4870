"""Errors that the user can fix."""

import difflib
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

_LIBRARIES = Path(__file__).parent, Path(sysconfig.get_path("stdlib"))


class UserError(Exception):
    """An error whose message says how to fix it. The command line prints it without a traceback."""

    # Not a ValueError: tyro would catch it, and print it as an error of parsing.


class ArgumentError(UserError, ValueError):
    """An argument, or the result of a network or a loss, breaks a rule."""


class MissingProcessError(UserError):
    """Not all processes of a run have started in time; they may be started again."""


class StorageError(UserError, OSError):
    """The disk is full or cannot be written. Files saved before are kept."""


class NonFiniteLossError(UserError, FloatingPointError):
    """The loss or a parameter became infinite or NaN."""


def unknown_name(parameter: str, value: str, valid: Iterable[str]) -> UserError:
    """Returns the error for a `value` that is not in `valid`. It suggests the nearest names."""
    return UserError(f"`{parameter}` must be a known name, got {value!r}. {suggest(value, valid, 'Valid names')}")


def suggest(value: str, valid: Iterable[str], what: str) -> str:
    """Returns a sentence with the names in `valid` that are near `value`, or with all, called `what`."""
    valid = sorted(valid)
    near = difflib.get_close_matches(value.lower(), valid, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else f"{what}: {', '.join(valid[:20])}."


def check(parameter: str, rule: str, valid: bool, value: object) -> None:
    """Raises a `UserError` unless `valid`: `parameter` must be `rule`, got `value`."""
    if not valid:
        raise UserError(f"`{parameter}` must be {rule}, got {value}.")


def check_name(parameter: str, value: str, valid: Iterable[str]) -> None:
    """Raises a `UserError` unless `value` is one of `valid`."""
    if value not in (valid := tuple(valid)):
        raise unknown_name(parameter, value, valid)


def describe_shapes(tree: Any) -> str:
    """Returns the dtypes and shapes of a pytree of arrays in words, for messages: int32[8, 1]."""
    if hasattr(tree, "dtype"):
        return f"{tree.dtype}{list(tree.shape)}"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{name!r}: {describe_shapes(part)}" for name, part in tree.items()) + "}"
    if isinstance(tree, (tuple, list)):
        return f"({', '.join(map(describe_shapes, tree))})"
    return repr(tree)


# --- What messages call an option -----------------------------------------------------------------------------------

_IN_SHELL = ContextVar("in_shell", default=False)


@contextmanager
def messages_for_shell() -> Iterator[None]:
    """Makes messages name options of the command line, instead of arguments in Python, inside the context."""
    token = _IN_SHELL.set(True)
    try:
        yield
    finally:
        _IN_SHELL.reset(token)


def for_reader(shell: str, python: str) -> str:
    """Returns `shell` inside `messages_for_shell`, else `python`."""
    return shell if _IN_SHELL.get() else python


def option(name: str, value: str = "") -> str:
    """Returns an option as the reader sets it: --run-dir DIR or run_dir=DIR; without a value, --resume or resume=True.

    Call it when an error is raised: the reader is not known before.
    """
    return for_reader(f"--{name.replace('_', '-')} {value}".rstrip(), f"{name}={value or True}")


# --- Exceptions in the user's own code ------------------------------------------------------------------------------


def _is_library(file: str) -> bool:
    path = Path(file)
    installed = {"site-packages", "dist-packages"} & {*path.parts}
    return file.startswith("<") or bool(installed) or any(path.is_relative_to(folder) for folder in _LIBRARIES)


def describe(error: BaseException, place: str = "") -> str:
    """Returns "FILE, line N: ERROR." with the innermost line of the user's own code that the error passed.

    Args:
      error: an exception that was caught.
      place: takes the place of file and line if there is no such line.
    """
    lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    try:
        text = " ".join(str(error).split())
    except Exception:  # The user's `__str__` failed: the type and the line remain.
        text = ""
    if isinstance(error, SyntaxError) and error.filename:
        lines, text = [*lines, (error.filename, error.lineno)], error.msg
    if not isinstance(error, UserError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = text if len(text) <= 1000 else f"{text[:997]}..."
    for file, line in lines:
        if not _is_library(file):
            path, here = Path(file), Path.cwd()
            place = f"{path.relative_to(here) if path.is_relative_to(here) else path}, line {line}"
    return (f"{place}: " if place else "") + text + ("" if text.endswith((".", "?", "!")) else ".")


@contextmanager
def user_code(part: str) -> Iterator[None]:
    """Turns an exception in the user's code into a `UserError`, and keeps it as the cause.

    Args:
      part: names the code, at the beginning of the message.

    Raises:
      UserError: the block raised an exception. A `UserError` is unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{part} failed at {describe(error)}") from error
