import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "programs" / "hosts.py"
TIMEOUT = 3  # Seconds.


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


class Processes:
    """Several processes of programs/hosts.py."""

    def __init__(self, scenario, count, *, host_timeout=TIMEOUT):
        self.address = f"localhost:{free_port()}"
        arguments = [[scenario, self.address, str(count), str(i), str(host_timeout)] for i in range(count)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.processes = [subprocess.Popen([sys.executable, PROGRAM, *words], **pipes) for words in arguments]

    def wait_until_ready(self):
        for process in self.processes:
            while (line := process.stdout.readline()) and "ready" not in line:
                pass
            assert line, process.stderr.read()

    def send(self, index, signum):
        os.kill(self.processes[index].pid, signum)

    def finish(self, *indices, timeout=60):
        """Returns exit code, facts and stderr of some processes."""
        results = []
        for i in indices or range(len(self.processes)):
            out, err = self.processes[i].communicate(timeout=timeout)
            facts = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
            results.append((self.processes[i].returncode, facts, err))
        return results


@contextmanager
def processes(*arguments, **options):
    group = Processes(*arguments, **options)
    try:
        yield group
    finally:
        for process in group.processes:
            process.kill()
            process.wait()


def last_lines(results):
    return [err.strip().splitlines()[-1] for _, _, err in results]


def test_all_processes_stop_and_save_at_the_same_steps():
    with processes("agree", 3) as group:
        group.wait_until_ready()
        time.sleep(1.5)
        group.send(2, signal.SIGTERM)
        results = group.finish()
    assert [code for code, _, _ in results] == [75, 75, 75], results
    facts = [facts[-1] for _, facts, _ in results]
    assert facts[0] == facts[1] == facts[2]
    assert facts[0]["stop"] == signal.SIGTERM
    assert facts[0]["saved"]


def test_share_and_barrier():
    with processes("share", 2) as group:
        results = group.finish()
    assert [code for code, _, _ in results] == [0, 0], results
    for i, (_, facts, _) in enumerate(results):
        assert facts[0]["value"] == {"from": 0, "list": [1, 2.5, None]}
        assert (facts[0]["count"], facts[0]["leads"], facts[0]["total"]) == (2, i == 0, 3)
        assert facts[0]["names"] == [socket.gethostname()] * 2


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["agree", "reduce"])
@pytest.mark.parametrize("attempt", range(3))
def test_processes_agree_each_time(scenario, attempt):
    with processes(scenario, 3) as group:
        group.wait_until_ready()
        time.sleep(0.5 + attempt / 3)
        group.send(attempt, signal.SIGTERM)
        group.send((attempt + 1) % 3, signal.SIGTERM)
        results = group.finish()
    assert [code for code, _, _ in results] == [75, 75, 75], results
    assert results[0][1][-1] == results[1][1][-1] == results[2][1][-1]


def test_a_lost_process_is_named():
    with processes("reduce", 3) as group:
        group.wait_until_ready()
        group.send(1, signal.SIGKILL)
        start = time.monotonic()
        results = group.finish(0, 2)
        assert time.monotonic() - start < 3 * TIMEOUT
    name = socket.gethostname()
    for code, _, err in results:
        assert (code, len(err.splitlines())) == (75, 1), err
        assert err.startswith(f"Process 1 (host {name}) has not answered for 3 s: stopping.")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["reduce", "wait"])
def test_a_lost_coordinator_is_named(scenario):
    with processes(scenario, 3) as group:
        group.wait_until_ready()
        group.send(0, signal.SIGKILL)
        start = time.monotonic()
        results = group.finish(1, 2)
        assert time.monotonic() - start < 3 * TIMEOUT
    assert [code for code, _, _ in results] == [75, 75], results
    for line in last_lines(results):
        assert line.startswith(f"Process 0 (host {socket.gethostname()}) has ended or cannot be reached: stopping.")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["reduce", "agree"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_stopped_process_is_lost_and_ends_when_it_continues(scenario, index):
    with processes(scenario, 3) as group:
        group.wait_until_ready()
        group.send(index, signal.SIGSTOP)
        results = group.finish(*{0, 1, 2} - {index})
        assert [code for code, _, _ in results] == [75, 75], results
        for line in last_lines(results):
            assert line.startswith(f"Process {index} (host {socket.gethostname()}) has not answered for 3 s")
        group.send(index, signal.SIGCONT)
        ((code, _, err),) = group.finish(index)
    assert code == 75, err


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "index"), [("share_error", 0), ("user_error", 1)])
def test_an_error_of_one_process_ends_all(scenario, index):
    with processes(scenario, 3) as group:
        results = group.finish()
    assert [code for code, _, _ in results] == [2, 2, 2], results
    text = "`batch_size` must be even, got 3."
    for i, (_, _, err) in enumerate(results):
        if i == index:
            assert f"UserError: {text}" in err.splitlines()
        else:
            assert err == f"Process {index} (host {socket.gethostname()}) ended: {text}\n"


@pytest.mark.slow
def test_a_bug_in_one_process_ends_all():
    with processes("crash", 2) as group:
        results = group.finish()
    assert [code for code, _, _ in results] == [1, 1], results
    assert "ZeroDivisionError: a bug" in results[0][2]
    assert results[1][2].startswith(f"Process 0 (host {socket.gethostname()}) ended: ")
    assert "ZeroDivisionError: a bug" in results[1][2]


@pytest.mark.slow
def test_a_process_that_compiles_for_long_is_not_lost():
    with processes("compile", 2) as group:
        results = group.finish()
    assert [code for code, _, _ in results] == [0, 0], results
    assert results[1][1][-1]["seconds"] > 3 * TIMEOUT


@pytest.mark.slow
def test_a_program_may_have_connected_jax_itself():
    with processes("library", 2) as group:
        results = group.finish()
    assert [code for code, _, _ in results] == [0, 0], results
    assert results[0][1][0] == {"count": 2, "names": [socket.gethostname()] * 2, "same": True}
