"""The harness of the benchmarks: processes that take turns, runs of experiments, tables, and BENCHMARKS.md.

It imports the standard library only, because peers import it in their own environments.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
EXPERIMENTS, ROOT, REPORT = HERE.parent, HERE.parent.parent, HERE / "BENCHMARKS.md"
# The environment of other processes.
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
ANSWER = "answer: "  # Libraries print other lines.

# --- Processes ------------------------------------------------------------------------------------------------------


def serve(*functions: Callable[..., Any]) -> None:
    """Answers questions: each line of standard input is a JSON list of a function's name and its arguments."""
    by_name = {function.__name__: function for function in functions}
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        answer(by_name[name](*arguments))


def answer(value: Any) -> None:
    """Answers the current question."""
    print(ANSWER + json.dumps(value), flush=True)


@contextmanager
def worker(*command: str, log: Path | None = None, **environment: str) -> Iterator[Callable[..., Any]]:
    """Starts a process that runs `serve`. On a GPU it allocates only the memory that it needs.

    Yields:
      A function `(name, *arguments, until=None)` that asks a question and returns the answer. At the time `until` of
      `time.monotonic` it kills the process. If the process has ended it returns None, or exits without an `until`.
    """
    pipe, env = subprocess.PIPE, ENVIRONMENT | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | environment
    with log.open("w") if log else nullcontext() as stderr:
        process: Any = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=stderr, text=True, env=env)

    def ask(*question: Any, until: float | None = None) -> Any:
        with suppress(OSError), killed_at(process, until):
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith(ANSWER):
                    return json.loads(line.removeprefix(ANSWER))
        if until is None:
            sys.exit(f"`{' '.join(command)}` ended without an answer to {question}.")

    try:
        yield ask
    finally:
        process.kill()
        with suppress(OSError), process:  # Closes the pipes.
            pass


@contextmanager
def killed_at(process: subprocess.Popen[Any], until: float | None) -> Iterator[None]:
    """Kills a process if the block has not ended at the time `until` of `time.monotonic`."""
    # Half a second is enough to read an answer that is already there.
    seconds = threading.TIMEOUT_MAX if until is None else max(0.5, until - time.monotonic())
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def xla_flags(*flags: str) -> str:
    """Returns the value of XLA_FLAGS with more flags."""
    return " ".join([ENVIRONMENT.get("XLA_FLAGS", ""), *flags]).strip()


class Run(NamedTuple):
    """A run of an experiment: seconds of its whole process, maximum memory in GiB, content of result.json."""

    seconds: float
    memory: float
    result: dict[str, Any] | None


def run_experiment(
    name: str,
    run_dir: Path,
    *options: str,
    python: str = sys.executable,
    until: float | None = None,
    **environment: str,
) -> Run:
    """Runs an experiment file; kills it at the time `until` of `time.monotonic`."""
    command = [python, str(EXPERIMENTS / f"{name}.py"), "--run-dir", str(run_dir), *options]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT | environment) as process:
        with killed_at(process, until):
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds, path = time.perf_counter() - start, run_dir / "result.json"
    return Run(seconds, usage.ru_maxrss / 2**20, json.loads(path.read_text()) if path.exists() else None)  # From KiB.


def save_cifar10(path: Path) -> str:
    """Writes CIFAR-10 for peers: `train_image`, `train_label`, `test_image` and `test_label` in one .npz file."""
    import numpy as np

    from cnnjax import load_dataset

    splits = {split: load_dataset("cifar10").load(split)._asdict() for split in ("train", "test")}
    np.savez(path, **{f"{split}_{name}": array for split in splits for name, array in splits[split].items()})
    return str(path)


# --- Measurements ---------------------------------------------------------------------------------------------------


def seconds(function: Callable[[], object]) -> float:
    """Returns the duration of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def take_turns(work: Mapping[Any, Callable[[], float]], turns: int, warm_up: int = 1) -> dict[Any, list[float]]:
    """Calls each function once per turn, so that a change of the machine's speed affects all; returns their values."""
    found = {name: [] for name in work}
    for turn in range(-warm_up, turns):
        print(f"turn {turn + 1} of {turns}" if turn >= 0 else "warming up", file=sys.stderr)
        for name, function in work.items():
            value = function()
            if turn >= 0:
                found[name].append(value)
    return found


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """Returns the median, and the smallest and largest value."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def ratio(a: Iterable[float], b: Iterable[float]) -> float:
    """Returns the median of the ratios within a turn."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


# --- The report -----------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table; short rows are filled up with empty cells."""
    filled = ([*row, *[""] * (len(head) - len(row))] for row in rows)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *filled))


def parse(parser: argparse.ArgumentParser, parts: Sequence[str], default: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments: the parts of the benchmark, and the options that every benchmark has."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)} ({', '.join(default)})")
    parser.add_argument("--small", action="store_true", help="try the parts at a small size; the report stays as is")
    parser.add_argument("--into", metavar="DIR", type=Path, help="write the tables there, not into the report")
    args = parser.parse_args()
    args.parts = args.parts or list(default)
    if unknown := set(args.parts) - {*parts}:
        parser.error(f"`PART` must be one of {', '.join(parts)}, got {', '.join(sorted(unknown))}.")
    try:
        if args.into:
            args.into.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"`--into` must be a directory that can be created, got {args.into} ({error.strerror}).")
    return args


def find_python(parser: argparse.ArgumentParser, option: str, value: str) -> str:
    """Returns the path of the interpreter that an option names."""
    if (path := shutil.which(value)) is None:
        parser.error(f"`--{option}` must be an interpreter, got {value}. `make bench-gpu` creates those that it needs.")
    return os.path.abspath(path)


def write_tables(
    args: argparse.Namespace,
    parts: Mapping[str, Callable[[Any], str]],
    about: str,
    prefix: str = "",
    report: Path = REPORT,
) -> None:
    """Measures the chosen parts; writes their tables, and `about`, into a report at their marks or elsewhere."""
    write = table_writer(args, about, prefix, report)
    for name in args.parts:
        print(f"\n{write(name, parts[name](args))}", flush=True)


def table_writer(
    args: argparse.Namespace, about: str, prefix: str = "", report: Path = REPORT
) -> Callable[[str, str], str]:
    """Returns a function that writes the table of a part, as `write_tables` does, and returns what it has written."""
    into_report = not (args.into or args.small)
    for name in args.parts if into_report else ():
        replaced(report.read_text(), prefix + name, "")  # Fails now, not after hours of measurements.

    def write(name: str, found: str) -> str:
        text = f"{found}\n\n{about}\n"
        if args.into:
            (args.into / f"{name}.md").write_text(text)
        elif into_report:
            report.write_text(replaced(report.read_text(), prefix + name, text))
        return text

    return write


def replaced(report: str, mark: str, text: str) -> str:
    """Returns the report with another text between the two comments that mark a part."""
    pattern = f"(<!-- {mark} -->\n).*?(<!-- end of {mark} -->\n)"
    report, count = re.subn(pattern, lambda found: found[1] + text + found[2], report, flags=re.DOTALL)
    if count != 1:
        sys.exit(f"The report must contain <!-- {mark} --> and <!-- end of {mark} --> exactly once, got {count}.")
    return report


def describe(peers: str, python: str = sys.executable) -> str:
    """Returns `environment`, found by another process: in this one, jax would take the memory of a GPU."""
    with worker(python, __file__) as ask:
        return ask("environment", peers)


def environment(peers: str) -> str:
    """Returns date, hardware, versions (also of the interpreter `peers`), kernels and commit as a sentence."""
    from importlib.metadata import version

    import jax

    from cnnjax.onednn.library import kernels
    from cnnjax.runs.source import source_code
    from cnnjax.setup import device_name

    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next(iter(re.findall(r"model name\s*: (.*)", cpuinfo)), platform.processor())
    units = [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in cpuinfo]
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "optax", "numpy")]
    if Path(peers).exists():
        packages = subprocess.check_output([peers, "-m", "pip", "list", "--format", "freeze"], text=True)
        versions += [" ".join(found) for found in re.findall(r"(?m)^(torch|keras|tensorflow[_a-z-]*)==(.*)", packages)]
    backend = f"cpu, kernels of {kernels()}" if jax.default_backend() == "cpu" else jax.default_backend()
    code = source_code().facts
    commit = (code["commit"] or "unknown")[:7] + (" with changes" if code["dirty"] else "")
    return (
        f"{time.strftime('%Y-%m-%d')}, {device_name(jax.devices()[0])}: {model} ({', '.join(units)}); "
        f"{', '.join(versions)}; jax on {backend}; commit {commit}."
    )


if __name__ == "__main__":
    serve(environment)
