"""Runs git without changing the repository."""

import os
import signal
import subprocess
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Git:
    """Runs git in a folder.

    Attributes:
      folder: the root of a working tree.
      environment: the variables of the process.
      deadline: by `time.monotonic`.
    """

    folder: bytes
    environment: Mapping[str, str]
    deadline: float

    def __call__(self, *arguments: str, stdin: bytes = b"", expected: Collection[int] = (0,)) -> bytes:
        """Returns the output of a command.

        Raises:
          OSError: git cannot be started, fails, or does not end before the deadline.
        """
        with subprocess.Popen(
            ["git", "-c", "core.fsmonitor=", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
        ) as process:
            try:
                output, errors = process.communicate(stdin, max(0.0, self.deadline - time.monotonic()))
            except BaseException as error:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # Its children, too: they hold the pipes.
                if isinstance(error, subprocess.TimeoutExpired):
                    raise TimeoutError("git took too long") from None
                raise
        if process.returncode not in expected:
            lines = errors.strip().splitlines() or [f"exit status {process.returncode}".encode()]
            raise OSError(f"git {arguments[0]}: {show(lines[0])}")
        return output

    def path(self, *arguments: str) -> bytes:
        """Returns an absolute path; see `git rev-parse`."""
        return self("rev-parse", "--path-format=absolute", *arguments).removesuffix(b"\n")


def user_git(folder: Path, deadline: float) -> Git:
    """Returns git in the repository that contains `folder`, with the user's configuration.

    Raises:
      OSError: git refuses the repository.
    """
    # No variable may redirect it to another repository.
    kept = {name: x for name, x in os.environ.items() if not name.startswith("GIT_") or name.startswith("GIT_CONFIG")}
    git = Git(os.fsencode(folder), kept | {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}, deadline)
    return replace(git, folder=git.path("--show-toplevel"))


def plain_git(git: Git, folder: Path) -> Git:
    """Creates a repository without configuration or commits that shares another's objects and working tree.

    Args:
      git: runs in the other repository.
      folder: an empty directory for the new repository.

    Returns:
      git in the new repository. Commands that write objects would write them to the other repository.
    """
    hash_name = git("rev-parse", "--show-object-format").strip().decode()
    has_modes = git("config", "--type=bool", "--default=true", "core.fileMode").strip().decode()  # Not every disk has.
    (folder / "refs").mkdir()
    (folder / "HEAD").write_text("ref: refs/heads/none\n")
    (folder / "config").write_text(
        f"[core]\nrepositoryFormatVersion = 1\nfileMode = {has_modes}\n[extensions]\nobjectFormat = {hash_name}\n"
    )
    home = str(folder)  # Without configuration, too.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    plain = {
        "GIT_DIR": str(folder),
        "GIT_WORK_TREE": os.fsdecode(git.folder),
        "GIT_OBJECT_DIRECTORY": os.fsdecode(git.path("--git-path", "objects")),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_ATTR_NOSYSTEM": "1",
        "HOME": home,
        "XDG_CONFIG_HOME": home,
        "LC_ALL": "C",
    }
    return replace(git, environment=kept | plain)


def split(output: bytes) -> list[bytes]:
    """Splits the output of -z."""
    return output.split(b"\0")[:-1]


def join(names: Iterable[bytes]) -> bytes:
    """Returns the input for -z."""
    return b"".join(name + b"\0" for name in names)


def show(text: bytes) -> str:
    """Decodes a name or a message; escapes control characters, and bytes that are not UTF-8."""
    decoded = text.decode(errors="backslashreplace")
    return "".join(x if x.isprintable() else ascii(x)[1:-1] for x in decoded)
