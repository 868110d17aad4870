"""Wraps standard output and error so that a closed, full or incomplete stream cannot make a run fail."""

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any


class OutputError(OSError):
    """Standard output cannot be written."""


class Output:
    """A stream for text. It escapes the characters that its encoding lacks, and is silent after its first error.

    Args:
      stream: None, closed, or an object that has perhaps no method but `write`.
      on_error: receives the first error.

    Attributes:
      encoding: the stream's, or UTF-8.
    """

    def __init__(self, stream: Any, on_error: Callable[[Exception], None] = lambda error: None):
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self._stream = self._original = stream
        self._on_error = on_error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._original, name)

    def write(self, text: str) -> int:
        """Writes `text`; returns its length."""
        self._try("write", text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes each of `lines`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Writes what the stream has buffered."""
        self._try("flush")

    def isatty(self) -> bool:
        """Returns whether the stream is a terminal."""
        return bool(self._try("isatty"))

    def _try(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._stream, method, lambda *_: None)(*arguments)
        except (OSError, ValueError) as error:  # ValueError: it is closed.
            self._stream = None
            self._on_error(error)
            return None


def reason(error: Exception) -> str:
    """Returns the system's words for an error, or else its message."""
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Makes standard output and standard error of the process `Output`s inside the context.

    The first error of standard output raises `OutputError`; after it, output is dropped. An error of standard error is
    ignored. Descriptors that are closed become /dev/null, so that no file that is opened later takes their place.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    streams = sys.stdout, sys.stderr

    def drop(stream: Any) -> None:  # Otherwise Python tries again to write what is buffered, at its exit.
        with suppress(OSError, ValueError, AttributeError):
            descriptor = stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)

    def fail(error: Exception) -> None:
        drop(streams[0])
        raise OutputError(getattr(error, "errno", None), reason(error)) from error

    out, err = Output(streams[0], fail), Output(streams[1], lambda error: drop(streams[1]))
    with redirect_stdout(out), redirect_stderr(err):  # type: ignore
        yield


def quote(text: str, encoding: str | None) -> str:
    r"""Quotes `text` for a shell: if `encoding` cannot show it, as $'\xff', which bash and zsh understand."""
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        escaped = os.fsencode(text.replace("\\", r"\\").replace("'", r"\'"))
        return "$'" + "".join(chr(byte) if 32 <= byte < 127 else rf"\x{byte:02x}" for byte in escaped) + "'"
    return shlex.quote(text)
