"""Trains under a real Slurm with two nodes on this machine, disturbs the job, and compares the end with a plain run.

    make test-slurm    # some minutes; as root, on Debian, whose packages it installs

Each job is `sbatch experiments/launch/slurm.sbatch` with two nodes. In the middle it is requeued, or preempted by a job
of higher priority, or warned as before its time limit, or one of its processes is killed, or everything on one node. It
must return by itself, and its digests (parameters, optimizer state, best checkpoint, metrics.jsonl) must be those of
one process with two devices that nothing disturbs. Prints a table; exits with 1 at the first difference.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from generated import make_raw
from slurm_cluster import Cluster, install
from stress import outcome

from cnnjax.data.named import NAMED_SETS
from cnnjax.data.tfds_format import write_tfds

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "launch" / "slurm.sbatch"
NUM_EPOCHS = 24
OPTIONS = ["--dataset", "generated", "--model", "mlp", "--model.dense-dropout", "0.2", "--augment.flip", "random"]
OPTIONS += ["--num-epochs", str(NUM_EPOCHS), "--batch-size", "64", "--mesh", "data=2", "--host-timeout", "10"]
OPTIONS += ["--no-report"]
LIMIT_SECONDS = 240


def requeue(cluster, job):
    cluster.command("scontrol", "requeue", job)


def preempt(cluster, job):
    options = ["--partition", "urgent", "--nodes", str(len(cluster.nodes)), "--output", "/dev/null"]
    cluster.command("sbatch", *options, "--wrap", "true")


def warn(cluster, job):
    """Sends what `#SBATCH --signal=B:TERM@120` sends before the time limit."""
    cluster.command("scancel", "--batch", "--signal=TERM", job)


def kill_task(cluster, job):
    for pid in cluster.tasks(job, cluster.nodes[1]):
        os.kill(pid, signal.SIGKILL)


def kill_node(cluster, job):
    cluster.kill_node(job, cluster.nodes[1])
    cluster.wait_for(lambda: "down" in " ".join(cluster.states()), LIMIT_SECONDS, "Slurm notices that a node is down")
    cluster.start_node(cluster.nodes[1])


DISTURBANCES = {
    "nothing": None,
    "scontrol requeue": requeue,
    "preemption": preempt,
    "SIGTERM before the time limit": warn,
    "SIGKILL of process 1": kill_task,
    "SIGKILL of all on node 2": kill_node,
}


class Ended(NamedTuple):
    """A job that ended well.

    Attributes:
      restarts: how often it was started again.
      disturbed: the step of the last epoch before the disturbance.
      resumed: the steps at which it resumed.
      pause: seconds from the disturbance until it has resumed.
      seconds: of all, from the submission.
    """

    restarts: int
    disturbed: int
    resumed: list[int]
    pause: float
    seconds: float


def prepare(folder):
    """Writes a small data set; returns the options of a training on it."""
    raw = make_raw((28, 28, 1), num_train=430, num_test=170)
    write_tfds(NAMED_SETS["fashion_mnist"], raw, folder, say=lambda line: None)
    (folder / "fashion_mnist").rename(folder / "generated")
    return [*OPTIONS, "--data-dir", str(folder)]


def environment(folder):
    """Returns the variables of a training: this interpreter and checkout, one device per process."""
    program = folder / "cnnjax"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m cnnjax "$@"\n')
    program.chmod(0o755)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # make's own variables would change the command that resumes.
    plain = {name: value for name, value in os.environ.items() if name not in ("CNNJAX_MAKE", "CNNJAX_EXIT_CODE")}
    ours = {"CNNJAX": str(program), "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache")}
    return {**plain, **ours}


def train_alone(options, run_dir, variables):
    """Trains in one process with two devices, which sums like several; returns its outcome."""
    command = [variables["CNNJAX"], "train", *options, "--num-processes", "1", "--run-dir", str(run_dir)]
    done = subprocess.run(
        command, env={**variables, "JAX_NUM_CPU_DEVICES": "2"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return outcome(run_dir)


def train_under_slurm(cluster, options, run_dir, disturb):
    """Submits a job and disturbs it in the middle; returns how it ended.

    Raises:
      AssertionError: the job failed; the message contains its output.
      TimeoutError: it has not ended in time.
    """
    begin = time.monotonic()
    folder = run_dir.parent
    metrics, output = run_dir / "metrics.jsonl", folder / f"{run_dir.name}.out"
    job = cluster.submit(
        SCRIPT, *options, "--run-dir", str(run_dir), options=["--output", str(output), "--time", "30"], cwd=folder
    )

    def state():
        return cluster.job(job)["JobState"]

    def steps():
        return [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.exists() else []

    def resumed():
        return [int(step) for step in re.findall(r"resuming at step ([\d,]+)", output.read_text().replace(",", ""))]

    def is_in_the_middle():
        assert state() not in ("FAILED", "COMPLETED"), output.read_text()
        return len(steps()) > NUM_EPOCHS // 8

    step, pause = 0, 0.0
    if disturb is not None:
        cluster.wait_for(is_in_the_middle, LIMIT_SECONDS, f"an eighth of job {job}")
        step, moment = steps()[-1], time.monotonic()
        disturb(cluster, job)
        cluster.wait_for(lambda: resumed() or state() == "FAILED", LIMIT_SECONDS, f"job {job} resumes")
        pause = time.monotonic() - moment
    cluster.wait_for(lambda: state() in ("FAILED", "COMPLETED"), LIMIT_SECONDS, f"the end of job {job}")
    assert state() == "COMPLETED", output.read_text()
    return Ended(int(cluster.job(job)["Restarts"]), step, resumed(), pause, time.monotonic() - begin)


def check(ended, run_dir, expected, disturb):
    """Checks that a job was disturbed, and that its end has the right bits."""
    actual = outcome(run_dir)
    wrong = {name: (actual[name], value) for name, value in expected.items() if actual[name] != value}
    assert not wrong, (run_dir, wrong)
    assert ended.restarts == len(ended.resumed) == (disturb is not None), ended


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=DISTURBANCES, nargs="+", default=list(DISTURBANCES))
    args = parser.parse_args()
    install()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options, variables = prepare(folder / "data"), environment(folder)
        expected = train_alone(options, folder / "alone", variables)
        with Cluster(folder / "slurm", variables, kill_wait=10, node_timeout=20) as cluster:
            for i, disturbance in enumerate(args.only):
                disturb, run_dir = DISTURBANCES[disturbance], folder / f"run-{i}"
                ended = train_under_slurm(cluster, options, run_dir, disturb)
                check(ended, run_dir, expected, disturb)
                middle = f"{ended.disturbed} | {ended.resumed[0]} | {ended.pause:.0f}" if disturb else "– | – | –"
                rows.append(f"| {disturbance} | {middle} | {ended.seconds:.0f} | the same |")
                print(rows[-1], flush=True)
    print("\n| disturbed by | after step | resumed at step | seconds until then | seconds of all | bits |")
    print("| --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
