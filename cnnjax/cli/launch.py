"""Starts the processes of one training on this machine, passes signals on to them, and leaves none behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from cnnjax.errors import UserError, check
from cnnjax.process.settings import free_port, num_cores
from cnnjax.process.signals import REQUEUE, stop_signals

# Set in each process that was started here: descriptor and inode of a pipe that closes when the launcher ends.
_PIPE = "CNNJAX_LAUNCHER"
_POLL_SECONDS = 0.05
_MAX_PROCESSES = 16  # Or one per core if there are more: each takes hundreds of megabytes.


def is_launched() -> bool:
    """Returns whether this process is one of those that `launch` started."""
    return _launcher_pipe() is not None


def launch(num_processes: int, *, grace_seconds: float) -> int:
    """Runs the command of this process again in `num_processes` processes of one training, and waits for all of them.

    They find each other by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, share the cores of this
    process, and compute on them unless JAX_PLATFORMS is set. Process 0 writes to standard output and standard error;
    the lines of the others go to standard error with a prefix, such as [1]. SIGINT, SIGTERM and SIGHUP are passed on.

    Args:
      num_processes: from 1 to 16, or to the number of cores if that is larger.
      grace_seconds: once a process has failed, the time in which the others must end before they are killed. They do
        so, too, if this process is killed.

    Returns:
      The exit code: 0 if all have finished, 75 if --resume continues the run, else that of the first failure.
    """
    limit = max(_MAX_PROCESSES, num_cores())
    check("processes", f"from 1 to {limit} on this machine", 1 <= num_processes <= limit, num_processes)
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        raise UserError(f"`processes` must be left out if JAX_COORDINATOR_ADDRESS is set, got {address}. Unset it.")
    with stop_signals() as stop, stop.held():
        children = _Children(num_processes)
        try:
            children.start()
            while children.running() and not children.failed_since(grace_seconds):
                if stop.signum is not None and not children.signalled:
                    children.send(stop.signum)
                time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:  # The second Ctrl-C.
            children.send(signal.SIGINT)
            children.wait(_POLL_SECONDS * 100)
        finally:
            stop.finished = True  # The exit code says the rest.
            children.end()
    return exit_code(children.codes)


def exit_code(codes: Sequence[int]) -> int:
    """Returns the exit code of a training from those of its processes, in the order in which they ended.

    A negative one is the signal that ended a process, as in `subprocess`. If another process stopped with 75 because of
    that, --resume continues the run.
    """
    for code in codes:
        if code > 0 and code != REQUEUE:
            return code
    if REQUEUE in codes:
        return REQUEUE
    return next((128 - code for code in codes if code < 0), 0)


def follow_launcher(grace_seconds: float) -> None:
    """Makes this process stop if the launcher ends first: by SIGTERM, which saves, and by SIGKILL if that takes longer.

    Has no effect if the process was not started by `launch`.
    """
    if (descriptor := _launcher_pipe()) is None:
        return

    def watch() -> None:
        os.read(descriptor, 1)  # Nothing is ever written: this waits for the end.
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="launcher").start()


def _launcher_pipe() -> int | None:
    descriptor, _, inode = os.environ.get(_PIPE, "").partition(":")
    with suppress(OSError, ValueError):  # A process that this one started has the variable, and not the pipe.
        if os.fstat(int(descriptor)).st_ino == int(inode):
            return int(descriptor)
    return None


class _Children:
    """Processes that train together.

    Attributes:
      codes: the exit codes of those that have ended, in that order.
      signalled: whether a signal was passed on.
    """

    def __init__(self, count: int):
        self.count = count
        self.codes: list[int] = []
        self.signalled = False
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._readers: list[threading.Thread] = []
        self._failed_at: float | None = None
        self._pipe: int | None = None

    def start(self) -> None:
        """Starts all."""
        address = f"127.0.0.1:{free_port()}"
        read, self._pipe = os.pipe()
        pipe = f"{read}:{os.fstat(read).st_ino}"
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        try:
            for i in range(self.count):
                environment = {**os.environ, "JAX_COORDINATOR_ADDRESS": address, _PIPE: pipe}
                environment |= {"JAX_NUM_PROCESSES": str(self.count), "JAX_PROCESS_ID": str(i)}
                environment.setdefault("JAX_PLATFORMS", "cpu")
                environment.pop("CNNJAX_EXIT_CODE", None)  # The launcher writes it.
                if cores:  # A process inherits those of this thread.
                    os.sched_setaffinity(0, share(cores, i, self.count))
                output = None if i == 0 else subprocess.PIPE
                child = subprocess.Popen(
                    [sys.executable, *sys.orig_argv[1:]],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT if i else None,
                    env=environment,
                    pass_fds=[read],
                    start_new_session=True,  # Otherwise a terminal would send Ctrl-C to all, and the launcher again.
                )
                self._running[i] = child
                if child.stdout is not None:
                    reader = threading.Thread(target=_prefix, args=(child.stdout, f"[{i}] "), daemon=True)
                    reader.start()
                    self._readers.append(reader)
        finally:
            os.close(read)
            if cores:
                os.sched_setaffinity(0, cores)

    def running(self) -> bool:
        """Returns whether any process runs, and reports on those that failed."""
        for i, child in list(self._running.items()):
            if (code := child.poll()) is None:
                continue
            del self._running[i]
            self.codes.append(code)
            if code and self._failed_at is None:
                self._failed_at = time.monotonic()
            if code < 0:
                _say(f"Process {i} was ended by {signal.Signals(-code).name}.")
        return bool(self._running)

    def failed_since(self, seconds: float) -> bool:
        """Returns whether the first failure was this long ago."""
        return self._failed_at is not None and time.monotonic() - self._failed_at > seconds

    def send(self, signum: int) -> None:
        """Sends a signal to all that run."""
        self.signalled = True
        for child in self._running.values():
            with suppress(OSError):
                child.send_signal(signum)

    def wait(self, seconds: float) -> None:
        """Waits until all have ended, at most this long."""
        end = time.monotonic() + seconds
        while self.running() and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)

    def end(self) -> None:
        """Kills those that still run, and prints what the others wrote last."""
        self.running()
        for i, child in self._running.items():
            _say(f"Process {i} still runs, and is killed.")
            child.kill()
        self.codes += [child.wait() for child in self._running.values()]
        if self._pipe is not None:
            os.close(self._pipe)
        for reader in self._readers:
            reader.join(timeout=1)  # A process that a child has left behind may keep the pipe open.


def share(cores: Sequence[int], index: int, count: int) -> list[int]:
    """Returns the cores of process `index` of `count`: equal parts, or one core for several if there are too few."""
    if len(cores) < count:
        return [cores[index % len(cores)]]
    return list(cores[index * len(cores) // count : (index + 1) * len(cores) // count])


def _prefix(stream: IO[bytes], prefix: str) -> None:
    with stream:
        for line in stream:
            _say(prefix + line.decode(errors="replace").rstrip("\n"))


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")  # In one call, so that lines of several threads stay whole.
    sys.stderr.flush()
