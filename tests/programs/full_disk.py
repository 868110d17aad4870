"""Trains on a disk with room for two checkpoints, evaluates, and resumes when there is more room.

Usage: unshare -rm full_disk.py DISK [OPTIONS OF cnnjax train]. The run directory is DISK/run.
"""

import subprocess
import sys
from pathlib import Path

from cnnjax.cli.main import main

disk, options = sys.argv[1], sys.argv[2:]


def run(*arguments):
    """Runs a command and prints its exit status."""
    try:
        main(arguments)
        print("status 0")
    except SystemExit as stopped:
        print(f"status {stopped.code}")


def mount(*arguments):
    subprocess.run(["mount", *arguments, disk], check=True)


train = ["train", *options, "--no-report", "--run-dir", f"{disk}/run"]
mount("-t", "tmpfs", "-o", "size=16M", "tmpfs")
run(*train)
print("checkpoints:", *sorted(path.name for path in Path(disk, "run", "checkpoints").iterdir()))
run("eval", f"{disk}/run", "--data-dir", options[options.index("--data-dir") + 1])
mount("-o", "remount,size=200M")
run(*train, "--resume")
print(Path(disk, "run", "result.json").read_text())  # The disk disappears with this process.
