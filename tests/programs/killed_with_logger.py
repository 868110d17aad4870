"""Runs research.py with TensorBoard, and kills this process at step 10, once the checkpoint of step 6 is complete.

Usage: killed_with_logger.py RUN_DIR
"""

import os
import signal
import sys
import time
from pathlib import Path

from research import CONFIG

from cnnjax import TensorBoard, train_and_evaluate

run_dir = Path(sys.argv[1])


def kill(step, metrics):
    if step == 10:
        while not (run_dir / "checkpoints" / "6" / "SHA256SUMS").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


train_and_evaluate(CONFIG, run_dir=run_dir, resume="auto", loggers=[TensorBoard()], on_step=kill)
