import json
import os
import re
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
