"""Real processes that `launch` starts: what they get, and how all of them end."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from generated import status

from cnnjax.cli.launch import exit_code, share
from cnnjax.hosts.watch import exit_now

PROGRAM = Path(__file__).parents[1] / "programs" / "launched.py"


def start(*words, **environment):
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def run(*words, **environment):
    with start(*words, **environment) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def pids_of(text):
    return [int(pid) for pid in re.findall(r"pid (\d+)", text)]


def runs(pid):
    """Returns whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ended(pids, seconds=10):
    """Waits until the processes have ended; returns whether they have."""
    end = time.monotonic() + seconds
    while any(map(runs, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(runs, pids))


def wait_until_started(process, count):
    """Reads the first line of each process; returns their ids."""
    pids = [pids_of(process.stdout.readline())[0]]
    while len(pids) < count:
        pids += pids_of(process.stderr.readline())
    return pids


def test_processes_get_their_place_and_cores_and_the_others_write_with_a_prefix():
    code, out, err = run("write=lead,warn=error of 0", "write=hidden,warn=wrong")
    assert code == 0
    first, *rest = out.splitlines()
    line = r"{} of 2 at (127\.0\.0\.1:\d+) on (\[.*\]), pid (\d+)"
    lead = re.fullmatch(line.format(0), first)
    assert rest == ["lead"]
    errors = err.splitlines()
    other = re.fullmatch(r"\[1\] " + line.format(1), next(error for error in errors if "pid" in error))
    assert lead is not None and other is not None
    assert lead[1] == other[1]
    assert {"error of 0", "[1] hidden", "[1] wrong"} < {*errors}
    cores = sorted(os.sched_getaffinity(0))
    assert [eval(lead[2]), eval(other[2])] == [share(cores, 0, 2), share(cores, 1, 2)]


def test_cores_are_divided_evenly_or_shared():
    assert [share([2, 3, 5, 7, 8], i, 2) for i in range(2)] == [[2, 3], [5, 7, 8]]
    assert [share([4, 6], i, 4) for i in range(4)] == [[4], [6], [4], [6]]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((0, 0), 0),
        ((75, 75), 75),
        ((-signal.SIGKILL, 75, 75), 75),  # The others noticed that it died.
        ((75, 2), 2),  # What the user must fix goes first.
        ((1, 2), 1),
        ((-signal.SIGKILL, -signal.SIGKILL), 137),
        ((0, -signal.SIGSEGV), 139),
        ((130, 75), 130),
    ],
)
def test_the_exit_code_is_75_only_if_resuming_helps(codes, expected):
    assert exit_code(codes) == expected


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_all_processes_once(signum):
    with start("wait", "wait") as process:
        pids = wait_until_started(process, 2)
        process.send_signal(signum)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert out == f"0 stops by {signum.name}\n"
    assert err == f"[1] 1 stops by {signum.name}\n"
    assert ended(pids)


def test_the_others_may_end_by_themselves_if_one_is_killed():
    code, out, err = run("wait", "kill=SIGKILL", "exit=75", GRACE="0.5")
    assert code == 75
    assert "Process 1 was ended by SIGKILL.\n" in err
    assert err.endswith("Process 0 still runs, and is killed.\n")
    assert ended(pids_of(out + err))


def test_nothing_is_left_if_the_launcher_is_killed():
    with start("wait", "deaf,wait") as process:
        pids = wait_until_started(process, 2)
        process.kill()
        out = process.stdout.readline() if process.stdout else ""
        assert out == "0 stops by SIGTERM\n"
        assert ended(pids)  # Process 1 ignores SIGTERM: it is killed after a second.


def test_what_cannot_be_launched(monkeypatch, capsys):
    for number in (0, 2**31):
        assert status("train", "--processes", str(number)) == 2
        assert re.search(rf"`processes` must be from 1 to \d+ on this machine, got {number}\.", capsys.readouterr().err)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "node1:1234")
    assert status("train", "--processes", "2") == 2
    assert "must be left out if JAX_COORDINATOR_ADDRESS is set, got node1:1234. Unset it." in capsys.readouterr().err


def test_the_exit_code_is_written_for_scripts_that_start_make(tmp_path, monkeypatch, capsys):
    file = tmp_path / "code"
    monkeypatch.setenv("CNNJAX_EXIT_CODE", str(file))
    assert status("train", "--help") == 0
    assert file.read_text() == "0\n"
    assert status("train", "--processes", "0") == 2
    assert file.read_text() == "2\n"
    codes = []
    monkeypatch.setattr("cnnjax.hosts.watch.os._exit", codes.append)
    exit_now("Process 1 (host b) has ended.", 75)
    assert codes == [75] and file.read_text() == "75\n"
    capsys.readouterr()
    monkeypatch.setenv("CNNJAX_EXIT_CODE", str(tmp_path))
    assert status("train", "--processes", "0") == 2
    expected = f"`CNNJAX_EXIT_CODE` must name a file that can be written, got {tmp_path}: Is a directory.\n"
    assert capsys.readouterr().err.endswith(expected)
