"""The parts of gpu.py share a device: their jobs compile at the same time, and take turns with what is timed."""

import argparse
import re
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import HERE, xla_flags
from variants import VARIANTS

# Number of jobs at the same time. A process needs up to 4 GB of the device's memory, and most jobs are one process.
TOGETHER = 18
Table = Callable[[], str]  # Makes the table of what a part has measured so far.


class Device:
    """Makes one call at a time: of those that wait, the one with the lowest rank."""

    def __init__(self, until: float) -> None:
        self._until, self._taken = until, False
        self._changed, self._ranks = threading.Condition(), dict[object, tuple[int, ...]]()

    def calls(self, rank: Callable[[int], tuple[int, ...]], calls: Sequence[Callable[[], Any]]) -> Iterator[Any]:
        """Yields what the calls of a job return, until one returns None or it is the time `until` of `time.monotonic`.

        Args:
          rank: of the i-th call.
        """
        job = object()
        try:
            for i, call in enumerate(calls):
                with self._changed:
                    self._ranks[job] = rank(i)  # It keeps its place between two calls.
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: not self._taken and min(self._ranks.values()) == self._ranks[job])
                    self._taken = True
                try:
                    value = call() if time.monotonic() < self._until else None
                finally:
                    with self._changed:
                        self._taken = False
                        self._changed.notify_all()
                if value is None:
                    return
                yield value
        finally:
            with self._changed:
                self._ranks.pop(job, None)
                self._changed.notify_all()


@dataclass
class Part:
    """A part that is being measured. Its jobs compile at the same time as others, and take turns on the device."""

    args: argparse.Namespace
    rank: tuple[int, ...]
    until: float
    device: Device
    folder: Path  # For its files.
    save: Callable[[], None]  # Writes the table of what is measured so far.
    jobs: list[Callable[[], None]] = field(default_factory=list)

    def job(self, function: Callable[..., None], *arguments: Any) -> None:
        """Adds a job. If it fails, the others continue."""

        def run() -> None:
            try:
                if time.monotonic() < self.until:
                    function(self, *arguments)
            except (Exception, SystemExit):
                traceback.print_exc()

        self.jobs.append(run)

    def turns(self, row: int, calls: Sequence[Callable[[], Any]]) -> Iterator[Any]:
        """Yields the results of the calls of a row of the table, see `Device.calls`."""
        yield from self.device.calls(lambda i: (*self.rank, i, row), calls)

    @contextmanager
    def start(
        self, variant: str, *options: str, name: str = "", flags: str = "", **environment: str
    ) -> Iterator[Callable[..., Any]]:
        """Starts the process of a variant, see `harness.worker`; its log has the name of the variant, or `name`."""
        command = [self.args.python, str(HERE / "variants.py"), "--variant", variant, *options]
        command += ["--small"] * self.args.small
        environment["XLA_FLAGS"] = xla_flags(VARIANTS[variant].flags, flags)
        log = self.log(name or variant)

        def ask_in_time(*question: Any) -> Any:
            if (answer := ask(*question, until=self.until)) is None:
                print(f"{name or variant}: ended during {question[0]}, see {log}", flush=True)
            return answer

        with harness.worker(*command, log=log, **environment) as ask:
            yield ask_in_time

    def log(self, name: str) -> Path:
        """Returns the file for what a process writes on its standard error."""
        return self.folder / f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.log"


def measure(
    args: argparse.Namespace,
    parts: Mapping[str, Callable[[Part], Table]],
    write: Callable[[str, str], str],
    until: float,
    folder: Path,
) -> None:
    """Measures the chosen parts until the time `until` of `time.monotonic`; `write` saves the table of a part."""
    device, writing = Device(until), threading.Lock()
    tables, texts, jobs = dict[str, Table](), dict[str, str](), []

    def save(name: str) -> None:
        with writing:
            texts[name] = write(name, tables[name]())

    for i, name in enumerate(args.parts):
        last = name == "tutorial"
        if not last:  # It can be resumed.
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(exist_ok=True)
        part = Part(args, (int(last), i), until, device, folder / name, partial(save, name))
        tables[name] = parts[name](part)
        jobs = [*part.jobs, *jobs] if last else [*jobs, *part.jobs]
    with ThreadPoolExecutor(2 if args.small else TOGETHER) as threads:
        try:
            wait([threads.submit(job) for job in jobs])
        except BaseException:  # Such as Ctrl-C, which ends the processes that run.
            threads.shutdown(cancel_futures=True)
            raise
    print(*(texts.get(name, f"{name}: nothing was measured.\n") for name in args.parts), sep="\n")
