"""What goes wrong in a way that the user can mend."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake whose message says how to mend it; the command line prints it without a traceback."""


class StorageError(UserError, OSError):
    """The disk is full or cannot be written; what was saved before is kept."""


class NonFiniteLossError(UserError, FloatingPointError):
    """The loss became infinite or not a number."""


def unknown_name(parameter: str, value: str, valid: Iterable[str]) -> UserError:
    """Returns the error for a name that is not one of `valid`, with the nearest ones first."""
    valid = sorted(valid)
    near = difflib.get_close_matches(value.lower(), valid, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Valid names: {', '.join(valid[:20])}."
    return UserError(f"`{parameter}` must be a known name, got {value!r}. {hint}")
