"""SIGINT and SIGTERM, turned from a sudden end into an exception, or a flag that the loop looks at."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; all it did is saved. Like its parent it passes by code that catches `Exception`.

    Attributes:
      signum: the signal.
      step: the step of the checkpoint; None where the signal came before the first step or after the last.
    """

    def __init__(self, signum: int, step: int | None = None):
        saved = "nothing is lost" if step is None else f"the checkpoint of step {step} is saved"
        super().__init__(f"Stopped by {signal.Signals(signum).name}; {saved}.")
        self.signum = signum
        self.step = step


class Stop:
    """The signal that asked to stop, if one came.

    It raises `Interrupted` where it arrives; within `held`, the loop looks at `signum` when it can save.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._held = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps a signal waiting while the context lasts; one around several threads holds for all of theirs."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before
        if self.signum is not None and not self._held:
            raise Interrupted(self.signum)

    def receive(self, signum: int, frame: object) -> None:
        """Handles a signal; the second one ends the process at once."""
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        if not self._held:
            raise Interrupted(signum)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Lets a `Stop` receive SIGINT and SIGTERM instead of ending the process."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread alone.
        yield stop
        return
    before = {signum: signal.signal(signum, stop.receive) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
