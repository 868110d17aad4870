"""The threads through which processes talk, and notice that one of them has ended.

Each process writes what it says under its own key of jax's coordination service, which lives in process 0. Process 0
reads all of them, and answers under one key that all read, so that the traffic grows with the number of processes and
not with its square. One thread talks; a second one watches the clock, because a call does not return if the service
does not answer.
"""

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from cnnjax.errors import option
from cnnjax.hosts.agreement import Agreement, Decision, Requests
from cnnjax.process.settings import write_exit_code
from cnnjax.process.signals import REQUEUE

_TICK = 0.2  # Seconds between two exchanges.
_SUSPICION = 5.0  # Seconds of silence that are enough once a collective has failed.
_FAREWELL = 5.0  # Seconds for the others to read why process 0 ends, and to end.

# What a process has done: called `leave`; learned that all have left, or why the run ends; reached its own end.
_LEFT, _KNOWS, _ENDING = 1, 2, 3


class Watch:
    """Talks to the other processes and ends this one if another has ended.

    Attributes:
      agreement: see `Agreement`.
      left: set once all processes have called `leave`.
      ending: whether this process ends by itself, for its own reason.
      has_told: whether process 0 knows the reason, and waits for the end of this process.
      clean_up: called before this process is ended because of another.
    """

    def __init__(self, client: Any, index: int, names: tuple[str, ...], *, timeout: float, prefix: str):
        self.agreement = Agreement()
        self.left = threading.Event()
        self.ending = self.has_told = False
        self.clean_up: Callable[[], object] = lambda: None
        self._client, self._index, self._names, self._timeout, self._prefix = client, index, names, timeout, prefix
        self._requests = Requests()
        self._said: dict[int, dict[str, Any]] = {}  # What each process said last.
        self._heard = dict.fromkeys(range(len(names)), time.monotonic())  # When it said something new.
        self._word: dict[str, Any] = {}  # What process 0 said last.
        self._phase = 0  # Or one of the constants above.
        self._ended: dict[str, Any] | None = None  # Why this process ends.
        self._suspects = False
        self._beat = 0
        self._answered = threading.Event()  # Everybody knows why the run ends.
        self._closed = threading.Event()
        self._exit_lock = threading.Lock()
        self._tick = max(min(_TICK, timeout / 10), len(names) / 1000)  # About a thousand calls per second, per key.
        self._resume = option("resume")  # Only this thread knows the reader.
        self._threads = [
            threading.Thread(target=target, name=f"cnnjax-hosts-{name}", daemon=True)
            for name, target in (("talk", self._talk), ("watch", self._watch))
        ]
        for thread in self._threads:
            thread.start()

    # --- For the main thread ------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Waits until all processes have called this, and know it."""
        self._phase = _LEFT
        self.agreement.asked.set()
        self.left.wait()
        self.ending = True
        self._answered.wait(_FAREWELL)
        self.close()

    def tell(self, message: str, code: int) -> None:
        """Tells the others why this process ends; waits until they know, or for some seconds."""
        with self._exit_lock:  # Unless the watcher ends it already: then it never returns.
            self.ending = True
        self._ended = {"process": self._index, "message": message, "code": code}
        self.agreement.asked.set()
        if self._index == 0:
            self._wait_for_others()
        elif self._answered.wait(min(_FAREWELL, self._timeout)):
            atexit.register(self._say_goodbye)
            self.has_told = True
        self.close()

    def exit(self, code: int) -> None:
        """Ends this process at once if it has told the others why it ends; see `end_process`."""
        if self.has_told:
            self._say_goodbye()
            exit_now("", code)

    def explain(self) -> None:
        """Waits until a process that has caused an error is found, which ends this one; returns if there is none."""
        self._suspects = True
        self.agreement.asked.set()
        time.sleep(min(self._timeout, _SUSPICION) + 10 * self._tick + 1)
        if self._ended is not None:  # The others are told first.
            time.sleep(_FAREWELL + 1)

    def close(self) -> None:
        """Ends the threads, unless one waits for a service that does not answer."""
        self._closed.set()
        self.agreement.asked.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(1)

    # --- The thread that talks ----------------------------------------------------------------------------------

    def _talk(self) -> None:
        exchange = self._lead if self._index == 0 else self._follow
        while not self._closed.is_set():
            self._beat += 1
            try:
                exchange()
            except Exception:  # The service is gone, or the interpreter ends: the other thread decides.
                time.sleep(self._tick)
            self.agreement.asked.clear()
            if self.agreement.is_active() or self._phase or self._ended or self._word.get("ended"):
                self._closed.wait(self._tick / 10)
            else:
                self.agreement.asked.wait(self._tick)

    def _entry(self) -> dict[str, Any]:
        return {
            **self.agreement.entry(),
            "beat": self._beat,
            "phase": self._phase,
            "ended": self._ended,
            "suspects": self._suspects,
        }

    def _follow(self) -> None:
        self._set(f"process/{self._index}", self._entry())
        word = self._get_word()
        if word.get("beat") != self._word.get("beat"):
            self._heard[0] = time.monotonic()
        self._word = word
        decision = word.get("decision")
        self.agreement.see(word.get("request", 0), decision and Decision(*decision))
        if word.get("ended") or word.get("left"):
            self._phase = _KNOWS
            self._set(f"process/{self._index}", self._entry())
            self._answered.set()
            if word.get("ended"):
                self._end(**word["ended"])
            else:
                self.left.set()

    def _lead(self) -> None:
        listed = self._client.key_value_dir_get(f"{self._prefix}process/")
        said = {int(key.rsplit("/", 1)[1]): json.loads(text) for key, text in listed}
        for i, entry in said.items():
            if entry["beat"] != self._said.get(i, {}).get("beat"):
                self._heard[i] = time.monotonic()
        self._said = said | {0: self._entry()}
        entries = [self._said[i] for i in sorted(self._said)]
        everyone = len(entries) == len(self._names)
        if everyone:
            self._requests.update(entries)
        self.agreement.see(self._requests.number, self._requests.decision)
        first = next((entry["ended"] for entry in entries if entry["ended"]), None)
        ended = self._word.get("ended") or first
        all_left = not ended and everyone and all(entry["phase"] for entry in entries)
        word = {
            "beat": self._beat,
            "request": self._requests.number,
            "decision": self._requests.decision,
            "ended": ended,
            "left": self._word.get("left") or all_left,
        }
        self._word = word
        self._set("word/0", word)
        if word["left"]:
            self.left.set()
        if (word["ended"] or word["left"]) and all(entry["phase"] >= _KNOWS for entry in entries[1:]):
            self._answered.set()
        if word["ended"] and self._ended is None:
            self._ended = word["ended"]
            # Another thread ends the process, because this one has to talk until everybody knows.
            threading.Thread(target=self._end, kwargs=word["ended"], daemon=True).start()

    def _set(self, key: str, value: dict[str, Any]) -> None:
        self._client.key_value_set(self._prefix + key, json.dumps(value), allow_overwrite=True)

    def _get_word(self) -> dict[str, Any]:
        listed = self._client.key_value_dir_get(f"{self._prefix}word/")
        return json.loads(listed[0][1]) if listed else {}

    # --- The thread that watches the clock ----------------------------------------------------------------------

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._tick):
            now = time.monotonic()
            if now - before > self._timeout / 2:  # This process was stopped: what it has not heard proves nothing.
                self._heard = dict.fromkeys(self._heard, now)
            before = now
            for i, silence in [(i, now - heard) for i, heard in self._heard.items()]:
                watched = self._index == 0 or i == 0
                if watched and i != self._index and silence > self._patience():
                    self.lose(i, silence)

    def _patience(self) -> float:
        suspects = self._suspects or any(entry["suspects"] for entry in self._said.values())
        return min(self._timeout, _SUSPICION) if suspects else self._timeout

    def lose(self, process: int, silence: float | None = None) -> None:
        """Ends this process, because another is lost.

        Args:
          process: its number.
          silence: seconds since it answered, or None if its connection is closed.
        """
        how = "has ended or cannot be reached" if silence is None else f"has not answered for {silence:.0f} s"
        message = (
            f"Process {process} (host {self._names[process]}) {how}: stopping. Continue from the last checkpoint with "
            f"{self._resume}."
        )
        if self._index == 0 and self._ended is None:
            self._ended = {"process": process, "message": message, "code": REQUEUE, "lost": True}
            self.agreement.asked.set()
        self._end(process, message, REQUEUE, lost=True)

    def _end(self, process: int, message: str, code: int, lost: bool = False) -> None:
        """Ends this process because of another, unless it is ending for a reason of its own."""
        if self._index == 0:
            self._wait_for_others(except_for=process if lost else None)
        with self._exit_lock:
            if self.ending:
                return
            if self._index and not (lost and process == 0):
                self._say_goodbye()
            if process == self._index:  # It was stopped, by SIGSTOP or with its host, and continued.
                message = f"This process was silent, and the others have stopped: {message}"
            elif not lost:
                message = f"Process {process} (host {self._names[process]}) ended: {message}"
            _try(self.clean_up)
            exit_now(message, code)

    def _wait_for_others(self, except_for: int | None = None) -> None:
        """Lets the others, except for a lost one, read why the run ends and end first, within some seconds.

        Without process 0 they could not read it, and jax would fill the terminal of one whose message matters.
        """
        deadline = time.monotonic() + min(_FAREWELL, self._timeout)
        while time.monotonic() < deadline:
            others = [self._said.get(i, {}) for i in range(1, len(self._names)) if i != except_for]
            if all(entry.get("phase") == _ENDING for entry in others):
                time.sleep(min(1, self._timeout / 3) if except_for is None else 0)  # Their interpreters take a moment.
                return
            time.sleep(self._tick / 10)

    def _say_goodbye(self) -> None:
        """Tells process 0 that this process ends. The call would not return if process 0 has ended before."""
        self._phase = _ENDING
        entry = f"process/{self._index}", self._entry()
        thread = threading.Thread(target=_try, args=(lambda: self._set(*entry),), daemon=True)
        thread.start()
        thread.join(1)


def exit_now(message: str, code: int) -> None:
    """Ends the process at once, without cleaning up: its main thread may wait for another process forever."""
    say, leave = (lambda: print(message, file=sys.stderr) if message else None), (lambda: write_exit_code(code))
    for write in (say, leave, sys.stderr.flush, sys.stdout.flush):
        _try(write)
    os._exit(code)


def _try(function: Callable[[], object]) -> None:
    try:
        function()
    except Exception:  # The stream is closed.
        return
