"""The lesson: its code runs, its commands do what it says, and its figures and numbers are of the same runs."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from generated import make_raw

from cnnjax import load_run
from cnnjax.cli.experiment import load_experiment
from cnnjax.cli.main import main
from cnnjax.data.named import NAMED_SETS
from cnnjax.data.tfds_format import write_tfds

FOLDER = Path(__file__).parents[1] / "experiments" / "lesson"
TEXT = (FOLDER / "lesson.md").read_text()
FILES = re.findall(r"[Ss]ave (?:this|it) as `(.*?)`.*?```python\n(.*?)```", TEXT, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", TEXT, re.DOTALL)  # (code, output)
OUTPUTS = re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.findall(r"^\.venv/bin/cnnjax (.*)$", TEXT.replace("\\\n", ""), re.MULTILINE)
COMMANDS = [shlex.split(command, comments=True) for command in COMMANDS]
TRAIN = {  # By run.
    command[command.index("--name") + 1 if "--name" in command else 1]: command
    for command in COMMANDS
    if command[0] == "train"
}
FIGURES = sorted(FOLDER.glob("*/*.svg"))


@pytest.fixture
def learner(tmp_path, monkeypatch):
    """Makes a directory with the files that the learner has written the working directory."""
    for path, code in FILES:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(code)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def generated_sets(tmp_path, monkeypatch):
    """Generated images take the place of MNIST and CIFAR-10."""
    for name, shape in (("mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))):
        write_tfds(NAMED_SETS[name], make_raw(shape, num_train=200, num_test=50), tmp_path / "tfds", lambda line: None)
        monkeypatch.setitem(NAMED_SETS, name, replace(NAMED_SETS[name], sha256={}))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))


def output_of(run):
    """Returns what the lesson shows of a training."""
    (output,) = (text for text in OUTPUTS if f"All of it is in runs/{run}-seed0." in text)
    return output


def run_python(capsys):
    """Yields the output of each Python block, and what the lesson shows of it."""
    scope = {"__name__": "lesson"}
    for code, output in PYTHON:
        exec(code, scope)
        yield capsys.readouterr().out, output


def accuracies(figure):
    """Reads the accuracy in training and in validation from a drawing, in percent: its lines, and the axis."""
    svg = figure.read_text()
    ticks = re.findall(r'text-anchor="end" transform="translate\(-\d+,([\d.]+)\)"[^>]*>([\d.]+)%<', svg)
    y, percent = np.array(ticks, float).T
    slope, offset = np.polyfit(y - 4, percent, 1)  # A label stands 4 pixels below its tick.
    lines = re.findall(r'mark-line.*?<path d="M(.*?)"', svg)[-2:]
    return [[slope * float(point.split(",")[1]) + offset for point in line.split("L")] for line in lines]


def test_its_code_runs(generated_sets, capsys):
    outputs = [*run_python(capsys)]
    assert [out for out, shown in outputs[3:] if shown] == [shown for _, shown in outputs[3:] if shown]
    assert outputs[2][0].splitlines()[0] == outputs[2][1].splitlines()[0]  # The rest depends on the images.


def test_its_commands_do_what_it_says(learner, generated_sets, quick_compilation, capsys):
    for command in COMMANDS:
        match command[0]:
            case "summary":
                main(command)
                assert capsys.readouterr().out in OUTPUTS
            case "train":
                load_experiment(command[1])
    name = "my_cnn_dropout"
    main([*TRAIN[name], "--num-epochs", "2", "--batch-size", "45", "--no-report"])
    (report,) = (command for command in COMMANDS if command[:2] == ["report", f"runs/{name}-seed0"])
    main(report)
    drawn = Path(report[report.index("--figures") + 1])
    assert {x.name for x in drawn.iterdir()} >= {x.name for x in FIGURES if x.parent.name == name}
    config = load_experiment("my_cnn").config
    history = load_run(f"runs/{name}-seed0", config).history
    expected = [100 * history[part] for part in ("train_accuracy", "validation_accuracy")]
    np.testing.assert_allclose(accuracies(drawn / "learning_curves.svg"), expected, atol=0.1)


@pytest.mark.parametrize("run", [x.parent.name for x in FIGURES if x.name == "learning_curves.svg"])
def test_its_figures_show_the_runs_of_its_text(run):
    """Both come from the same runs."""
    shown = re.findall(r"epoch +(\d+)/(\d+).* accuracy (\S+)% .* accuracy (\S+)% ", output_of(run))
    drawn = accuracies(FOLDER / run / "learning_curves.svg")
    assert len(shown) == 2
    for epoch, num_epochs, *percent in shown:
        assert [len(line) for line in drawn] == [int(num_epochs)] * 2
        assert [line[int(epoch) - 1] for line in drawn] == pytest.approx([float(x) for x in percent], abs=0.1)


def test_its_sentences_repeat_numbers_of_the_outputs():
    """Every accuracy with two decimals is in an output, or in the results of the experiments."""
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    measured = " ".join(OUTPUTS) + (FOLDER.parent / "RESULTS.md").read_text()
    percent = re.findall(r"\d+\.\d\d(?=%)", prose)
    assert len(percent) > 5 and [x for x in percent if x not in measured] == []


@pytest.mark.slow
def test_it_can_be_followed(learner, capsys):
    """On real data, within half a point on MNIST and two on CIFAR-10, because processors round differently."""
    for command in COMMANDS:
        main(command)
        out = capsys.readouterr().out
        for name in (name for name, train in TRAIN.items() if train == command):
            expected, found = (re.findall(r"Test accuracy (\S+)%", text) for text in (output_of(name), out))
            tolerance = 2.0 if name in ("my_cnn", "my_cnn_dropout", "my_mlp_cifar10") else 0.5
            assert [float(x) for x in found] == pytest.approx([float(x) for x in expected], abs=tolerance), name
    for figure in FIGURES:
        assert (Path("figures") / figure.relative_to(FOLDER)).exists()
    assert [out for out, shown in run_python(capsys) if shown] == [shown for _, shown in PYTHON if shown]
