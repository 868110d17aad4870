"""Turns SIGINT, SIGTERM and SIGHUP into an exception, or into a flag that the training loop checks."""

import atexit
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The exit code of a run that a signal or a lost process stopped, and --resume continues: EX_TEMPFAIL of sysexits.h, for
# schedulers.
REQUEUE = 75


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run, and its progress is saved.

    Like `KeyboardInterrupt`, it is not caught by `except Exception`.

    Attributes:
      signum: the number of the signal.
      step: the step of the checkpoint, or None if the signal arrived before the first step or after the last.
    """

    def __init__(self, signum: int, step: int | None = None):
        saved = "nothing is lost" if step is None else f"the checkpoint of step {step} is saved"
        super().__init__(f"Stopped by {signal.Signals(signum).name}; {saved}.")
        self.signum = signum
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the arguments, which the message does not contain."""
        return type(self), (self.signum, self.step)


class Stop:
    """A request to stop, made by a signal.

    A signal raises `Interrupted` immediately, except inside `held`, where the training loop checks `signum` whenever it
    can save. Once all results are written and `finished` is set, signals are ignored.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._held = False
        self.finished = False
        self.exit_code = 1  # The exit code of the process, see `leave`.

    @contextmanager
    def held(self) -> Iterator[None]:
        """Delays `Interrupted` until the context ends. Contexts nest: one around several threads includes theirs."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before
        if self.signum is not None and not self._held and not self.finished:
            raise Interrupted(self.signum)

    @contextmanager
    def released(self) -> Iterator[None]:
        """Lets a signal raise `Interrupted` immediately, also inside `held`, in code of the main thread.

        So does another exception by which the code ends after a signal.
        """
        if threading.current_thread() is not threading.main_thread():  # The main thread may be inside `held`.
            yield
            return
        before, self._held = self._held, False
        try:
            if self.signum is not None and not self.finished:
                raise Interrupted(self.signum)
            yield
        except (Exception, SystemExit) as error:
            if self.signum is None or self.finished:
                raise
            raise Interrupted(self.signum) from error
        finally:
            self._held = before

    def leave(self, signum: int, frame: object) -> None:
        """Handles Ctrl-C at the end of the process: `atexit` functions of libraries are not waited for."""
        os._exit(self.exit_code)

    def receive(self, signum: int, frame: object) -> None:
        """Handles a signal. A second one raises `KeyboardInterrupt` immediately if it is Ctrl-C.

        Others often come twice: make, timeout and shells pass them on to processes that have received them already.
        """
        if self.finished:
            return
        if self.signum is not None:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signum = signum
        if not self._held:
            raise Interrupted(signum)


@contextmanager
def stop_signals(process_ends: bool = False) -> Iterator[Stop]:
    """Handles SIGINT, SIGTERM and SIGHUP with a `Stop` inside the context.

    Contexts nest, and share the `Stop` of the outermost one. A signal that was ignored before, by nohup or because a
    shell started the process in the background, stays ignored.

    Args:
      process_ends: whether signals are ignored after the context if the run is finished or stopped, so that the exit
        code says so. At the end of the process Ctrl-C ends it with the same code, see `Stop.leave`.
    """
    if threading.current_thread() is not threading.main_thread():  # Only it can handle signals.
        yield Stop()
        return
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    outer = [stop for handler in handlers.values() if isinstance(stop := getattr(handler, "__self__", None), Stop)]
    if outer:
        yield outer[0]
        return
    stop = Stop()
    # None: a handler that is not of Python and could not be set again.
    before = {signum: handler for signum, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for signum in before:
        signal.signal(signum, stop.receive)
    try:
        yield stop
    finally:
        ignored = process_ends and (stop.finished or stop.signum is not None)
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_IGN if ignored else handler)
        if ignored and signal.SIGINT in before:
            atexit.register(signal.signal, signal.SIGINT, stop.leave)  # Called before those of libraries.


@contextmanager
def acknowledged_ctrl_c(stop: Stop, seconds: float = 1) -> Iterator[None]:
    """Says that Ctrl-C was received if the context does not end within `seconds` after it, unless `stop` ignores it.

    Python handles a signal when the function in progress returns, such as XLA's compiler after many seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    ended = threading.Event()

    def watch() -> None:
        while (received := reader.recv(1)) and not ended.is_set():
            # Processes that this one forks write into the same socket, and are ended by other signals.
            if received[0] == signal.SIGINT and not stop.finished and not ended.wait(seconds):
                print("Ctrl-C was received: stopping when the computation in progress has ended.", file=sys.stderr)
                return

    thread = threading.Thread(target=watch, daemon=True, name="Ctrl-C")
    thread.start()
    previous = -1
    try:
        previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        yield
    finally:
        signal.set_wakeup_fd(previous)
        ended.set()
        with suppress(BlockingIOError):  # Then the thread has enough to read.
            writer.send(b"\0")
        thread.join()
        writer.close()
        reader.close()


def ignore_signals() -> None:
    """Ignores SIGINT, SIGTERM and SIGHUP."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
