"""Runs research.py, and kills this process at the Nth time that it replaces FILE of the run directory.

Usage: killed_at_write.py FILE N --run-dir DIR [OPTIONS]
"""

import itertools
import os
import signal
import sys
from pathlib import Path

from research import CONFIG

from cnnjax import run_experiment

name, count = sys.argv.pop(1), int(sys.argv.pop(1))
run_dir, writes = Path(sys.argv[sys.argv.index("--run-dir") + 1]), itertools.count(1)


def kill_at_rename(event, args):
    if event == "os.rename" and Path(args[1]) == run_dir / name and next(writes) == count:
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(kill_at_rename)
run_experiment(CONFIG)
