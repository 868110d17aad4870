"""Traces some steps of a run with jax's profiler, and tells how much of the time the device was busy."""

import re
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import jax

from cnnjax.errors import check
from cnnjax.step import copy_state

FOLDER = "profile"  # In the run directory.
T = TypeVar("T")
_SHOWN = 5  # Operations.
_CONTAINERS = r"(while|call|conditional)(\.\d+)?"  # Their time is that of the operations in them.


class Span(NamedTuple):
    """The time in ns in which an operation was executed."""

    start: float
    stop: float
    name: str


def parse_steps(text: str) -> tuple[int, int]:
    """Returns the numbers of "10:20".

    Raises:
      UserError: it is not two numbers, the second of which is larger.
    """
    match = re.fullmatch(r"(\d{1,10}):(\d{1,10})", text)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    check("profile", "two numbers of steps such as 10:20, the second of which is larger", first < last, repr(text))
    return first, last


class Profile:
    """Traces the steps after `steps[0]`, up to `steps[1]`, in a context that contains the training.

    On an accelerator an epoch is one program, so whole epochs are traced: smaller programs might give other bits, and
    would not be what the run spends its time on.

    Args:
      steps: two numbers of steps; None: nothing is traced.
      run_dir: the run directory. The trace goes into its folder `profile`.
      say: receives the lines of the summary.
    """

    def __init__(self, steps: tuple[int, int] | None, run_dir: Path, say: Callable[[str], None]):
        self._steps, self._folder, self._say = steps, run_dir / FOLDER, say
        self._first: int | None = None  # The step at which the trace began, while it is running.
        self._start = 0.0

    def check(self, step: int, num_steps: int) -> None:
        """Checks that a session traces what it should.

        Args:
          step: the number of steps that are done.
          num_steps: of the run.

        Raises:
          UserError: some of the steps are done, or beyond the end.
        """
        if self._steps is not None:
            first, last = self._steps
            valid = step <= first < last <= num_steps
            check("profile", f"within the steps {step}:{num_steps} that are left", valid, f"{first}:{last}")

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._first is not None:
            jax.profiler.stop_trace()
        if self._steps is not None:
            self._say(f"The run ended before step {self._steps[1]}: there is no complete profile.")

    def call(self, fn: Callable[..., T], arguments: tuple[Any, ...], *, steps: tuple[int, int]) -> T:
        """Returns `fn(*arguments)`, after it has started the trace, if it is to begin with these steps.

        Then `fn` is called twice, first on a copy of the state, so that the trace does not contain its compilation.

        Args:
          fn: a function that donates its first argument, a state.
          steps: the numbers of steps before and after.
        """
        if self._steps is not None and self._first is None and steps[0] <= self._steps[0] < steps[1]:
            state, *others = arguments
            jax.block_until_ready(fn(copy_state(state), *others))
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # It would slow down the host.
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._first, self._start = steps[0], time.perf_counter()
        return fn(*arguments)

    def end(self, step: int) -> None:
        """Ends the trace once `step` steps are done, if these are enough, and reports a summary."""
        if self._steps is None or self._first is None or step < self._steps[1]:
            return
        seconds, first = time.perf_counter() - self._start, self._first
        self._steps = self._first = None
        jax.profiler.stop_trace()
        traces = sorted(self._folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
        for line in summarize(jax.profiler.ProfileData.from_file(str(traces[-1])), seconds, (first, step)):
            self._say(line)
        self._say(f"To see the trace: pip install xprof; xprof --logdir {self._folder}")


def summarize(data: Any, seconds: float, steps: tuple[int, int]) -> list[str]:
    """Returns the lines about a trace: the share of the time in which the device was busy, and what took longest.

    Args:
      data: a `jax.profiler.ProfileData`.
      seconds: the duration of the steps.
      steps: the numbers of steps before and after.
    """
    planes = {plane.name: plane for plane in data.planes}
    devices = [plane for name, plane in planes.items() if re.match("/device:(GPU|TPU)", name)]
    spans = [on_device(plane) for plane in devices] or [on_threads(planes["/host:CPU"])]
    busy = sum(covered([span[:2] for span in of_device]) for of_device in spans) / len(spans) / 1e9
    total: Counter[str] = Counter()  # In whole ns.
    for start, stop, name in chain(*spans):
        if not re.fullmatch(_CONTAINERS, name):
            total[name] += round(stop - start)
    if not total:
        return [f"Profile of the steps {steps[0]}:{steps[1]}: the profiler has recorded no operation."]
    where = "on the device" if len(devices) == 1 else "on each device (mean)" if devices else "on XLA's threads"
    each, everything = 1e3 * seconds / (steps[1] - steps[0]), sum(total.values())
    return [
        f"Profile of the steps {steps[0]}:{steps[1]}: {each:.2f} ms per step. During {busy / seconds:.0%} of this time "
        f"at least one operation was running {where}. The operations with the largest share of all operations' time:",
        *(f"  {time / everything:4.0%} {name}" for name, time in total.most_common(_SHOWN)),
    ]


def on_device(plane: Any) -> list[Span]:
    """Returns what an accelerator executed."""
    lines = [line for line in plane.lines if re.match("Stream|XLA Ops", line.name)]  # Of a GPU; of a TPU.
    return [
        Span(event.start_ns, event.start_ns + event.duration_ns, str(dict(event.stats).get("hlo_op", event.name)))
        for line in lines
        for event in line.events
    ]


def on_threads(plane: Any) -> list[Span]:
    """Returns what XLA's threads executed. An operation may continue in other threads until an event that ends it."""
    events = [(event, dict(event.stats)) for line in plane.lines for event in line.events]
    ends = {
        stats["_c"]: event.start_ns + event.duration_ns
        for event, stats in events
        if event.name.startswith("end: ") and "_c" in stats
    }
    return [
        Span(event.start_ns, ends.get(stats.get("_p"), event.start_ns + event.duration_ns), str(stats["hlo_op"]))
        for event, stats in events
        if "hlo_op" in stats
    ]


def covered(spans: list[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals."""
    length, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        length += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return length
