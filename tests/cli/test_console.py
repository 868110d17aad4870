import errno
import io
import sys

import pytest

from cnnjax import MLP, Config, train_and_evaluate
from cnnjax.cli.console import Report, track
from cnnjax.step import Scores


class Tee:
    """A stream of a logging library, without the other methods of a file."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


class ClosedTerminal(io.StringIO):
    def isatty(self):
        return True

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


def show_progress(report):
    with report.progress(num_epochs=1, steps_per_epoch=2, start=0):
        report.step(1, Scores(loss=0.5, accuracy=0.5, num_examples=2))
        report.say("a line")
    assert list(track([1, 2], "", 2)) == [1, 2]


def test_lost_output_is_reported_once_and_the_run_continues(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        report = Report()
        for seed in (0, 1):
            report.with_prefix(f"seed {seed}: ").say("a line")
        show_progress(report)
        expected = "Standard output cannot be written (No space left on device): the run continues without it.\n"
        assert capsys.readouterr().err == expected
        with pytest.raises(OSError, match="No space"):
            full.close()


def test_a_closed_terminal_does_not_stop_the_run(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, ClosedTerminal())
    show_progress(Report())


@pytest.mark.parametrize("make", [Tee, lambda: None])
def test_streams_may_lack_methods_or_be_missing(make, monkeypatch):
    out, err = make(), make()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    show_progress(Report())
    if out is not None:
        assert (out.text, err.text) == ("a line\n", "")


def test_the_library_leaves_the_streams_alone(prepared_dir, tmp_path, monkeypatch):
    config = Config(dataset="generated", model=MLP(), num_epochs=1, batch_size=195)
    out = Tee()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", None)
    result = train_and_evaluate(config, run_dir=tmp_path / "run", data_dir=prepared_dir)
    assert result["num_test_examples"] == 170
    assert (sys.stdout, sys.stderr, out.text) == (out, None, "")
