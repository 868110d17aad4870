"""Kills training at random moments, and compares what it leaves with a run without interruptions.

    make stress    # 100 kills of a network on MNIST

Each start is a process with --resume. Most of them end by SIGKILL, some by SIGTERM or SIGINT. When a run finishes, its
digests (parameters, optimizer state, best checkpoint, metrics.jsonl) must be those of the uninterrupted run; then the
next run begins, with an empty compilation cache. Prints a table at the end; exits with 1 at the first difference.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

MNIST = ["--dataset", "mnist", "--model", "mlp", "--model.dense-dropout", "0.2", "--augment.flip", "random"]
MNIST += ["--num-epochs", "4"]


class Moment(NamedTuple):
    """When to kill: the relative frequency, and the latest time after the moment has come, in seconds."""

    weight: int
    latest: float


MOMENTS = {
    "start": Moment(1, 2.0),
    "first step": Moment(1, 1.5),
    "within an epoch": Moment(3, 4.0),
    "end of an epoch": Moment(2, 0.2),
    "checkpoint write": Moment(3, 0.1),
}


class Start:
    """A process that trains, and its output."""

    def __init__(self, arguments, run_dir, cache):
        self.run_dir = run_dir
        self.log = run_dir.with_suffix(".log")
        self.begin = self.log.stat().st_size if self.log.exists() else 0
        command = [sys.executable, "-u", "-m", "cnnjax", "train", *arguments, "--run-dir", str(run_dir), "--resume"]
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def printed(self):
        return self.log.read_text()[self.begin :]

    def wait_for(self, condition):
        """Waits until the condition holds; returns False if the process ends first."""
        while not condition():
            if self.process.poll() is not None:
                return False
            time.sleep(0.005)
        return True

    def saves(self):
        """Returns whether a checkpoint is being written: it has a temporary name, or no checksums yet."""
        folders = list((self.run_dir / "checkpoints").glob("*"))
        return any("tmp" in folder.name or not (folder / "SHA256SUMS").exists() for folder in folders)

    def reach(self, moment, delay):
        """Waits for a moment, and then for `delay` seconds; returns False if the process ends first."""
        if moment != "start" and not self.wait_for(lambda: "validation images, on" in self.printed()):
            return False
        if moment == "end of an epoch" and not self.wait_for(lambda: "\nepoch " in self.printed()):
            return False
        if moment == "checkpoint write" and not self.wait_for(self.saves):
            return False
        end = time.monotonic() + delay
        self.wait_for(lambda: time.monotonic() >= end)
        return self.process.poll() is None


def outcome(run_dir):
    """Returns what must be the same, to the bit."""
    result = json.loads((run_dir / "result.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, result["num_epochs"] + 1))
    return {k: v for k, v in result.items() if k not in ("training_seconds", "device")}


def stress(kills, arguments, expected, folder, *, seed=0, moments=MOMENTS):
    """Kills runs `kills` times in total, and lets the last one finish.

    Args:
      kills: the number of kills.
      arguments: of `cnnjax train`.
      expected: the `outcome` of a run without interruptions.
      folder: for the run directories.
      seed: of the moments.
      moments: when to kill.

    Returns:
      How many kills hit each moment with each signal, and the number of runs.

    Raises:
      AssertionError: a run ended in other bits, did not resume, or did not exit with 75 on a signal.
    """
    rng = random.Random(seed)
    hits, runs, in_run = Counter(), 0, 0
    while True:
        run_dir, cache = folder / f"run-{runs}", folder / f"cache-{runs}"
        start = Start(arguments, run_dir, cache)
        moment = rng.choices(list(moments), [moment.weight for moment in moments.values()])[0]
        # The handlers of the milder signals exist only when our code runs.
        signum = (
            signal.SIGKILL if moment == "start" or rng.random() < 0.7 else rng.choice([signal.SIGTERM, signal.SIGINT])
        )
        if sum(hits.values()) < kills and start.reach(moment, rng.uniform(0, moments[moment].latest)):
            start.process.send_signal(signum)
        status = start.process.wait()
        if status == 0:
            assert outcome(run_dir) == expected, (run_dir, outcome(run_dir), expected)
            print(f"run {runs}: killed {in_run} times, the same bits", flush=True)
            runs, in_run = runs + 1, 0
            if sum(hits.values()) >= kills:
                return hits, runs
        else:
            unhandled = signum == signal.SIGKILL or "Test accuracy" in start.printed()  # The run has ended.
            assert status == (-signum if unhandled else 75), (status, start.printed())
            hits[moment, signum.name] += 1
            in_run += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder, arguments = Path(name), [*MNIST, "--checkpoint-seconds", "0.2"]
        alone = Start(arguments, folder / "alone", folder / "cache-alone")
        assert alone.process.wait() == 0, alone.printed()
        hits, runs = stress(args.kills, arguments, outcome(folder / "alone"), folder, seed=args.seed)
    names = ["SIGKILL", "SIGTERM", "SIGINT"]
    print(f"\n| killed at | {' | '.join(names)} |\n| --- | --- | --- | --- |")
    for moment in MOMENTS:
        print(f"| {moment} | {' | '.join(str(hits[moment, name]) for name in names)} |")
    minutes = (time.monotonic() - begin) / 60
    print(f"\n{sum(hits.values())} kills over {runs} runs in {minutes:.0f} minutes: every run ended in the same bits.")


if __name__ == "__main__":
    main()
