"""Traces some steps of a run with jax's profiler, and tells how much of the time the device was busy."""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax

from cnnjax.errors import check, describe

FOLDER = "profile"  # In the run directory.
_SHOWN = 5  # Operations.
_MARK = "cnnjax.train_steps"  # An event of the trace: from the dispatch of some steps until the device has done them.
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


def is_range(steps: Any) -> bool:
    """Returns whether an argument is two numbers of steps."""
    return isinstance(steps, tuple | list) and len(steps) == 2 and all(isinstance(step, int) for step in steps)


class Profile:
    """Traces the steps after `steps[0]`, up to `steps[1]`, in a context that contains the training.

    On an accelerator an epoch of images in memory is one program, so whole epochs are traced: smaller programs might
    give other bits, and would not be what the run spends its time on. The end of an epoch (validation, `on_epoch`,
    saving) is in the trace, but not in the summary.

    A failure of the profiler is reported, and training continues. The steps still count as traced, because all
    processes must run the same programs.

    Args:
      steps: two numbers of steps; None: nothing is traced.
      run_dir: the run directory.
      say: receives the lines of the summary.
      folder: the folder of the run directory into which the trace goes.
    """

    def __init__(self, steps: tuple[int, int] | None, run_dir: Path, say: Callable[[str], None], folder: str = FOLDER):
        self._steps, self._folder, self._say = steps, run_dir / folder, say
        self._first: int | None = None  # The step at which the trace began, until it ends.
        self._failed = False
        self._mark: jax.profiler.TraceAnnotation | None = None
        self._compiled: set[tuple[int, Hashable]] = set()

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
        if self._failed or self._steps is None:
            return
        if self._first is not None:
            with self._reported():
                jax.profiler.stop_trace()
        if not self._failed:
            self._say(f"The run ended before step {self._steps[1]}: there is no complete profile.")

    def is_new_program(self, step: int, num_steps: int, program: Hashable) -> bool:
        """Returns whether the next `num_steps` steps are traced and their program must be compiled first.

        Args:
          program: the argument of `train_steps`. With the number of steps it determines what is compiled.
        """
        if not self.traces(step, num_steps) or (num_steps, program) in self._compiled:
            return False
        self._compiled.add((num_steps, program))
        return True

    def begin(self, step: int, num_steps: int, epoch: int) -> None:
        """Starts the trace, if it begins within the next `num_steps` steps; marks these if they are traced."""
        if not self.traces(step, num_steps):
            return
        starts, self._first = self._first is None, step if self._first is None else self._first
        if self._failed:
            return
        with self._reported():
            if starts:
                self._folder.mkdir(exist_ok=True)
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # It would slow down the host.
                jax.profiler.start_trace(self._folder, profiler_options=options)
            self._mark = jax.profiler.TraceAnnotation(_MARK, epoch=epoch)
            self._mark.__enter__()

    def end(self, step: int) -> None:
        """Ends the mark; ends the trace once `step` steps are done, if these are enough, and reports a summary."""
        if self._steps is None or self._first is None:
            return
        first, last = self._first, self._steps[1]
        if step >= last:
            self._first = self._steps = None
        if self._failed or self._mark is None:
            return
        with self._reported():
            self._mark.__exit__(None, None, None)
            self._mark = None
            if step < last:
                return
            jax.profiler.stop_trace()
            traces = sorted(self._folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
            for line in summarize(jax.profiler.ProfileData.from_file(str(traces[-1])), (first, step)):
                self._say(line)
            self._say(f"To see the trace: pip install xprof; xprof --logdir {self._folder}")

    def traces(self, step: int, num_steps: int) -> bool:
        """Returns whether the next `num_steps` steps are traced."""
        return self._steps is not None and (self._first is not None or step <= self._steps[0] < step + num_steps)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed = True
            self._say(f"The profile failed: {describe(error)} The run continues without it.")


def summarize(data: Any, steps: tuple[int, int]) -> list[str]:
    """Returns the lines about a trace: the share of the time in which the device was busy, and what took longest.

    Only the time from the first traced step of an epoch to its last counts.

    Args:
      data: a `jax.profiler.ProfileData`.
      steps: the numbers of steps before and after.
    """
    planes = {plane.name: plane for plane in data.planes}
    devices = [plane for name, plane in planes.items() if re.match("/device:(GPU|TPU)", name)]
    windows = marked(planes["/host:CPU"])
    seconds = sum(stop - start for start, stop in windows) / 1e9
    spans = [on_device(plane) for plane in devices] or [on_threads(planes["/host:CPU"])]
    spans = [within(of_device, windows) for of_device in spans]
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


def marked(plane: Any) -> list[tuple[float, float]]:
    """Returns the time in ns from the first traced step of each epoch to its last."""
    windows: dict[Any, tuple[float, float]] = {}
    for event in chain(*(line.events for line in plane.lines)):
        if event.name == _MARK:
            epoch, start, stop = dict(event.stats)["epoch"], event.start_ns, event.start_ns + event.duration_ns
            first, last = windows.get(epoch, (start, stop))
            windows[epoch] = min(first, start), max(last, stop)
    return [*windows.values()]


def within(spans: Iterable[Span], windows: list[tuple[float, float]]) -> list[Span]:
    """Returns the parts of spans that are within disjoint intervals."""
    return [
        Span(max(span.start, start), min(span.stop, stop), span.name)
        for span in spans
        for start, stop in windows
        if span.start < stop and span.stop > start
    ]


def on_device(plane: Any) -> list[Span]:
    """Returns what an accelerator executed."""
    lines = [line for line in plane.lines if re.match("Stream|XLA Ops", line.name)]  # On a GPU; on a TPU.
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
