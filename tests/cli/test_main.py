import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tyro

import cnnjax
from cnnjax.cli.help_text import make_registry
from cnnjax.cli.main import main
from cnnjax.data.datasets import load_dataset
from cnnjax.metrics import Scores
from cnnjax.process.console import Report

PROGRAMS = Path(__file__).parents[1] / "programs"


def fails(capsys, *arguments):
    """Runs a command that must exit with status 2; returns its message on one line."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return re.sub(r"[│╭╮╰╯─\s]+", " ", captured.err + captured.out)


def test_data_describes_the_set(prepared_dir, capsys):
    main(["data", "generated", "--data-dir", str(prepared_dir)])
    out = capsys.readouterr().out
    sha256 = load_dataset("generated", prepared_dir).sha256
    assert f"  train: 430×28×28×1, SHA-256 {sha256['train']}\n  test: 170×28×28×1, SHA-256 {sha256['test']}\n" in out
    assert "  10 classes: T-shirt/top, Trouser," in out


def test_data_counts_a_split_whole_if_the_test_set_is_a_part_of_it(prepared_dir, tmp_path, capsys):
    data_dir = shutil.copytree(prepared_dir, tmp_path / "tfds", ignore=shutil.ignore_patterns("cnnjax_*"))
    info = data_dir / "generated" / "3.0.1" / "dataset_info.json"
    content = json.loads(info.read_text())
    content["splits"] = [split for split in content["splits"] if split["name"] == "train"]
    info.write_text(json.dumps(content))
    main(["data", "generated", "--data-dir", str(data_dir)])
    assert "  train: 430×28×28×1, SHA-256 " in capsys.readouterr().out


def test_unknown_names_list_the_nearest(prepared_dir, capsys):
    where = ("--data-dir", str(prepared_dir))
    assert "Did you mean cifar10 or cifar100" in fails(capsys, "train", "--dataset", "cifr10", *where)
    assert "must be a known name, got 'generatd'. Did you mean generated" in fails(capsys, "data", "generatd", *where)
    assert "Perhaps you meant" in fails(capsys, "eval", "run", "--splitt", "test")


def test_mistakes_of_the_user_are_messages(run_dir, train, tmp_path, capsys):
    (tmp_path / "no.png").write_text("no image")
    assert "`image` must be an image file" in fails(capsys, "predict", str(run_dir), str(tmp_path / "no.png"))
    assert "`run` must be the directory of a run" in fails(capsys, "eval", str(tmp_path))
    assert "`images` must be at least one file, got none." in fails(capsys, "predict", str(run_dir))
    assert "`top` must be at least 0, got -1." in fails(capsys, "predict", str(run_dir), "a.png", "--top=-1")
    with pytest.raises(SystemExit) as stopped:
        train(run_dir)
    assert stopped.value.code == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num-epochs 0", "`num_epochs` must be at least 1, got 0."),
        ("--optim.learning-rate -1", "`optim.learning_rate` must be above 0 and finite, got -1.0."),
        ("--loss.label-smoothing 1", "`loss.label_smoothing` must be at least 0 and below 1, got 1.0."),
        ("--model speednet --model.widths 1", "`model.widths` must be 3 numbers of at least 1, got (1,)."),
        ("--augment mixup --augment.alpha -1", "`augment.alpha` must be "),
        ("--checkpoint-seconds nan", "`checkpoint_seconds` must be a number of at least 0, got nan."),
        ("--optim sgd --seed 1 --optim=adam", "`--optim` must be given once, got 2 times."),
        (
            "--model",
            "`model` must be a known name, got ''. Valid names: cnn, efficientnetlite0, mlp, resnet18, ",
        ),
        ("--optim --seed 1", "`optim` must be a known name, got '--seed'. Valid names: adam, muon, sgd."),
    ],
)
def test_a_refused_value_is_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", *options.split()])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message) and captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(28, "No space left on device", "metrics.jsonl"), 1, "metrics.jsonl cannot be used: No space left on"),
        (RuntimeError("can't start new thread"), 1, "The process ran out of memory or threads (RuntimeError"),
        (MemoryError(), 1, "The process ran out of memory or threads (MemoryError()). Raise ulimit -v or -u."),
        (KeyboardInterrupt(), 130, "Stopped at once."),
    ],
)
def test_errors_of_the_system_are_messages(error, status, message, monkeypatch, capsys):
    def load_dataset(*args):
        raise error

    monkeypatch.setattr("cnnjax.data.datasets.load_dataset", load_dataset)
    with pytest.raises(SystemExit) as stopped:
        main(["data", "cifar10"])
    assert stopped.value.code == status
    assert message in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"cnnjax {version('cnnjax')}\n"


def test_help_does_not_import_jax_and_help_of_train_does_not_start_it():
    done = subprocess.run([sys.executable, PROGRAMS / "starts.py"], capture_output=True, text=True, check=True)
    before, after = done.stdout.split("jax is imported: False\n")
    assert "score it on the test set once" in re.sub(r"[│\s]+", " ", before)
    assert "--optim.learning-rate" in after
    assert after.endswith("\n3 devices\n")


@pytest.mark.parametrize(
    "command", ["train", "lr-find", "eval", "export", "data", "predict", "report", "reproduce", "summary mnist_mlp"]
)
@pytest.mark.parametrize("width", [60, 80, 93])  # Some texts fill their last line at 60 and 93.
def test_help_fills_the_width_of_the_terminal(command, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert "\n\n\n" not in out
    assert not re.search(r"^[│ ] +[│ ]?\n[│ ] --", out, re.MULTILINE)  # A blank row before the next option.
    rows = [re.fullmatch(r"[│ ]( +)(.*?) *│?", line) for line in out.splitlines()]
    for row, following in pairwise(rows):
        if row is None or following is None or not (len(row[1]) == len(following[1]) > 10):
            continue
        word = following[2].partition(" ")[0]
        assert len(row[1]) + len(row[2]) + 1 + len(word) > width - 3 or not row[2], (row[2], following[2])


def test_help_introduces_each_command_in_one_paragraph(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    main(["--help"])
    out = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "• predict Print the most probable classes of image files of any size" in out
    assert "Files that cannot be read" not in out
    main(["predict", "--help"])
    assert "Files that cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("predict", ["--tta {none,flip,flip_translate,uncertain} ", "--experiment STR "]),
        ("eval", ["--ensemble [PATH [PATH ...]] "]),
        ("train", ["--batch-size INT ", "--run-dir PATH ", "--num-epochs INT "]),
        ("summary mnist_mlp", ["--batch-size {None}|INT "]),  # The experiment has a value.
    ],
)
def test_help_mentions_none_only_in_place_of_a_value(command, options, capsys):
    main([*command.split(), "--help"])
    out = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert [option for option in options if option not in out] == []
    assert "(default: )" not in out  # Of --ensemble and --log.
    assert out.count("(default: None)") == ("--image-size" in out)  # Its text explains None.


@dataclass
class Listed:
    mode: int | None = None
    """Modes of
    the list:

    - first: one
      of two
    - second"""
    none: int | None = None


@dataclass
class WithArray:
    mean: np.ndarray = field(default_factory=lambda: np.ones(3))


def test_a_field_may_hold_an_array():
    assert (
        tyro.cli(WithArray, default=WithArray(np.zeros(3)), args=[], registry=make_registry()).mean.tolist() == [0] * 3
    )


def test_help_keeps_lists_and_shows_a_default_without_a_docstring(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        tyro.cli(Listed, args=["--help"], registry=make_registry())
    rows = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    start = next(i for i, row in enumerate(rows) if row.endswith("Modes of the list:"))
    assert rows[start + 1 : start + 4] == ["", "- first: one of two", "- second"]
    assert re.fullmatch(r"--none INT +\(default: None\)", rows[start + 4])


def test_output_that_is_not_a_terminal_has_no_progress_bar(train, tmp_path, capsys):
    train(tmp_path / "run")
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert any(", 390 training and 40 validation images, on cpu, " in line for line in lines)
    assert lines[-26].startswith("epoch 3/3  loss ")  # Then the classes, the confusion matrix and a sentence.
    assert re.match(r"Test accuracy \d+\.\d\d% \(loss .*\) on all 170 test images", lines[-1])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_progress_bar_above_the_lines(train, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    train(tmp_path / "run")
    shown = terminal.getvalue()
    assert re.search(r"epoch 3/3.*/39.*loss \d\.\d{4}  accuracy \d+\.\d\d%.*images/s", shown)
    assert "Test accuracy " in shown.splitlines()[-1]


def test_one_of_several_runs_has_a_prefix_and_no_progress_bar(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    report = Report().with_prefix("seed 1: ")
    with report.progress(num_epochs=1, steps_per_epoch=2, start=0):
        report.step(1, Scores(loss=0.5, num_examples=2, values={"accuracy": 0.5}))
        report.say("a line")
    assert terminal.getvalue() == ""
    assert capsys.readouterr().out == "seed 1: a line\n"


def test_the_public_interface_is_what_the_readme_lists():
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    section = readme.split("## The public interface\n")[1].split("\n## ")[0]
    listed = [
        name for row in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    ]
    assert sorted(listed) == sorted(cnnjax.__all__)
    assert all(getattr(cnnjax, name).__doc__ for name in listed)
    namespace: dict = {}
    exec("from cnnjax import *", namespace)
    assert sorted(namespace.keys() - {"__builtins__"}) == sorted(listed)
    with pytest.raises(AttributeError, match="module 'cnnjax' has no attribute 'nothing'"):
        getattr(cnnjax, "nothing")  # noqa: B009
