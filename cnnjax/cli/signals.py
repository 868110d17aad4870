"""Turns SIGINT and SIGTERM into an exception, or into a flag that the training loop checks."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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


class Stop:
    """A request to stop, made by a signal.

    A signal raises `Interrupted` immediately, except inside `held`, where the training loop checks `signum` whenever it
    can save.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._held = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Delays `Interrupted` until the context ends. Contexts nest: one around several threads includes theirs."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before
        if self.signum is not None and not self._held:
            raise Interrupted(self.signum)

    def receive(self, signum: int, frame: object) -> None:
        """Handles a signal. The second one raises `KeyboardInterrupt` immediately."""
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        if not self._held:
            raise Interrupted(signum)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Handles SIGINT and SIGTERM with a `Stop` inside the context."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # Only it can handle signals.
        yield stop
        return
    before = {signum: signal.signal(signum, stop.receive) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
