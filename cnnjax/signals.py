"""SIGINT and SIGTERM, turned from a sudden end into a flag that the loop looks at."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):  # noqa: N818  It is no error.
    """A signal ended the run; all it did is saved.

    Attributes:
      signum: the signal.
      step: the step of the checkpoint.
    """

    def __init__(self, signum: int, step: int):
        super().__init__(f"Stopped by {signal.Signals(signum).name}; the checkpoint of step {step} is saved.")
        self.signum = signum
        self.step = step


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM into a list instead of ending the process; a second one ends it at once."""
    received: list[int] = []

    def receive(signum: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signum)

    if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread alone.
        yield received
        return
    before = {signum: signal.signal(signum, receive) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
