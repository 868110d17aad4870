"""An experiment for several processes, one of which may send itself a signal at a given moment.

cnnjax train tests/programs/distributed.py --processes 2

Environment variables:
  SIGNAL: process, signal, moment and count, such as "1 SIGKILL step 8". The moments: a step, counted from the first of
    the run; or, counted in this process, the beginning of a save, or the end of its own part of one ("save", "saved").
  OTHER_DATA, OTHER_CONFIG, NOT_SHARED: the number of a process with other data, another configuration, or another
    working directory.
  OTHER_PROFILE: the number of a process that traces some steps.
  STOP_AFTER: the epoch after which `on_epoch` stops the run; the program is then started as a script, as for
    OTHER_PROFILE.
"""

import glob
import json
import os
import signal
import sys
import tempfile
import threading
import time

import flax.linen as nn
import numpy as np
import optax

from cnnjax import Augment, Config, Logger, Optimizer, loop, train_and_evaluate
from cnnjax.hosts import Hosts, connect
from cnnjax.runs import checkpoints

PROCESS = os.environ.get("JAX_PROCESS_ID", "0")


class Net(nn.Module):
    """A hidden layer whose kernel is large enough to be divided, batch normalization and dropout."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.Dense(256)(image.reshape(len(image), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.num_classes)(nn.Dropout(0.2, deterministic=not train)(x))


class Momentum(Optimizer):
    """SGD with momentum."""

    def transform(self, learning_rate):
        return optax.sgd(learning_rate, 0.9)


class Calls(Logger):
    """Appends the name of each call, and the process, to a file in the run directory."""

    def __init__(self):
        self.path = None

    def _write(self, line):
        with open(self.path, "a") as file:
            file.write(f"{line} of process {PROCESS}\n")

    def start(self, run, step):
        self.path = run.run_dir / "calls"
        self._write("start")

    def on_epoch(self, row, state):
        self._write("epoch")

    def finish(self, result):
        self._write("finish")


def patterns():
    """Returns noisy copies of one random pattern per class."""
    rng = np.random.default_rng(int(os.environ.get("OTHER_DATA") == PROCESS))
    label = np.arange(210) % 10
    image = rng.integers(0, 128, (10, 8, 8, 1))[label] + rng.normal(0, 40, (210, 8, 8, 1))
    image = image.clip(0, 255).astype(np.uint8)
    return image[:150], label[:150], image[150:], label[150:]


def send_signal_at(moment, count, signum):
    """Makes this process send itself a signal, just before it does something."""
    calls = {"save": 0, "saved": 0}

    def reach(name, number=None):
        if name in calls:
            calls[name] = number = calls[name] + 1
        if (name, number) == (moment, count):
            os.kill(os.getpid(), signum)

    add_steps, barrier, save = loop.add_steps, Hosts.barrier, checkpoints.ocp.save_checkpointables

    def own_add_steps(run, progress, metrics, steps, seconds):  # Just before the processes agree whether to stop.
        reach("step", steps[1])
        return add_steps(run, progress, metrics, steps, seconds)

    def own_barrier(self, name):
        if name == "a checkpoint is written":
            reach("saved")
        return barrier(self, name)

    def own_save(*arguments, **options):
        # Orbax needs tens of milliseconds: this is while it writes.
        def reach_when_begun():
            while not glob.glob(f"{arguments[0]}*"):  # Orbax has not made the folder yet.
                time.sleep(0.001)
            reach("save")

        thread = threading.Thread(target=reach_when_begun, daemon=True)
        thread.start()
        save(*arguments, **options)
        thread.join()

    loop.add_steps, Hosts.barrier, checkpoints.ocp.save_checkpointables = own_add_steps, own_barrier, own_save


def top2(logits, label):
    """Fails in all processes but the first, whose scores count."""
    if PROCESS != "0":
        raise RuntimeError("not here")
    of_label = np.take_along_axis(logits, label[:, None], axis=1)
    return {"top2": np.mean((logits > of_label).sum(1) < 2), "nan": np.nan}


CONFIG = Config(
    name="distributed",
    dataset=patterns,
    num_epochs=3,
    seed=int(os.environ.get("OTHER_CONFIG") == PROCESS),
    batch_size=16,  # 9 steps per epoch.
    model=Net(),
    optim=Momentum(learning_rate=0.01),
    augment=Augment(flip="random"),
    metrics=top2,
    best_by="top2",
)

if os.environ.get("SIGNAL"):
    process, name, moment, count = os.environ["SIGNAL"].split()
    if process == PROCESS:
        send_signal_at(moment, int(count), signal.Signals[name])
if os.environ.get("NOT_SHARED") == PROCESS:
    os.chdir(tempfile.mkdtemp())

if __name__ == "__main__":
    after, calls = int(os.environ["STOP_AFTER"]), []

    def stop(row, state):
        """Stops the run in process 0: its decision counts."""
        calls.append(row["epoch"])
        return PROCESS == "0" and row["epoch"] == after

    with connect() as hosts:
        profile = (2, 4) if os.environ.get("OTHER_PROFILE") == PROCESS else None
        run = train_and_evaluate(CONFIG, run_dir=sys.argv[1], on_epoch=stop, loggers=[Calls()], profile=profile)
        print(json.dumps({"process": hosts.index, "calls": calls, "result": run.result}), flush=True)
