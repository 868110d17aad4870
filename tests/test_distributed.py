"""Real processes of one training, started from the command line: the same bits, and what a signal or a kill leaves."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cnnjax.process.signals import REQUEUE
from cnnjax.runs.manifest import read_manifest

PROGRAM = Path(__file__).parent / "programs" / "distributed.py"
NUM_STEPS, STEPS_PER_EPOCH = 27, 9
HOST_TIMEOUT = 5  # Seconds.
SHARDED = ("--mesh", "model=2")


class Training:
    """Runs the experiment, always on the same number of devices."""

    def __init__(self, folder, num_devices):
        self.folder, self.num_devices = folder, num_devices
        self.environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "CNNJAX_ONEDNN": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # Compiles in half the time.
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, processes, run_dir, *options, **environment):
        command = [sys.executable, "-m", "cnnjax", "train", str(PROGRAM), "--processes", str(processes), "--run-dir"]
        command += [str(run_dir), "--no-report", "--host-timeout", str(HOST_TIMEOUT), *options]
        environment |= {"JAX_NUM_CPU_DEVICES": str(self.num_devices // processes)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.environment | environment, cwd=self.folder, **pipes)

    def run(self, processes, run_dir, *options, **environment):
        """Returns the exit code and what was written to standard error."""
        with self.start(processes, run_dir, *options, **environment) as launcher:
            try:
                _, err = launcher.communicate(timeout=240)
            finally:
                launcher.kill()  # Its processes then end, too.
        return launcher.returncode, err

    def finish(self, processes, run_dir, *options):
        """Trains to the end; returns the result."""
        code, err = self.run(processes, run_dir, *options)
        assert code == 0, err
        return result_of(run_dir)


def result_of(run_dir):
    """Returns the bits of a finished run."""
    return json.loads((run_dir / "result.json").read_text())["sha256"], (run_dir / "metrics.jsonl").read_bytes()


def complete_steps(run_dir):
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdecimal())


def resumed_from(run_dir):
    return [session["resumed_from"] for session in read_manifest(run_dir)["sessions"]]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Trains on two devices."""
    return Training(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def whole(two):
    """The bits of one process with two devices."""
    return two.finish(1, two.folder / "whole")


@pytest.mark.slow
def test_two_processes_with_divided_state_give_the_bits_of_one(two, tmp_path):
    in_one = two.finish(1, tmp_path / "one", *SHARDED, "--num-epochs", "1")
    in_two = two.finish(2, tmp_path / "two", *SHARDED, "--num-epochs", "1")
    assert in_one == in_two
    assert complete_steps(tmp_path / "one") == complete_steps(tmp_path / "two") == [STEPS_PER_EPOCH]


@pytest.mark.slow
def test_a_killed_process_is_named_and_another_number_resumes_to_the_same_bits(two, whole, tmp_path):
    code, err = two.run(2, tmp_path / "run", SIGNAL="1 SIGKILL step 14")
    assert code == REQUEUE, err
    assert "Process 1 was ended by SIGKILL." in err
    assert f"Process 1 (host {socket.gethostname()}) has not answered" in err
    assert complete_steps(tmp_path / "run") == [9]
    assert two.finish(1, tmp_path / "run", "--resume") == whole
    assert resumed_from(tmp_path / "run") == [None, 9]


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(two, whole, tmp_path):
    assert two.finish(2, tmp_path / "run", "--log", "calls") == whole
    assert {*(tmp_path / "run" / "calls").read_text().splitlines()} == {
        f"{name} of process 0" for name in ("start", "epoch", "finish")
    }


def test_a_signal_at_one_process_saves_one_checkpoint_from_which_one_process_resumes(two, whole, tmp_path):
    code, err = two.run(2, tmp_path / "run", "--host-timeout", "60", SIGNAL="1 SIGTERM step 12")  # On a busy machine.
    assert code == REQUEUE, err
    last = complete_steps(tmp_path / "run")[-1]
    assert 12 <= last < NUM_STEPS
    assert f"step {last}" in err
    assert two.finish(1, tmp_path / "run", "--resume") == whole
    assert resumed_from(tmp_path / "run") == [None, last]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment", ["save", "saved"])
def test_a_kill_during_a_save_leaves_the_previous_checkpoint(two, whole, tmp_path, victim, moment):
    start = time.monotonic()
    code, err = two.run(2, tmp_path / "run", SIGNAL=f"{victim} SIGKILL {moment} 2")
    assert code == REQUEUE, err
    assert time.monotonic() - start < 110
    assert f"Process {victim} (host {socket.gethostname()}) has " in err
    assert complete_steps(tmp_path / "run") == [9]
    assert [*(tmp_path / "run" / "checkpoints").glob("18.partial*")]
    assert two.finish(1, tmp_path / "run", "--resume") == whole
    assert resumed_from(tmp_path / "run") == [None, 9]
    assert not [*(tmp_path / "run" / "checkpoints").glob("*.partial*")]


@pytest.mark.slow
def test_ten_kills_in_a_row_lose_nothing(tmp_path):
    four, run_dir = Training(tmp_path, 4), tmp_path / "run"
    options = ("--mesh", "data=2,model=2", "--num-epochs", "12")
    whole = four.finish(1, tmp_path / "whole", *options)
    rng, moments, saved = random.Random(0), ["step", "save", "saved"], 0
    for i in range(10):
        processes = (4, 2)[i % 2]
        moment = moments[i % 3]
        # Each session gets to the end of an epoch, or dies before it.
        count = saved + rng.randint(1, 17) if moment == "step" else rng.randint(1, 2)
        victim = f"{rng.randrange(processes)} SIGKILL {moment} {count}"
        code, err = four.run(processes, run_dir, *options, "--resume", SIGNAL=victim)
        assert code == REQUEUE, (i, victim, err)
        assert f"Process {victim[0]} was ended by SIGKILL." in err
        steps = complete_steps(run_dir)
        # A kill costs no more than what came after the last save.
        reached = saved + STEPS_PER_EPOCH * (count - 1) if moment != "step" else count - 1
        assert max(steps, default=0) == reached // STEPS_PER_EPOCH * STEPS_PER_EPOCH, (i, victim, steps)
        saved = max(steps, default=0)
    assert four.finish(2, run_dir, *options, "--resume") == whole
    assert resumed_from(run_dir)[-1] == saved
    assert saved < 12 * STEPS_PER_EPOCH


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"OTHER_DATA": "1"}, "`data_dir` must be the same data in all processes, but `sha256.train` is "),
        (
            {"OTHER_CONFIG": "1"},
            "`config` must be the same in all processes, but `seed` is 0 in process 0, and 1 in ",
        ),
        # The same path, but each process has its own working directory.
        ({"NOT_SHARED": "1"}, "`run_dir` must be on a file system that all processes share, got /proc/self/cwd/run"),
    ],
)
def test_what_differs_in_one_process_ends_all_with_a_message(tmp_path, environment, message):
    training = Training(tmp_path, 2)
    code, err = training.run(2, "/proc/self/cwd/run", **environment)
    assert code == 2, err
    assert message in err
    assert "process 1 on " + socket.gethostname() in err
    assert "Terminating process" not in err  # jax says so, and much more, if process 0 ends first.
    assert not (tmp_path / "run").exists()  # Nothing was written.


def run_scripts(environment, run_dir):
    """Runs the program as a script in two processes; returns their exit codes and output."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment |= {"JAX_NUM_CPU_DEVICES": "1", "STOP_AFTER": "2", "JAX_NUM_PROCESSES": "2"}
    environment |= {"JAX_COORDINATOR_ADDRESS": address}
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, run_dir],
            env=environment | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        found = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *zip(*found, strict=True)


@pytest.mark.slow
def test_a_profile_in_one_process_is_an_error(two, tmp_path):
    """It would compute some steps twice, while the others compute them once."""
    codes, _, errs = run_scripts(two.environment | {"OTHER_PROFILE": "1"}, tmp_path / "run")
    assert 0 not in codes, errs
    assert "`profile` must be the same in all processes, got None in process 0, and [2, 4] in process 1 on " in errs[1]


@pytest.mark.slow
def test_the_decision_of_process_0_stops_all(two, tmp_path):
    codes, outs, errs = run_scripts(two.environment, tmp_path / "run")
    assert codes == [0, 0], errs
    found = [json.loads(out.splitlines()[-1]) for out in outs]
    assert [facts["calls"] for facts in found] == [[1, 2], [1, 2]]
    for facts in found:
        del facts["result"]["training_seconds"]  # Each process has its own clock.
    assert found[0]["result"] == found[1]["result"]
    assert found[0]["result"]["stopped_epoch"] == 2
    assert {line.rpartition(" ")[2] for line in (tmp_path / "run" / "calls").read_text().splitlines()} == {"0"}
