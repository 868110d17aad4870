import errno
import io
import sys
from contextlib import contextmanager

import pytest

from cnnjax import MLP, Config, train_and_evaluate
from cnnjax.cli.console import Report, track
from cnnjax.metrics import Scores


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
        report.step(1, Scores(loss=0.5, num_examples=2, values={"accuracy": 0.5}))
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
    result = train_and_evaluate(config, run_dir=tmp_path / "run", data_dir=prepared_dir).finished_result()
    assert result["num_test_examples"] == 170
    assert (sys.stdout, sys.stderr, out.text) == (out, None, "")


class Logger(Report):
    """A logger of the user."""

    def __init__(self):
        super().__init__(quiet=True)
        self.events = []

    def say(self, line):
        self.events.append("say")

    @contextmanager
    def progress(self, num_epochs, steps_per_epoch, start):
        self.events.append(("progress", num_epochs, steps_per_epoch, start))
        yield
        self.events.append("end")

    def step(self, step, means):
        self.events.append(("step", step, means.num_examples, *means.values))

    def epoch(self, row, num_epochs):
        self.events.append(("epoch", row["epoch"], row["best_epoch"], row["train_loss"], num_epochs))

    def result(self, result, run_dir):
        self.events.append(("result", result["test_accuracy"], run_dir))


def test_a_logger_of_the_user_receives_everything(prepared_dir, tmp_path):
    config, logger = Config(dataset="generated", model=MLP(), num_epochs=1, batch_size=195), Logger()
    run = train_and_evaluate(config, run_dir=tmp_path / "run", data_dir=prepared_dir, report=logger)
    assert [event for event in logger.events if event != "say"] == [
        ("progress", 1, 2, 0),
        ("step", 1, 195, "accuracy"),
        ("step", 2, 390, "accuracy"),
        ("epoch", 1, 1, run.history["train_loss"][0], 1),
        "end",
        ("result", run.test_accuracy, tmp_path / "run"),
    ]
    assert "say" in logger.events
