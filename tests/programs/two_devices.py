"""Trains seeds of a run's configuration on two devices, is stopped by a signal, and resumes three of them.

A worker thread receives the signal, while seed 2 trains. At last seed 1 is in use. Usage: two_devices.py RUN_DIR
DATA_DIR FOLDER
"""

import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock

from cnnjax import Interrupted, Report, UserError
from cnnjax.errors import messages_for_shell
from cnnjax.runs.inspection import find_runs, read_info
from cnnjax.runs.records import read_record
from cnnjax.seeds import train_seeds, use_cores


class StopInSeed2(Report):
    """Sends SIGTERM to the thread that trains seed 2, in its first epoch."""

    def __init__(self, prefix=""):
        super().__init__(quiet=True, prefix=prefix)
        self.prefix = prefix

    def with_prefix(self, prefix):
        return StopInSeed2(prefix)

    def step(self, step, means):
        if self.prefix == "seed 2: " and step == 3:
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            stop: Any = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
            while stop.signum is None:  # The main thread handles it soon; until then this seed could end.
                time.sleep(0.01)


run_dir, data_dir, folder = map(Path, sys.argv[1:])
use_cores(2)
print(f"{len(jax.devices())} devices")
config = read_record(run_dir).decode({})
try:
    train_seeds(config, tuple(range(8)), folder=folder, data_dir=data_dir, report=StopInSeed2())
except Interrupted as stop:
    print(stop)
print({path.name: read_info(path).state for path in find_runs(folder)})
train_seeds(config, (0, 1, 2), folder=folder, data_dir=data_dir, resume=True, report=Report())
with messages_for_shell(), FileLock(folder / "seed1" / "lock"):
    try:
        train_seeds(config, (0, 1), folder=folder, data_dir=data_dir, resume=True)
    except UserError as error:
        print(error)
