"""The job script for Slurm: its decisions, with stand-ins for Slurm's commands; and under a real Slurm (slow)."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import slurm

SCRIPT = Path(__file__).parents[1] / "experiments" / "launch" / "slurm.sbatch"
# It waits for SIGTERM, which comes as `scancel` tells, and ends with CODE.
SRUN = 'echo "srun $*" >> calls; for i in $(seq 100); do [ -e stop ] && break; sleep 0.05; done; exit "$CODE"'


@pytest.fixture
def submit(tmp_path):
    """Returns a function that starts the script as Slurm does."""
    programs = {
        "srun": SRUN,
        "scancel": 'echo "scancel $*" >> calls; touch stop',
        "scontrol": 'echo "scontrol $*" >> calls',
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def start(code, **more):
        environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CODE": str(code), **more}
        environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}
        (tmp_path / "calls").unlink(missing_ok=True)
        words = ["bash", str(SCRIPT), "mine", "--name", "two words"]
        return subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)

    return start


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (137, True), (2, False), (1, False)])
def test_the_job_returns_to_the_queue_if_resuming_helps(code, requeued, submit, tmp_path):
    (tmp_path / "stop").touch()
    with submit(code) as process:
        assert process.wait(timeout=20) == code
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].endswith("train mine --name two words --resume")
    assert calls[1:] == ["scontrol requeue 7"] * requeued


def test_sigterm_reaches_the_tasks_and_the_script_waits_for_them(submit, tmp_path):
    with submit(75) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while not (tmp_path / "calls").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 75
    assert (tmp_path / "calls").read_text().splitlines()[1:] == ["scancel --signal=TERM 7", "scontrol requeue 7"]


def test_a_fault_that_repeats_ends_the_job(submit, tmp_path):
    (tmp_path / "stop").touch()
    with submit(137, SLURM_RESTART_COUNT="3", MAX_RESTARTS="3") as process:
        assert process.wait(timeout=20) == 137
        assert "Code 137 after 3 restarts: giving up." in process.stdout.read()
    assert "scontrol" not in (tmp_path / "calls").read_text()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("apt-get") is None, reason="needs root, and Debian's packages")
def test_jobs_that_are_disturbed_end_with_the_bits_of_a_plain_run(monkeypatch):
    monkeypatch.setattr("sys.argv", ["slurm.py", "--only", "scontrol requeue", "SIGKILL of process 1"])
    slurm.main()
