"""Kills training again and again, at random moments, and compares what it leaves with a run that nobody stopped.

    make stress # 100 kills of a network on MNIST

Each start is a process of its own, with --resume. Most end by SIGKILL, some by SIGTERM or SIGINT. When a run comes to
its end, its digests (parameters, optimizer state, best checkpoint, metrics.jsonl) must be those of the run that was
left alone; then the next begins, with an empty compilation cache. Prints a table at the end; exits with 1 at the first
bit that differs.
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

MNIST = [
    "--dataset",
    "mnist",
    "--model.name",
    "mlp",
    "--model.dense-dropout",
    "0.2",
    "--augment.flip",
    "random",
    "--num-epochs",
    "4",
]
# Where a kill can hit, and how often each is aimed at.
MOMENTS = {"start": 1, "first step": 1, "within an epoch": 3, "end of an epoch": 2, "checkpoint write": 3}


class Start:
    """A process that trains, and what it printed."""

    def __init__(self, arguments, run_dir, cache):
        self.run_dir = run_dir
        self.log = run_dir.with_suffix(".log")
        self.begin = self.log.stat().st_size if self.log.exists() else 0
        command = [sys.executable, "-u", "-m", "cnnjax", "train", *arguments, "--run-dir", str(run_dir), "--resume"]
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--checkpoint-seconds", "0.2"], stdout=log, stderr=log, env=environment
            )

    def printed(self):
        return self.log.read_text()[self.begin :]

    def wait_for(self, condition):
        """Waits until the condition holds; returns False where the process ends first."""
        while not condition():
            if self.process.poll() is not None:
                return False
            time.sleep(0.001)
        return True

    def saves(self):
        """Whether a checkpoint is being written: it has a temporary name, or no checksums yet."""
        folders = list((self.run_dir / "checkpoints").glob("*"))
        return any("tmp" in folder.name or not (folder / "SHA256SUMS").exists() for folder in folders)

    def come_to(self, moment, rng):
        """Waits until training is where the kill is aimed at; returns False where the process ends first."""
        if moment != "start" and not self.wait_for(lambda: "validation images, on" in self.printed()):
            return False
        if moment == "end of an epoch" and not self.wait_for(lambda: "\nepoch " in self.printed()):
            return False
        if moment == "checkpoint write" and not self.wait_for(self.saves):
            return False
        latest = {
            "start": 2.0,
            "first step": 1.5,
            "within an epoch": 4.0,
            "end of an epoch": 0.2,
            "checkpoint write": 0.1,
        }
        end = time.monotonic() + rng.uniform(0, latest[moment])
        self.wait_for(lambda: time.monotonic() >= end)
        return self.process.poll() is None


def outcome(run_dir):
    """What must be the same, to the bit."""
    result = json.loads((run_dir / "result.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, result["num_epochs"] + 1))
    return {k: v for k, v in result.items() if k not in ("training_seconds", "device")}


def stress(kills, arguments, folder, seed=0, moments=None):
    """Kills `kills` times; returns how many hit each moment by each signal, and how many runs came to their end.

    Raises:
      AssertionError: a run ended in other bits, or did not go on, or ended with another exit code than 75 on a signal.
    """
    rng = random.Random(seed)
    moments = moments or MOMENTS
    alone = Start(arguments, folder / "alone", folder / "cache-alone")
    assert alone.process.wait() == 0, alone.printed()
    expected = outcome(folder / "alone")
    hits, runs, in_run = Counter(), 0, 0
    while True:
        run_dir, cache = folder / f"run-{runs}", folder / f"cache-{runs}"
        start = Start(arguments, run_dir, cache)
        moment = rng.choices(list(moments), moments.values())[0]
        # Until Python runs our code, no handler is there for the milder signals.
        signum = (
            signal.SIGKILL if moment == "start" or rng.random() < 0.7 else rng.choice([signal.SIGTERM, signal.SIGINT])
        )
        if sum(hits.values()) < kills and start.come_to(moment, rng):
            start.process.send_signal(signum)
        status = start.process.wait()
        if status == 0:
            assert outcome(run_dir) == expected, (run_dir, outcome(run_dir), expected)
            print(f"run {runs}: killed {in_run} times, the same bits", flush=True)
            runs, in_run = runs + 1, 0
            if sum(hits.values()) >= kills:
                return hits, runs
        else:
            assert status == (-signal.SIGKILL if signum == signal.SIGKILL else 75), (status, start.printed())
            hits[moment, signum.name] += 1
            in_run += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        hits, runs = stress(args.kills, MNIST, Path(folder), args.seed)
    names = ["SIGKILL", "SIGTERM", "SIGINT"]
    print(f"\n| killed at | {' | '.join(names)} |\n| --- | --- | --- | --- |")
    for moment in MOMENTS:
        print(f"| {moment} | {' | '.join(str(hits[moment, name]) for name in names)} |")
    minutes = (time.monotonic() - begin) / 60
    print(f"\n{sum(hits.values())} kills over {runs} runs in {minutes:.0f} minutes: every run ended in the same bits.")


if __name__ == "__main__":
    main()
