"""Kills training at random moments, damages what it leaves, and compares the end with a run without interruptions.

    make stress    # 100 kills of a network on MNIST

Each start is a process with --resume. Most of them end by SIGKILL, some by SIGTERM, SIGINT or SIGHUP. After every other
kill a random file of the run directory is damaged. Then the next start must resume or end with one message, after which
the damage is undone; and no intact checkpoint may get lost. When a run finishes, its digests (parameters, optimizer
state, best checkpoint, metrics.jsonl) must be those of the uninterrupted run; then the next run begins, with an empty
compilation cache. Prints tables at the end; exits with 1 at the first difference.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import stat
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


DAMAGES = ("a flipped bit", "a truncated file", "a removed file", "a removed permission")
# Starts a process for which permissions hold, also if it is root.
AS_USER = (
    ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if os.geteuid() == 0 and shutil.which("setpriv")
    else []
)


def content_of(path):
    return path.read_bytes() if path.is_file() else None


class Damage:
    """Damages a random file or folder below a run directory, except the lock, and can undo it."""

    def __init__(self, run_dir, rng):
        paths = [path for path in sorted(run_dir.rglob("*")) if path.name != "lock" and "damaged" not in path.parts]
        files = [path for path in paths if path.is_file() and path.stat().st_size]
        self.kind = rng.choice(DAMAGES) if files else "nothing"
        self.path = rng.choice(paths if self.kind == "a removed permission" else files or [run_dir])
        self.mode, self.before = stat.S_IMODE(self.path.stat().st_mode), content_of(self.path)
        match self.kind:
            case "a flipped bit":
                changed = bytearray(self.before)
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
                self.path.write_bytes(changed)
            case "a truncated file":
                os.truncate(self.path, rng.randrange(len(self.before)))
            case "a removed file":
                self.path.unlink()
        self.after = content_of(self.path)
        if self.kind == "a removed permission":
            self.path.chmod(0o500 if self.path.is_dir() and rng.random() < 0.5 else 0)

    def undo(self):
        """Undoes the damage, unless the path has been moved away or written again."""
        if self.path.exists():
            self.path.chmod(self.mode)
        if self.path.parent.exists() and content_of(self.path) == self.after != self.before:
            self.path.write_bytes(self.before)


def intact_checkpoints(folder):
    """Returns the digest of each checkpoint in a folder all of whose files have the right checksum, {step: digest}."""
    found = {}
    for path in folder.glob("[0-9]*") if folder.exists() else ():
        if not os.access(path, os.R_OK | os.X_OK):
            continue
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        sums = [f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}" for name in names]
        content = "\n".join(line for line in sums if not line.endswith("SHA256SUMS")) + "\n"
        if (path / "SHA256SUMS").exists() and (path / "SHA256SUMS").read_bytes() == content.encode():
            found[path.name] = content
    return found


def check_nothing_is_lost(before, run_dir):
    """Checks that each checkpoint of `before` is still there, or was set aside, or has two intact successors."""
    now = intact_checkpoints(run_dir / "checkpoints")
    aside = intact_checkpoints(run_dir / "damaged").values()
    for step, digest in before.items():
        successors = [other for other in now if int(other) > int(step)]
        assert digest in (*now.values(), *aside) or len(successors) >= 2, f"checkpoint {step} of {run_dir} is lost"


class Start:
    """A process that trains, and its output."""

    def __init__(self, arguments, run_dir, cache):
        self.run_dir = run_dir
        self.log = run_dir.with_suffix(".log")
        self.begin = self.log.stat().st_size if self.log.exists() else 0
        command = [
            *AS_USER,
            sys.executable,
            "-u",
            "-m",
            "cnnjax",
            "train",
            *arguments,
            "--run-dir",
            str(run_dir),
            "--resume",
            "--no-report",
        ]
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


def stress(kills, arguments, expected, folder, *, seed=0, moments=MOMENTS, damaged=0.5):
    """Kills runs `kills` times in total, and lets the last one finish.

    Args:
      kills: the number of kills.
      arguments: of `cnnjax train`.
      expected: the `outcome` of a run without interruptions.
      folder: for the run directories.
      seed: of the moments and the damage.
      moments: when to kill.
      damaged: the fraction of kills after which something is damaged.

    Returns:
      How many kills hit each moment with each signal; how many starts after each kind of damage went on, and how many
      ended with a message; and the number of runs.

    Raises:
      AssertionError: a run ended in other bits, lost an intact checkpoint, or ended without a message or with a wrong
        exit code.
    """
    rng = random.Random(seed)
    hits, starts, runs, in_run = Counter(), Counter(), 0, 0
    fresh, damages = None, []  # The last damage until a start has met it, and all of the run.
    while True:
        run_dir, cache = folder / f"run-{runs}", folder / f"cache-{runs}"
        before = intact_checkpoints(run_dir / "checkpoints")
        start = Start(arguments, run_dir, cache)
        moment = rng.choices(list(moments), [moment.weight for moment in moments.values()])[0]
        # The handlers of the milder signals exist only when our code runs.
        others = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        signum = signal.SIGKILL if moment == "start" or rng.random() < 0.7 else rng.choice(others)
        killed = sum(hits.values()) < kills and start.reach(moment, rng.uniform(0, moments[moment].latest))
        if killed:
            start.process.send_signal(signum)
        status = start.process.wait(timeout=300)  # A process that hangs is a failure, too.
        if fresh is not None and not (killed and moment == "start"):
            starts[fresh.kind, "message" if status in (1, 2) else "went on"] += 1
            fresh = None
        if status in (1, 2):
            assert damages, (status, start.printed())
            assert "Traceback" not in start.printed(), start.printed()
            assert start.printed().strip(), f"{status} without a message after {damages[-1].kind}: {damages[-1].path}"
            for one in reversed(damages):
                one.undo()
            damages = []
        check_nothing_is_lost(before, run_dir)
        if status == 0:
            assert outcome(run_dir) == expected, (run_dir, outcome(run_dir), expected)
            verify = subprocess.run([sys.executable, "-m", "cnnjax", "verify", str(run_dir)], check=False)
            assert verify.returncode == 0
            print(f"run {runs}: killed {in_run} times, the same bits", flush=True)
            for one in damages:
                one.undo()  # So that the folder can be deleted.
            runs, in_run, damages = runs + 1, 0, []
            if sum(hits.values()) >= kills:
                return hits, starts, runs
        elif status not in (1, 2):
            expected_status = {-signum if signum == signal.SIGKILL or "Test accuracy" in start.printed() else 75}
            if damages:  # It may already have ended with its message, when signals are not handled anymore.
                expected_status.add(-signum)
            assert status in expected_status, (status, start.printed())
            hits[moment, signum.name] += 1
            in_run += 1
            if fresh is None and run_dir.exists() and rng.random() < damaged:
                fresh = Damage(run_dir, rng)
                damages.append(fresh)


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
        hits, starts, runs = stress(args.kills, arguments, outcome(folder / "alone"), folder, seed=args.seed)
    names = ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"]
    print(f"\n| killed at | {' | '.join(names)} |\n| --- | --- | --- | --- | --- |")
    for moment in MOMENTS:
        print(f"| {moment} | {' | '.join(str(hits[moment, name]) for name in names)} |")
    print("\n| start after | went on | ended with a message |\n| --- | --- | --- |")
    for kind in DAMAGES:
        print(f"| {kind} | {starts[kind, 'went on']} | {starts[kind, 'message']} |")
    minutes = (time.monotonic() - begin) / 60
    print(f"\n{sum(hits.values())} kills over {runs} runs in {minutes:.0f} minutes: every run ended in the same bits.")
    print("No intact checkpoint was lost.")


if __name__ == "__main__":
    main()
