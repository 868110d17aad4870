"""What benchmark_gpu.py shares among its parts: contenders, which are processes, and how their results are told."""

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmark import ENVIRONMENT, HERE, spread
from benchmark_gpu_variants import VARIANTS

from cnnjax.runs.statistics import summarize


class Contender:
    """A process of benchmark_gpu_contender.py; it takes of the GPU's memory what it needs."""

    def __init__(self, args: argparse.Namespace, variant: str, *options: str, flags: str = "", log: Path | None = None):
        self.name, self.results, self.ready = variant, [], None
        flags = f"{ENVIRONMENT.get('XLA_FLAGS', '')} {VARIANTS[variant].flags} {flags}".strip()
        command = [sys.executable, str(HERE / "benchmark_gpu_contender.py"), "--variant", variant, *options]
        self._log = log.open("w") if log else None
        self._process = subprocess.Popen(
            command + ["--small"] * args.small,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**ENVIRONMENT, "XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _until(self, word: str, instant: float) -> tuple[list[str] | None, list[str]]:
        """Returns the words of the next line that begins with `word`, and the lines before it."""
        before = []
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, instant - time.monotonic()))
            except queue.Empty:
                return None, before
            if line is None or line.startswith(word):
                return (None if line is None else line.split()[1:]), before
            before.append(line.rstrip())

    def wait(self, instant: float) -> bool:
        """Waits until it has compiled and warmed up, or for the instant; returns whether it has."""
        words, _ = self._until("ready", instant)
        self.ready = None if words is None else float(words[0])
        print(f"{self.name}: {f'ready after {self.ready:.0f} s' if words else 'not ready'}", flush=True)
        if words is None:
            self.close()
        return words is not None

    def train(self, seed: int, instant: float) -> None:
        """Trains a seed; keeps accuracy, seconds in all, of whitening, training and scoring, and the digest."""
        words = self._ask(f"{seed}", "result", instant)[0]
        if words:
            *numbers, digest = words
            self.results.append((*map(float, numbers), digest))
            parts = ", ".join(f"{float(number):.3f}" for number in numbers[1:])
            print(f"{self.name}: seed {seed}, {float(numbers[0]):.2%}, {parts} s, {digest}", flush=True)

    def profile(self, folder: Path, instant: float) -> list[str]:
        """Traces a run; returns its kernels, a line each."""
        return self._ask(f"profile {folder}", "profiled", instant)[1]

    def _ask(self, line: str, word: str, instant: float) -> tuple[list[str] | None, list[str]]:
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError:  # It has ended; the table says so.
            return None, []
        words, before = self._until(word, instant)
        if words is None:  # What it answers later would be taken for the answer to another question.
            self.close()
        return words, before

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        if self._log:
            self._log.close()

    def seconds(self) -> list[float]:
        """Returns the seconds of each seed."""
        return [result[1] for result in self.results]

    def line(self, label: str) -> str:
        """Returns a line of the table of the clock."""
        return line_of(label, [100 * result[0] for result in self.results], self.seconds())


def line_of(label: str, accuracies: list[float], seconds: list[float]) -> str:
    """Returns a line of the tables on the records' clock."""
    scores = summarize(accuracies)
    half = "" if scores.n == 1 else f"± {scores.high - scores.mean:.2f}"
    return f"| {label} | {scores.mean:.2f}% | {half} | {spread(seconds, '.3f')} | {len(accuracies)} |"


def command_line(
    experiment: str, run_dir: Path, options: list[str], environment: dict[str, str], kill: str | None = None
) -> tuple[float, dict | None]:
    """Runs an experiment, or kills it at a line that begins with `kill`.

    Returns:
      The seconds of the whole process, and the content of its result.json, None if there is none.
    """
    command = [sys.executable, str(HERE / f"{experiment}.py"), "--run-dir", str(run_dir), *options]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=HERE.parent) as process:
        for line in process.stdout:
            if kill and line.startswith(kill):
                process.kill()
    wall, path = time.perf_counter() - begin, run_dir / "result.json"
    return wall, json.loads(path.read_text()) if path.exists() else None
