"""One line about an exception in the user's own code: what failed, in which file and line, and how."""

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cnnjax.errors import UserError

_LIBRARIES = Path(__file__).parent, Path(sysconfig.get_path("stdlib"))


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
    except Exception:
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
