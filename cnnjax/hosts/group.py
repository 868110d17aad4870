"""The coordination of the processes of a run."""

import ctypes
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
from jax._src import distributed

from cnnjax.errors import UserError, describe
from cnnjax.files import changes
from cnnjax.hosts.watch import Watch
from cnnjax.process.signals import REQUEUE

T = TypeVar("T")

_FOREVER = 7 * 24 * 3600 * 1000  # Milliseconds. The watcher ends a process that would wait for a lost one.


class Hosts:
    """The processes of a run. All of them call the same methods in the same order.

    Attributes:
      index: the number of this process.
      count: the number of processes.
      names: the host name of each process.
      leads: whether this is process 0, which alone writes logs and reports.
    """

    def __init__(self, index: int = 0, names: tuple[str, ...] = ("localhost",), watch: Watch | None = None):
        self.index = index
        self.count = len(names)
        self.names = names
        self.leads = index == 0
        self._watch = watch
        self._client: Any = None
        self._prefix = ""
        self._owned = False
        self._stopped = self._closed = False
        self._shared = self._barriers = 0

    def share(self, compute: Callable[[], T]) -> T:
        """Returns the result of `compute`, which process 0 alone calls, in all processes.

        An exception of `compute` is raised in process 0; when it leaves the context, the other processes end.

        Args:
          compute: returns what JSON can represent; tuples arrive as lists.
        """
        if self._watch is None:
            return compute()
        key, self._shared = f"{self._prefix}shared/{self._shared}", self._shared + 1
        if self.leads:
            value = compute()
            self._client.key_value_set(key, json.dumps(value))
            return json.loads(json.dumps(value))
        return json.loads(self._client.blocking_key_value_get(key, _FOREVER))

    def check_same(self, name: str, rule: str, value: Any) -> None:
        """Raises a `UserError` that names a parameter, unless process 0 has the same value.

        Args:
          value: anything that JSON can represent; tuples count as lists. If it is a dict, the message names the items
            that differ.
        """
        if self._watch is None:
            return
        here, there = json.loads(json.dumps(value)), self.share(lambda: value)
        if here != there:
            place = f"process {self.index} on {self.names[self.index]}"
            if isinstance(here, dict) and isinstance(there, dict):
                pairs = changes(there, here).items()
                listed = "; ".join(f"`{key}` is {x!r} in process 0, and {y!r} in {place}" for key, (x, y) in pairs)
                raise UserError(f"`{name}` must be {rule}, but {listed}.")
            raise UserError(f"`{name}` must be {rule}, got {there!r} in process 0, and {here!r} in {place}.")

    def barrier(self, name: str) -> None:
        """Waits until all processes have called this."""
        if self._watch is None:
            return
        self._barriers += 1
        self._client.wait_at_barrier(f"{self._prefix}barrier/{self._barriers}/{name}", _FOREVER)

    def agreed(self, *, stop: int | None, save: bool) -> tuple[int | None, bool]:
        """Returns the signal to stop for, or None, and whether to save: the same in all processes at the same step.

        Call it at each boundary between steps. It takes microseconds unless something is asked for; then the processes
        need a few tenths of a second to choose a boundary, often a later one than this.

        Args:
          stop: the signal that this process has received, or None.
          save: whether a checkpoint is due; process 0 decides.
        """
        if self._watch is None:
            return stop, save
        answer = self._watch.agreement.arrive(stop, save and self.leads)
        self._stopped |= answer[0] is not None
        return answer

    def explain(self, error: BaseException) -> None:
        """Waits for the reason of an error that may come from the loss of another process; `close` calls it.

        If one is lost or has ended, this process ends with a message that names it; else it returns after some seconds.
        """
        # A collective of XLA raises JaxRuntimeError, or ValueError if it is dispatched from Python.
        text = str(error).lower()
        if (
            self._watch is not None
            and isinstance(error, (RuntimeError, ValueError, OSError))
            and any(
                word in text
                for word in ("gloo", "nccl", "connection", "socket", "peer", "unavailable", "grpc", "aborted")
            )
        ):
            self._watch.explain()

    def close(self, error: BaseException | None = None) -> None:
        """Leaves together with the other processes; if there is an error, tells them why they have to end, instead."""
        if self._closed:
            return
        self._closed = True
        if self._stopped and isinstance(error, KeyboardInterrupt):
            error = None  # All stop together.
        if self._watch is not None:
            if error is None:
                self._watch.leave()
            else:
                self.explain(error)
                self._watch.tell(*_reason(error))
        if error is not None and self.count > 1:
            _abandon()
        elif self._owned:
            jax.distributed.shutdown()

    @contextmanager
    def before_end(self, clean_up: Callable[[], object]) -> Iterator[None]:
        """Calls a function if this process is ended because of another inside the context."""
        if self._watch is not None:
            self._watch.clean_up = clean_up
        try:
            yield
        finally:
            if self._watch is not None:
                self._watch.clean_up = lambda: None

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Closes with the exception that leaves the context, but not without one."""
        try:
            yield
        except BaseException as error:
            self.close(error)
            raise

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)


def _reason(error: BaseException) -> tuple[str, int]:
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted.", REQUEUE
    if isinstance(error, SystemExit):
        return "it has called sys.exit.", error.code if isinstance(error.code, int) else 1
    return describe(error), 1


def _abandon() -> None:
    """Lets jax forget its connection, which aborts the process if it is closed without the other processes."""
    state = distributed.global_state
    for part in (state.preemption_sync_manager, state.client, state.service):
        if part is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(part))  # Its destructor closes it.
    state.preemption_sync_manager = state.client = state.service = None
