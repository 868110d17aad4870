import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cnnjax.process.signals import Interrupted, acknowledged_ctrl_c, stop_signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_held_until_the_run_can_stop(signum):
    before = signal.getsignal(signum)
    with stop_signals() as stop:
        with pytest.raises(Interrupted, match=f"Stopped by {signum.name}; nothing is lost"), stop.held():
            signal.raise_signal(signum)
            assert stop.signum == signum
    assert signal.getsignal(signum) is before


def test_only_a_second_ctrl_c_stops_immediately():
    """Make, timeout and shells send SIGTERM and SIGHUP to a process that has received them already."""
    with pytest.raises(Interrupted, match="SIGTERM"), stop_signals() as stop, stop.held():
        for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(signum)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.signum is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_finished_run_ignores_signals_also_one_that_was_held():
    with stop_signals() as outer:
        with stop_signals() as stop, stop.held():
            signal.raise_signal(signal.SIGTERM)
            stop.finished = True
        signal.raise_signal(signal.SIGINT)
        assert stop is outer
    with pytest.raises(Interrupted), stop_signals():  # Of another run.
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("signum", "is_said"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_ctrl_c_is_acknowledged_before_python_can_handle_it(signum, is_said, monkeypatch):
    written = []  # The signal that was handled before, and the text.

    class Recorded(io.StringIO):
        def write(self, text):
            written.append((stop.signum, text))
            return len(text)

    monkeypatch.setattr(sys, "stderr", Recorded())
    start = time.perf_counter()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
    iterations = round(100_000 / (time.perf_counter() - start))  # One second, in C, without looking at signals.
    with pytest.raises(Interrupted), stop_signals() as stop, acknowledged_ctrl_c(stop, seconds=0.1), stop.held():
        threading.Timer(0.1, os.kill, (os.getpid(), signum)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", iterations)
    assert [signum for signum, _ in written] == [None] * len(written)
    said = "Ctrl-C was received: stopping when the computation in progress has ended.\n" if is_said else ""
    assert "".join(text for _, text in written) == said


def test_a_quick_ctrl_c_is_not_acknowledged(capsys):
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with pytest.raises(Interrupted), stop_signals() as stop, acknowledged_ctrl_c(stop):
        signal.raise_signal(signal.SIGINT)
    assert capsys.readouterr().err == ""
    assert signal.set_wakeup_fd(before) == before


def test_a_ctrl_c_that_is_ignored_is_not_acknowledged(capsys):
    with stop_signals() as stop, acknowledged_ctrl_c(stop, seconds=0.0):
        stop.finished = True
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_ctrl_c_interrupts_what_is_released_inside_held():
    with pytest.raises(Interrupted), stop_signals() as stop, stop.held():
        signal.raise_signal(signal.SIGTERM)
        with stop.released():
            raise AssertionError("a signal that was held before has no effect")
    with pytest.raises(Interrupted), stop_signals() as stop, stop.held():
        with stop.released():
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("a signal has no effect")
    with pytest.raises(Interrupted), stop_signals() as stop, stop.held(), stop.released():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise RuntimeError("no server") from error
    with pytest.raises(RuntimeError), stop_signals() as stop, stop.held(), stop.released():
        raise RuntimeError("no server")


END = """
import atexit, contextlib, signal, time
from cnnjax.process.signals import Interrupted, stop_signals
atexit.register(lambda: (print("waiting", flush=True), time.sleep(60)))
with contextlib.suppress(Interrupted), stop_signals(process_ends=True) as stop:
    stop.exit_code = 75
    signal.raise_signal(signal.SIGTERM)
raise SystemExit(75)
"""


def test_ctrl_c_does_not_wait_for_what_libraries_do_at_the_end_of_a_process():
    with subprocess.Popen([sys.executable, "-c", END], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)  # Often a second one.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 75
