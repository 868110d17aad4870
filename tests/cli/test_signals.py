import signal

import pytest

from cnnjax.cli.signals import Interrupted, stop_signals


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
