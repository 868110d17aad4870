import errno
import io
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from cnnjax import MLP, Config, train_and_evaluate
from cnnjax.metrics import Scores
from cnnjax.process.console import Report, track


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


RESULT = {
    "test_accuracy": 0.9,
    "test_balanced_accuracy": 0.75,
    "test_loss": 0.25,
    "num_test_examples": 1000,
    "best_validation_accuracy": 0.875,
    "best_validation_balanced_accuracy": 0.625,
    "best_epoch": 3,
    "num_epochs": 4,
    "stopped_epoch": None,
    "seed": 7,
    "num_params": 1234,
    "training_seconds": 9.6,
    "device": "cpu, 2 cores",
    "test_macro_precision": 0.5,
    "test_macro_recall": 0.75,
    "test_macro_f1": 0.6,
    "classes": [
        {"name": "cat", "count": 600, "precision": 0.5, "recall": 0.75, "f1": 0.6},
        {"name": "dog", "count": 400, "precision": 0.5, "recall": 0.75, "f1": 0.6},
    ],
    "confusion_matrix": [[450, 150], [100, 300]],
}
SENTENCE = (
    "Test accuracy 90.00% (loss 0.2500) on all 1,000 test images, with the parameters of epoch 3 of 4 (validation "
    "accuracy 87.50%); seed 7, 1,234 parameters, 10 s of training on cpu, 2 cores. All of it is in runs/x."
)


def test_the_result_is_a_table_and_a_sentence_with_balanced_accuracy_if_the_classes_are_uneven(capsys):
    Report().result(RESULT, Path("runs/x"))
    lines = capsys.readouterr().out.splitlines()
    assert (len(lines), lines[2], lines[-1]) == (9, "1      dog     400     50.00%  75.00%  60.00%", SENTENCE)
    cat, dog = RESULT["classes"]
    uneven = {**RESULT, "classes": [cat, {**dog, "count": 399}]}
    sentence = SENTENCE.replace("90.00%", "90.00%, balanced accuracy 75.00%")
    sentence = sentence.replace("87.50%", "87.50%, balanced accuracy 62.50%")
    Report().result(uneven, Path("runs/x"))
    assert capsys.readouterr().out.splitlines() == [
        "class       images  precision  recall      F1",
        "0      cat     600     50.00%  75.00%  60.00%",
        "1      dog     399     50.00%  75.00%  60.00%",
        "mean                   50.00%  75.00%  60.00%",
        "Images of each class (rows), by predicted class (columns):",
        "class         0    1",
        "0      cat  450  150",
        "1      dog  100  300",
        sentence,
    ]
    Report().with_prefix("seed 7: ").result(uneven, Path("runs/x"))
    assert capsys.readouterr().out == f"seed 7: {sentence}\n"  # No table per seed.
    Report().result({**RESULT, "best_validation_accuracy": None}, Path("runs/x"))
    assert "of 4 (no validation); seed 7" in capsys.readouterr().out


def test_an_epoch_has_a_balanced_accuracy_if_it_differs_by_a_point(capsys):
    row = {"epoch": 1, "train_loss": 0.5, "images_per_second": 0.25, "seconds": 1.2, "validation_loss": -1e-9}
    for balanced, expected in ((0.759, ""), (0.74, "  balanced accuracy 74.00%")):
        Report().epoch({**row, "validation_accuracy": 0.75, "validation_balanced_accuracy": balanced}, 12)
        line = f"epoch  1/12  loss 0.5000  validation loss 0.0000  accuracy 75.00%{expected}  0.25 images/s  1 s\n"
        assert capsys.readouterr().out == line


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
