"""Every command works with a network, an optimizer, a loss, an augmentation and data of the user's own."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import jax
import pytest
from PIL import Image

from cnnjax import MLP, Config, UserError, load_run, train_and_evaluate
from cnnjax.cli.experiment import load_experiment
from cnnjax.cli.main import main
from cnnjax.cli.train_command import parse_train
from cnnjax.runs.codec import encode
from cnnjax.runs.manifest import read_manifest
from cnnjax.runs.records import read_record, read_result

FILE = Path(__file__).parents[1] / "programs" / "own_experiment.py"
OPTIONS = ["--model.width", "6", "--optim.b1", "0.8", "--train-step.radius", "0.2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run directories of two seeds, and the output of the command that trained them."""
    folder = tmp_path_factory.mktemp("own")
    jax.devices()  # `--seeds` would otherwise make each core of this process a device.
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        main(["train", str(FILE), *OPTIONS, "--seeds", "0:2"])
    return [folder / "runs" / f"own_experiment-seed{seed}" for seed in (0, 1)], out.getvalue()


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy of the run of seed 0."""
    return Path(shutil.copytree(trained[0][0], tmp_path / "run"))


def fails(capsys, *arguments):
    """Runs a command that must exit with status 2; returns its message on one line."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    return re.sub(r"[│╭╮╰╯─\s]+", " ", captured.err + captured.out)


def test_train_overrides_fields_of_the_classes_and_records_names(trained):
    run_dirs, out = trained
    assert re.search(r"^2 seeds, 0:2: test_accuracy \d+\.\d\d%", out.splitlines()[-1])
    content = json.loads((run_dirs[1] / "config.json").read_text())
    config = content["config"]
    assert (config["name"], config["seed"], config["dataset"]) == ("own_experiment", 1, {"function": "patterns"})
    assert config["loss"] == {"function": "focal_loss"}
    assert config["model"] == {"class": "ConvNet", "num_classes": 10, "width": 6, "activation": {"default": "relu"}}
    assert (config["optim"]["class"], config["optim"]["b1"], config["optim"]["learning_rate"]) == ("Lion", 0.8, 0.01)
    assert config["train_step"] == {"class": "Adversarial", "radius": 0.2}
    assert config["augment"] == {"class": "Noise", "flip": "random", "translate": 0, "cutout": 0, "scale": 0.1}
    assert [Path(name).name for name in content["files"]] == ["own_experiment.py"]
    result = read_result(run_dirs[1])
    assert result is not None and result["test_accuracy"] > 0.8  # Of 4 classes.


def test_help_lists_the_fields_with_their_docstrings(capsys):
    with suppress(SystemExit):
        main(["train", str(FILE), "--help"])
    out = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "--model.width INT Number of channels. (default: 4)" in out
    assert "--optim.b1 FLOAT Weight of the momentum in the sign. (default: 0.9)" in out
    assert "--optim.learning-rate FLOAT Learning rate for the mean loss of a batch" in out
    assert "--train-step.radius FLOAT Distance in each pixel, in standard deviations. (default: 0.1)" in out
    assert "--augment.scale FLOAT Standard deviation of the noise. (default: 0.1)" in out
    listed = {
        part: {*re.findall(rf" --{part} ([a-z0-9|]+) ", out)[0].split("|")} for part in ("model", "optim", "augment")
    }
    assert listed == {
        "model": {"cnn", "efficientnetlite0", "mlp", "resnet18", "resnet50", "speednet", "convnet"},
        "optim": {"adam", "sgd", "muon", "lion"},
        "augment": {"augment", "photoaugment", "mixup", "cutmix", "noise"},
    }
    assert "--model.activation" not in out  # A function cannot be written on a command line.


def test_a_misspelled_field_suggests_the_nearest(capsys):
    assert "Did you mean --model.width?" in fails(capsys, "train", str(FILE), "--model.widht", "8")
    assert "Did you mean --optim.b1" in fails(capsys, "train", str(FILE), "--optim.b", "0.5")
    assert "got 'convnt'. Did you mean convnet" in fails(capsys, "train", str(FILE), "--model", "convnt")


def test_a_word_switches_to_a_built_in_network():
    experiment = load_experiment(str(FILE))
    config = parse_train(experiment, ["--model", "mlp", "--model.dense-dropout", "0.2"]).config
    assert config.model == MLP(dense_dropout=0.2)
    assert config.optim == experiment.config.optim


def test_a_stopped_run_resumes_to_the_same_bits_and_reports_an_edited_file(trained, tmp_path, monkeypatch, capsys):
    """The file itself is the program that is stopped; `cnnjax train` resumes the same run."""
    monkeypatch.chdir(tmp_path)
    file, run_dir = Path(shutil.copy(FILE, tmp_path)), tmp_path / "runs" / "own_experiment-seed0"
    command = [sys.executable, "-u", file.name, *OPTIONS, "--checkpoint-seconds", "0"]  # Slow: saves after each step.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert any(line.startswith("epoch  1/12") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        errors = process.stderr.read()
    assert process.returncode == 75, errors
    assert f"Stopped by SIGTERM; the checkpoint of step {max(_steps(run_dir))} is saved. Resume with:" in errors
    assert f"{' '.join(command)} --resume" in errors
    assert max(_steps(run_dir)) < 84

    file.write_text(f"{file.read_text()}# Edited.\n")
    main(["train", file.name, *OPTIONS, "--resume"])
    out = capsys.readouterr().out
    assert re.search(
        r"This run resumes in another environment, .*files\.own_experiment\.py was \w{8} and is \w{8}", out
    )
    result, whole = read_result(run_dir), read_result(trained[0][0])
    assert result is not None and whole is not None and result["sha256"] == whole["sha256"]
    first, last = (session["files"] for session in read_manifest(run_dir)["sessions"])
    assert last == read_record(run_dir).files and first.keys() == last.keys() and first != last
    for text, expected in (("", False), ("# Again.\n", True)):
        file.write_text(f"{file.read_text()}{text}")
        main(["train", file.name, *OPTIONS, "--resume"])
        assert ("own_experiment.py changed after this run had finished" in capsys.readouterr().out) == expected


def _steps(run_dir):
    return [int(path.name) for path in (run_dir / "checkpoints").iterdir()]


def test_eval_and_predict_need_the_file(trained, tmp_path, capsys):
    run_dir = trained[0][0]
    result = read_result(run_dir)
    assert result is not None
    main(["eval", str(run_dir), "--experiment", str(FILE)])
    score = f"test accuracy {result['test_accuracy']:.2%}, loss {result['test_loss']:.4f}, on all 120 images"
    assert score in capsys.readouterr().out
    dataset: Any = load_experiment(str(FILE)).config.dataset
    _, _, image, label = dataset()
    Image.fromarray(image[2, :, :, 0]).save(tmp_path / "image.png")
    predict = ["predict", str(run_dir), str(tmp_path / "image.png"), "--top", "1"]
    main([*predict, "--experiment", str(FILE)])
    assert re.fullmatch(rf"{tmp_path}/image.png: {label[2]} \d+\.\d%\n", capsys.readouterr().out)
    needed = (
        r"`model` of this run is ConvNet, which is not part of cnnjax, and a run directory imports no code. Pass "
        r"the file that defines it: --experiment \S*own_experiment.py"
    )
    for command in (["eval", str(run_dir)], predict, ["reproduce", str(run_dir)]):
        assert re.match(needed, fails(capsys, *command))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The directory of a run of our network and optimizer with the file's data, augmentation and loss."""
    run_dir = tmp_path_factory.mktemp("ours") / "run"
    options = ["--model", "mlp", "--optim", "adam", "--num-epochs", "1", "--run-dir", str(run_dir)]
    with redirect_stdout(io.StringIO()):
        main(["train", str(FILE), *options])
    return run_dir


def test_predict_needs_no_file_for_our_network_and_optimizer(ours, tmp_path, capsys):
    dataset: Any = load_experiment(str(FILE)).config.dataset
    Image.fromarray(dataset()[2][0, :, :, 0]).save(tmp_path / "image.png")
    predictions = []
    for file in ([], ["--experiment", str(FILE)]):
        main(["predict", str(ours), str(tmp_path / "image.png"), *file])
        predictions.append(capsys.readouterr().out)
    assert re.match(rf"{tmp_path}/image.png: \d \d+\.\d%", predictions[0]) and predictions[0] == predictions[1]


def test_what_the_file_must_provide_is_named_when_it_is_used(ours, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    needed = "`{}` of this run is {}, which is not part of cnnjax, and a run directory imports no code. Pass the file"
    for command in (["eval", str(ours)], ["export", str(ours), "exported"]):
        assert needed.format("dataset", "patterns") in fails(capsys, *command)
    main(["report", str(ours), "--path", "report.html"])
    lacks = capsys.readouterr().err
    assert f"The report lacks calibration and example images: {needed.format('dataset', 'patterns')}" in lacks
    computed = "The training loss is computed with focal_loss, the training step Adversarial, the val"
    assert computed in Path("report.html").read_text()
    for run in (ours, load_run(ours)):  # From the command line, and from Python.
        with pytest.raises((UserError, SystemExit)) as stopped:
            if isinstance(run, Path):
                main(["reproduce", str(run), "--run-dir", "new"])
            else:
                train_and_evaluate(run.config, run_dir="new")
        message = f"{stopped.value} {capsys.readouterr().err}"
        assert re.search(r"`loss` of this run is focal_loss, which is not part of cnnjax", message)
        assert not Path("new").exists()


def test_reproduce_trains_to_the_same_bits(trained, tmp_path, monkeypatch, capsys):
    run_dir = str(trained[0][0])
    monkeypatch.chdir(trained[0][0].parents[1])
    main(["reproduce", run_dir, "--run-dir", str(tmp_path / "new"), "--experiment", str(FILE)])
    out = capsys.readouterr().out
    verdict = f"{run_dir} and {tmp_path / 'new'} are the same, bit for bit: parameters, optimizer state, batch"
    assert verdict in out.splitlines()[-1]  # And nothing differs between the two.


def test_commands_that_compare_runs_need_no_file(trained, tmp_path, monkeypatch, capsys):
    """Here, of an experiment that differs in one option of the optimizer."""
    monkeypatch.chdir(tmp_path)
    for seed, accuracy in ((0, 0.5), (1, 0.25)):
        shutil.copytree(trained[0][seed], f"runs/a-seed{seed}")
        b = Path(shutil.copytree(trained[0][seed], f"runs/b-seed{seed}"))
        edit(b / "config.json", lambda content: content["config"]["optim"].update(b1=0.9))
        edit(b / "result.json", lambda content, accuracy=accuracy: content.update(test_accuracy=accuracy))
    main(["compare", "a", "b"])
    verdict = r"^b minus a: -\d+\.\d\d points \(95% interval .*paired t test, the same seeds\)\.$"
    assert re.search(verdict, capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(SystemExit, match="1"):
        main(["diff", "runs/a-seed0", "runs/b-seed0"])
    assert capsys.readouterr().out.startswith("configuration:\n  optim.b1: 0.8 | 0.9\ndata: the same\n")
    main(["runs"])
    lines = [line.split()[:4] for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [[f"{name}-seed{seed}", "finished", str(seed), "12/12"] for name in "ab" for seed in (0, 1)]
    main(["verify", "runs/a-seed0"])
    assert re.match(r"(\d+) of \1 files agree with their checksums", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("model", {"class": "trap.Trap"}),
        ("model", {"class": "system", "command": "touch called"}),
        ("loss", {"function": "os.system"}),
        ("dataset", {"function": "trap"}),
        (
            "augment",
            {"class": "Trap", "__post_init__": {"partial": "remove_all", "args": [], "keywords": {"dict": {}}}},
        ),
        ("dataset", {"partial": "system", "args": ["touch called"], "keywords": {"dict": {}}}),
        ("dataset", {"partial": "remove_all", "args": [], "keywords": {"dict": {}}}),
        ("dataset", {"dtype": "save"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("experiment", [[], ["--experiment", "mine.py"]], ids=["alone", "with a file"])
def test_a_run_directory_imports_and_calls_nothing(part, value, experiment, run_dir, tmp_path, monkeypatch, capsys):
    """Not even functions that the user's file imports or defines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("trap.py").write_text("open('called', 'w')")
    Path("mine.py").write_text(f"from os import system\n{FILE.read_text()}\ndef remove_all(): open('called', 'w')\n")
    edit(run_dir / "config.json", lambda content: content.update(config={**encode(Config()), part: value}))
    message = fails(capsys, "eval", str(run_dir), *experiment)
    refused = f"`{part}` of this run is {next(iter(value.values()))}, which is not part of cnnjax"
    if part in ("loss", "augment"):  # They only train, so the data are loaded, which are others here.
        refused = "`dataset` must be "
    assert refused in message or "data type 'save' not understood" in message
    assert "trap" not in sys.modules and not Path("called").exists()


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    path.with_name("SHA256SUMS").unlink(missing_ok=True)


# --- Files that are no experiments ------------------------------------------------------------------------------------


@pytest.fixture
def experiments(tmp_path, monkeypatch):
    """A folder with experiments/mine.py, helper.py beside it, and files that cannot be read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "good.py").write_text("from cnnjax import Config\nCONFIG = Config()\n")
    (folder / "helper.py").write_text("def divide():\n    return 1 / 0\n")
    (folder / "broken.py").write_text("x = (\n")
    (folder / "folder.py").mkdir()
    (folder / "latin.py").write_bytes(b"# caf\xe9\nCONFIG = 1\n")
    (folder / ".#good.py").symlink_to("nowhere")
    (folder / "loop.py").symlink_to("loop.py")
    os.mkfifo(folder / "pipe.py")
    yield folder
    for name in ("helper", "broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("CONFIG = Config(num_epochs='3')", "mine.py, line 2: `num_epochs` must be an int, got '3'."),
        ("\n\nCONFIG = Config(\n", "mine.py, line 4: SyntaxError: '(' was never closed."),
        ("CONFIG = Config(seed=x)", "mine.py, line 2: NameError: name 'x' is not defined."),
        ("from notthere import x", "mine.py, line 2: ModuleNotFoundError: No module named 'notthere'."),
        ("import helper\nhelper.divide()", "helper.py, line 2: ZeroDivisionError: division by zero."),
        ("import broken", "broken.py, line 1: SyntaxError: '(' was never closed."),
        ("def f(): f()\nf()", "mine.py, line 2: RecursionError: maximum recursion depth exceeded."),
        ("raise ValueError('two\\nlines')", "mine.py, line 2: ValueError: two lines."),
        ("assert False", "mine.py, line 2: AssertionError."),
        ("class E(BaseException): pass\nraise E('x')", "mine.py, line 3: E: x."),
        ("class E(Exception):\n    __str__ = None\nraise E('x')", "mine.py, line 4: E."),
        ("import jax\njax.numpy.zeros('a')", "mine.py, line 3: TypeError: "),  # The last frame is one of jax.
        ("x = '\0'", "mine.py: SyntaxError: source code string cannot contain null bytes."),
        (
            "import sys; sys.exit(3)",
            "mine.py, line 2: SystemExit: 3. An experiment file must define CONFIG and not exit.",
        ),
    ],
)
def test_a_file_that_fails_is_one_line(lines, message, experiments, no_type_checks, capsys):
    (experiments / "mine.py").write_text(f"from cnnjax import Config\n{lines}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "mine"])
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out) == (2, "")
    assert captured.err.startswith(f"experiments/{message}") and captured.err.count("\n") == 1


def test_two_classes_that_have_one_word(experiments, capsys):
    code = "from cnnjax import Config, Logger\nclass L(Logger): pass\nclass l(Logger): pass\nCONFIG = Config()\n"
    (experiments / "mine.py").write_text(code)
    message = fails(capsys, "train", "mine")
    assert message.startswith("The classes of an experiment must have distinct names in lower case, got L and l of ")


def test_a_file_that_trains_itself_when_it_is_imported(experiments, capsys):
    (experiments / "mine.py").write_text("from cnnjax import Config, run_experiment\nrun_experiment(Config())\n")
    message = fails(capsys, "train", "mine")
    expected = '`run_experiment` must be called below `if __name__ == "__main__":`, got a call without it. '
    assert message == f"experiments/mine.py, line 2: {expected}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "`EXPERIMENT` must be a file that can be read, got experiments/folder.py (Is a directory). "),
        ("pipe", "`EXPERIMENT` must be a file that can be read, got experiments/pipe.py (Not a regular file). "),
        (
            ".#good",
            "`EXPERIMENT` must be a file that can be read, got experiments/.#good.py (No such file or directory",
        ),
        ("loop", "`EXPERIMENT` must be a file that can be read, got experiments/loop.py (Too many levels of symbolic"),
        ("latin", "experiments/latin.py: SyntaxError: invalid or missing encoding declaration. "),
        ("goood", "`EXPERIMENT` must be a known name, got 'goood'. Did you mean good? "),
        ("x" * 300, f"`EXPERIMENT` must be a known name, got '{'x' * 300}'. Valid names: good, latin. "),
        ("x\0", "`EXPERIMENT` must be a known name, got 'x\\x00'. Valid names: good, latin. "),
    ],
    ids=["folder", "pipe", "dangling link", "loop", "latin-1", "misspelled", "long", "zero"],
)
def test_a_file_that_cannot_be_read(name, message, experiments, capsys):
    assert fails(capsys, "train", name).startswith(message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(experiments, capsys):
    (experiments / "good.py").chmod(0)
    message = "`EXPERIMENT` must be a file that can be read, got experiments/good.py (Permission denied). "
    assert fails(capsys, "train", "good") == message


def test_a_folder_without_experiments(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    message = fails(capsys, "train", "mine")
    assert f"got 'mine', and there is no such folder in {tmp_path}. Change to the project's folder, or" in message


def test_a_file_name_that_names_no_run(experiments, capsys):
    (experiments / "good.py").rename(experiments / "not good.py")
    assert fails(capsys, "train", "not good").endswith("got 'not good'. Rename the file, or set `name` in its CONFIG. ")


def test_a_file_with_the_name_of_a_standard_module_does_not_replace_it(experiments, monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    source = "import colorsys\nfrom cnnjax import Config\nCONFIG = Config(seed=int(colorsys.rgb_to_hsv(0, 0, 7)[2]))\n"
    (experiments / "colorsys.py").write_text(source)
    assert load_experiment("colorsys").config.seed == 7
