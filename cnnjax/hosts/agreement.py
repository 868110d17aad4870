"""How processes that run ahead of each other choose one boundary between steps at which all of them act.

Each process passes the same boundaries, numbered from 1, but at its own time: collectives let one be ahead of another
by about a step. A request freezes them: a thread beside the main thread says which boundary comes next, and the main
thread waits there. Once all have said so, process 0 chooses the last of these boundaries. No main thread can have
passed it, and every one gets there, because only threads beside them have to answer.
"""

import threading
from typing import Any, NamedTuple


class Decision(NamedTuple):
    """The common decision of all processes at one boundary.

    Attributes:
      request: the number of the request, from 1.
      boundary: the number of the boundary.
      stop: the signal to stop for, or None.
      save: whether to save.
    """

    request: int
    boundary: int
    stop: int | None
    save: bool


class Agreement:
    """The state of one process, shared by its main thread and the thread that talks to the others."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._arrived = 0  # The number of boundaries that are passed.
        self._request = self._done = 0
        self._decision: Decision | None = None
        self._stop: int | None = None
        self._save = False
        self.asked = threading.Event()  # The other thread should look now.

    def arrive(self, stop: int | None, save: bool) -> tuple[int | None, bool]:
        """Passes the next boundary; waits if processes are choosing one. Returns the signal to stop for, and `save`."""
        with self._changed:
            boundary = self._arrived + 1
            self._stop, self._save = stop, save
            if self._request == self._done:
                self._arrived = boundary
                if stop is not None or save:
                    self.asked.set()
                return None, False
            while self._decision is None:
                self._changed.wait(1)
            decision, self._arrived = self._decision, boundary
            if boundary < decision.boundary:
                return None, False
            self._done, self._decision, self._stop, self._save = self._request, None, None, False
            return decision.stop, decision.save

    def is_active(self) -> bool:
        """Returns whether something is asked for and not yet done."""
        with self._changed:
            return self._request != self._done or self._stop is not None or self._save

    def see(self, request: int, decision: Decision | None) -> None:
        """Takes note of what process 0 says."""
        with self._changed:
            self._request = max(self._request, request)
            if decision is not None and decision.request == self._request != self._done:
                self._decision = decision
                self._changed.notify_all()

    def entry(self) -> dict[str, Any]:
        """Returns what this process says."""
        with self._changed:
            return {
                "request": self._request,
                "done": self._done,
                "next": self._arrived + 1,
                "stop": self._stop,
                "save": self._save,
            }


class Requests:
    """The requests that process 0 makes, one after the other."""

    def __init__(self) -> None:
        self.number = 0
        self.decision: Decision | None = None

    def update(self, entries: list[dict[str, Any]]) -> None:
        """Makes a request, or decides on the one that was made.

        Args:
          entries: what each process says; of the first, `save` counts.
        """
        stop = next((entry["stop"] for entry in entries if entry["stop"] is not None), None)
        save = bool(entries[0]["save"])
        undecided = self.decision is None or self.decision.request != self.number
        if self.number and undecided and all(entry["request"] == self.number for entry in entries):
            boundary = max(entry["next"] for entry in entries)
            self.decision = Decision(self.number, boundary, stop, save)
        elif all(entry["done"] == self.number for entry in entries) and (stop is not None or save):
            self.number += 1
