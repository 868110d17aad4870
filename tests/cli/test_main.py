import io
import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cnnjax
from cnnjax import load_run
from cnnjax.cli.console import Report
from cnnjax.cli.main import main
from cnnjax.data.datasets import load_dataset
from cnnjax.metrics import Scores

PROGRAMS = Path(__file__).parents[1] / "programs"


@pytest.fixture(scope="module")
def train(prepared_dir):
    """Returns a function that trains in a directory."""
    options = ["--dataset", "generated", "--data-dir", str(prepared_dir)]
    options += ["--model", "mlp", "--num-epochs", "3", "--batch-size", "32"]
    return lambda run_dir, *more: main(["train", *options, "--run-dir", str(run_dir), *more])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, train):
    run_dir = tmp_path_factory.mktemp("main") / "run"
    train(run_dir)
    return run_dir


def fails(capsys, *arguments):
    """Runs a command that must exit with status 2; returns its message on one line."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return re.sub(r"[│╭╮╰╯─\s]+", " ", captured.err + captured.out)


def test_eval_prints_the_score_of_every_image_of_a_split(run_dir, prepared_dir, capsys):
    result = json.loads((run_dir / "result.json").read_text())
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[result["best_epoch"] - 1])
    main(["eval", str(run_dir), "--data-dir", str(prepared_dir)])
    main(["eval", str(run_dir), "--data-dir", str(prepared_dir), "--split", "validation"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (12 + 12 + 1)  # For each split the classes, the confusion matrix and a sentence.
    for k in (0, 9):
        scores = result["classes"][k]
        percents = (f"{scores[name]:.2%}" for name in ("precision", "recall", "f1"))
        assert lines[1 + k].split() == [str(k), *scores["name"].split(), str(scores["count"]), *percents]
    assert [int(count) for count in lines[14].split()[-10:]] == result["confusion_matrix"][0]
    test, validation = lines[24], lines[49]
    assert test == (
        f"test accuracy {result['test_accuracy']:.2%}, loss {result['test_loss']:.4f}, on all 170 images ({run_dir})"
    )
    assert validation.startswith(
        f"validation accuracy {row['validation_accuracy']:.2%}, loss {row['validation_loss']:.4f}, on all 40 images"
    )


def test_predict_prints_the_most_probable_classes_of_each_file(run_dir, prepared_dir, tmp_path, capsys):
    dataset = load_dataset("generated", prepared_dir)
    assert sorted(dataset.class_names) != [*dataset.class_names]
    examples = dataset.load("test")
    paths = [tmp_path / f"{i}.png" for i in range(10)]
    for path, image in zip(paths, examples.image, strict=False):
        Image.fromarray(image[..., 0]).save(path)
    main(["predict", str(run_dir), *map(str, paths), "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    for line, path, label in zip(lines, paths, examples.label, strict=False):
        found = re.fullmatch(rf"{path}: ([\w/ -]+) (\d+\.\d)%, [\w/ -]+ (\d+\.\d)%", line)
        assert found is not None and found[1] == dataset.class_names[label]
        assert float(found[2]) > 50 > float(found[3])


def test_predict_hints_at_images_of_reversed_brightness(run_dir, prepared_dir, tmp_path, capsys):
    dataset = load_dataset("generated", prepared_dir)
    examples = dataset.load("test")
    Image.new("L", (28, 28), "white").save(tmp_path / "white.png")
    main(["predict", str(run_dir), str(tmp_path / "white.png")])
    assert "white.png is much brighter than the training images; try --invert" in capsys.readouterr().err
    Image.fromarray(255 - examples.image[1, ..., 0]).save(tmp_path / "negative.png")
    main(["predict", str(run_dir), str(tmp_path / "negative.png"), "--invert"])
    captured = capsys.readouterr()
    assert f"negative.png: {dataset.class_names[examples.label[1]]} " in captured.out
    assert captured.err == ""


def test_predict_reads_the_other_files_if_one_is_bad(run_dir, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["-a.png", "b b.png", "new\nline.png", os.fsdecode(b"\xff.png")]
    for name in names:
        Image.new("L", (28, 28), 60).save(name)
    os.mkfifo("fifo.png")
    Image.new("RGB", (28, 28)).save("bad.tiff")
    content = Path("bad.tiff").read_bytes()
    samples = struct.pack("<HHLH", 277, 3, 1, 3)  # Tag 277: samples per pixel. Pillow logs an error if they are many.
    assert content.count(samples) == 1
    Path("bad.tiff").write_bytes(content.replace(samples, struct.pack("<HHLH", 277, 3, 1, 99)))
    images = [names[1], "missing\n.png", "fifo.png", "bad.tiff", names[1], *names[2:], "--", names[0]]
    with pytest.raises(SystemExit) as stopped:
        main(["predict", str(run_dir), "--top", "1", *images])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    found = [line.rsplit(": ", 1) for line in captured.out.splitlines()]
    assert [name for name, _ in found] == ["b b.png", "b b.png", "new\\nline.png", "\\udcff.png", "-a.png"]
    assert len({classes for _, classes in found}) == 1
    missing, fifo, tiff = captured.err.splitlines()
    assert "got missing\\n.png (No such file or directory)" in missing
    assert "got fifo.png (Not a regular file)" in fifo
    assert "got bad.tiff (of an unknown format)" in tiff
    assert not caplog.messages


def test_predict_inverts_colors_and_not_the_alpha_channel(run_dir, tmp_path, capsys, monkeypatch):
    rng, seen = np.random.default_rng(0), []
    image = rng.integers(0, 256, (28, 28, 4), np.uint8)
    Image.fromarray(image).save(tmp_path / "rgba.png")

    class Alpha:
        facts = replace(load_run(run_dir).facts, image_shape=(28, 28, 4), mean=(99.0,) * 4, std=(1.0,) * 4)

        def predict(self, images):
            seen.append(images[0])
            return np.ones((1, 10)) / 10

    monkeypatch.setattr("cnnjax.runs.run.load_run", lambda *args: Alpha())
    main(["predict", str(run_dir), str(tmp_path / "rgba.png"), "--invert"])
    np.testing.assert_array_equal(seen[0], np.dstack([255 - image[..., :3], image[..., 3]]))


def test_data_describes_the_set(prepared_dir, capsys):
    main(["data", "generated", "--data-dir", str(prepared_dir)])
    out = capsys.readouterr().out
    sha256 = load_dataset("generated", prepared_dir).sha256
    assert f"  train: 430×28×28×1, SHA-256 {sha256['train']}\n  test: 170×28×28×1, SHA-256 {sha256['test']}\n" in out
    assert "  10 classes: T-shirt/top, Trouser," in out


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
    assert "`top` must be at least 1, got 0." in fails(capsys, "predict", str(run_dir), "a.png", "--top", "0")
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
        ("--checkpoint-seconds nan", "`checkpoint_seconds` must be at least 0, got nan."),
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


def test_help_does_not_import_jax_and_help_of_train_does_not_start_it():
    done = subprocess.run([sys.executable, PROGRAMS / "starts.py"], capture_output=True, text=True, check=True)
    before, after = done.stdout.split("jax is imported: False\n")
    assert "score it on the test set once" in re.sub(r"[│\s]+", " ", before)
    assert "--optim.learning-rate" in after
    assert after.endswith("\n3 devices\n")


def test_output_that_is_not_a_terminal_has_no_progress_bar(train, tmp_path, capsys):
    train(tmp_path / "run")
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert any(", 390 training and 40 validation images, on cpu, " in line for line in lines)
    assert any(line.startswith("epoch 3/3  loss ") for line in lines)
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
