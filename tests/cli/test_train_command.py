import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import flax.linen as nn
import pytest

from cnnjax import (
    CNN,
    MLP,
    SGD,
    Adam,
    Augment,
    Config,
    CrossEntropy,
    CutMix,
    Mixup,
    Muon,
    PhotoAugment,
    SpeedNet,
    UserError,
)
from cnnjax.cli.experiment import Experiment, experiment_of, find_experiment, load_experiment
from cnnjax.cli.main import _status, main
from cnnjax.cli.train_command import parse_train
from cnnjax.runs.codec import decode, encode, source_files

DEFAULTS = Experiment(Config(), {})


class Activated(nn.Module):
    num_classes: int = 10
    """Number of classes."""
    width: int = 4
    """Width."""
    activation: type | None = None
    """A class."""


def parse(*arguments, config=None):
    return parse_train(DEFAULTS if config is None else Experiment(config, {}), arguments).config


def fails(capsys, *arguments):
    """Runs `cnnjax train`, which must exit with status 2; returns its message on one line."""
    with pytest.raises(SystemExit) as stopped:
        main(["train", *arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return re.sub(r"[│╭╮╰╯─\s]+", " ", captured.err + captured.out)


def test_every_field_is_an_option():
    assert parse() == Config()
    config = parse(
        *(
            "--name",
            "a",
            "--dataset",
            "mnist",
            "--seed",
            "3",
            "--num-epochs",
            "5",
            "--batch-size",
            "64",
            "--tta",
            "flip",
        ),
        *("--model.conv-dropout", "0.1", "--optim.learning-rate", "3e-4", "--optim.schedule", "one_cycle"),
        *("--optim.b1", "0.8", "--augment.flip", "random", "--augment.cutout", "4", "--loss.label-smoothing", "0.1"),
    )
    assert config == Config(
        name="a",
        dataset="mnist",
        seed=3,
        num_epochs=5,
        batch_size=64,
        tta="flip",
        model=CNN(conv_dropout=0.1),
        optim=Adam(learning_rate=3e-4, schedule="one_cycle", b1=0.8),
        augment=Augment(flip="random", cutout=4),
        loss=CrossEntropy(label_smoothing=0.1),
    )
    train = parse_train(DEFAULTS, ["--run-dir", "x", "--data-dir", "y", "--resume", "--checkpoint-seconds", "5"])
    assert (train.run_dir, train.data_dir, train.resume, train.checkpoint_seconds) == (Path("x"), Path("y"), True, 5.0)


def test_a_word_chooses_a_class_which_determines_the_options():
    assert parse("--model", "mlp", "--model.dense-dropout", "0.2").model == MLP(dense_dropout=0.2)
    assert parse("--model=speednet", "--model.widths", "4", "8", "8").model == SpeedNet(widths=(4, 8, 8))
    assert parse("--optim", "sgd", "--optim.momentum", "0.5").optim == SGD(momentum=0.5)
    assert parse("--optim", "muon").optim == Muon()
    assert parse("--augment", "mixup", "--augment.alpha", "0.4").augment == Mixup(alpha=0.4)
    assert parse("--augment", "cutmix").augment == CutMix()
    photos = parse("--augment", "photoaugment", "--augment.train-sizes", "128", "160", "--augment.scale", "0.2", "1")
    assert photos.augment == PhotoAugment(train_sizes=(128, 160), scale=(0.2, 1.0))


def test_another_class_keeps_the_fields_that_it_shares():
    config = Config(
        model=CNN(dense_dropout=0.1), optim=Adam(learning_rate=0.5, lookahead=5, b1=0.8), augment=Augment(translate=2)
    )
    changed = parse("--model", "mlp", "--optim", "sgd", "--augment", "mixup", config=config)
    assert changed.model == MLP()  # Networks share nothing.
    assert changed.optim == SGD(learning_rate=0.5, lookahead=5)
    assert changed.augment == Mixup(translate=2)
    assert parse("--optim", "adam", config=config).optim == config.optim  # It is that class already.


def test_a_field_that_holds_a_function_or_data_keeps_it():
    def arrays():
        raise AssertionError

    config = Config(model=Activated(activation=MLP), loss=nn.relu, dataset=arrays)
    assert parse("--model.width", "8", config=config) == replace(config, model=Activated(width=8, activation=MLP))
    assert parse("--dataset", "mnist", config=config).dataset == "mnist"


def test_the_size_of_images():
    sizes = [["96"], ["96", "128"], ["96x128"], ["None"]]
    assert [parse("--image-size", *size).image_size for size in sizes] == [96, (96, 128), (96, 128), None]


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--num-epochs", "0", "`num_epochs` must be at least 1, got 0"),
        ("--batch-size", "0", "`batch_size` must be at least 1, got 0"),
        ("--validation-fraction", "1", "`validation_fraction` must be at least 0 and below 1, got 1"),
        ("--validation-fraction", "-1", "`validation_fraction` must be at least 0 and below 1, got -1"),
        ("--checkpoint-seconds", "nan", "`checkpoint_seconds` must be a number of at least 0, got nan"),
        ("--seed", "-1", "`seed` must be between 0 and 2**32 - 1, got -1"),
        (
            "--name",
            "a/b",
            "`name` must be letters, digits, '.', '_' and '-' that begin with a letter or digit, got 'a/b'",
        ),
        (
            "--dataset",
            "../no/x",
            "`dataset` must be an existing folder or list, got ../no/x (No such file or directory)",
        ),
        ("--tta", "flp", "`tta` must be a known name, got 'flp'. Did you mean flip"),
        ("--loss.label-smoothing", "1", "`loss.label_smoothing` must be at least 0 and below 1, got 1"),
        ("--optim.learning-rate", "-1", "`optim.learning_rate` must be above 0 and finite, got -1"),
        ("--optim.learning-rate", "nan", "`optim.learning_rate` must be finite, and 0 or a normal number of float32"),
        ("--optim.schedule", "one_cycel", "`optim.schedule` must be a known name, got 'one_cycel'. Did you mean one_c"),
        ("--optim.warmup", "1", "`optim.warmup` must be at least 0 and below 1, got 1"),
        ("--optim.weight-decay", "-1", "`optim.weight_decay` must be at least 0 and finite, got -1"),
        ("--optim.end-factor", "2", "`optim.end_factor` must be between 0 and 1, got 2"),
        ("--optim.lookahead", "-1", "`optim.lookahead` must be at least 0, got -1"),
        ("--optim.accumulate-steps", "0", "`optim.accumulate_steps` must be at least 1, got 0"),
        ("--optim", "sdg", "`optim` must be a known name, got 'sdg'. Did you mean sgd"),
        ("--augment.flip", "rando", "`augment.flip` must be a known name, got 'rando'. Did you mean random"),
        ("--augment.translate", "-1", "`augment.translate` must be at least 0, got -1"),
        ("--augment", "mixp", "`augment` must be a known name, got 'mixp'. Did you mean mixup"),
        ("--model", "speed", "`model` must be a known name, got 'speed'. Did you mean speednet"),
        ("--model.dtype", "float31", "`model.dtype` must be a known name, got 'float31'. Did you mean float32"),
        (
            "--model.kernel-init",
            "he_norm",
            "`model.kernel_init` must be a known name, got 'he_norm'. Did you mean he_n",
        ),
        ("--model.conv-dropout", "1", "`model.conv_dropout` must be between 0 and 0.99, got 1"),
        ("--model.dense-dropout", "-1", "`model.dense_dropout` must be between 0 and 0.99, got -1"),
        (
            "--optim.learning-rat",
            "1e-3",
            "option must be a known name, got --optim.learning-rat. Did you mean --optim",
        ),
        ("--modle", "mlp", "An option must be a known name, got --modle. Did you mean --model? --help lists those of"),
        ("--lr", "0.1", "An option must be a known name, got --lr. Did you mean --optim.learning-rate?"),
        ("--optim.lr", "0.1", "An option must be a known name, got --optim.lr. Did you mean --optim.learning-rate?"),
        ("--bs", "32", "An option must be a known name, got --bs. Did you mean --batch-size?"),
        ("--epochs", "3", "An option must be a known name, got --epochs. Did you mean --num-epochs or --optim.freeze"),
        ("--gpu", "1", "An option must be a known name, got --gpu. --help lists those of the chosen network"),
        ("--image-size", "96xx", "`image_size` must be one number, or height and width, such as 96 128, got 96xx."),
        ("--seeds=0:2", "--seed=3", "`seed` must be left out with --seeds, got both."),
        ("--seed", "0:3", "`seed` must be one number, got 0:3. Several seeds are --seeds 0:3."),
        ("--seeds", "x", "`seeds` must be a range such as 0:10 (0 to 9) or a list such as 0,3,7, of 1 to 10,000"),
    ],
)
def test_values_out_of_range(option, value, rule, capsys):
    assert rule in fails(capsys, option, value)


def test_stream_is_a_flag_and_an_option_as_help_shows_it():
    given = (["--stream"], ["--stream", "True"], ["--no-stream"], ["--stream", "False"], ["--stream", "None"], [])
    streams = [parse_train(DEFAULTS, words).stream for words in given]
    assert streams == [True, True, False, False, None, None]


def test_a_value_that_belongs_to_no_option(capsys):
    message = "An argument must be an option or its value, got '46' after --profile 40. --help shows the form of each v"
    message += "alue; quote one that contains spaces."
    assert message in fails(capsys, "--profile", "40", "46")
    assert "got 'photos' after --dataset 'my holiday'." in fails(capsys, "--dataset", "my holiday", "photos")
    assert "got '40' after --profile 40." in fails(capsys, "--profile", "40", "40")


def test_a_word_without_a_value(capsys):
    assert "`model` must be a known name, got ''" in fails(capsys, "--seed", "1", "--model")


def test_help_lists_the_words(capsys):
    main(["train", "--help"])
    out = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "--model cnn|efficientnetlite0|mlp|resnet18|resnet50|speednet --optim adam|muon|sgd --augment " in out
    assert "--metrics" not in out  # A function cannot be written on a command line.


def test_an_experiment_is_found_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    Path("experiments/small.py").write_text("from cnnjax import Config\nCONFIG = Config(batch_size=64)")
    Path("experiments/smaller.py").write_text("# Something else.")
    assert load_experiment("small").config == Config(name="small", batch_size=64)
    assert "`EXPERIMENT` must be a known name, got 'smal'. Did you mean small?" in fails(capsys, "smal")
    assert "`EXPERIMENT` must be a known name, got 'small.py'. Did you mean small?" in fails(capsys, "small.py")


def test_an_experiment_may_import_files_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    Path("my_losses.py").write_text("def absolute(logits, batch):\n    return abs(logits).sum(1)\n")
    Path("mine.py").write_text(
        "from cnnjax import Config\nfrom my_losses import absolute\nCONFIG = Config(loss=absolute)\n"
    )
    experiment = load_experiment("mine.py")
    assert [*source_files(experiment.config)] == ["my_losses.py"]
    assert decode(encode(experiment.config), experiment.names) == experiment.config


def test_the_name_of_an_experiment_is_that_of_its_file(tmp_path):
    path = tmp_path / "wide.py"
    path.write_text("from cnnjax import Config\nCONFIG = Config()")
    assert find_experiment(str(path)) == path
    experiment = load_experiment(str(path))
    assert experiment.config.run_name == "wide-seed0"
    assert parse_train(experiment, ["--name", "narrow", "--seed", "2"]).config.run_name == "narrow-seed2"
    assert parse_train(experiment, ["--dataset", "mnist"]).config.run_name == "wide_mnist-seed0"
    assert parse_train(experiment, ["--dataset", "mnist", "--name=wide"]).config.run_name == "wide-seed0"
    assert Config(dataset="cifar10", model=MLP(), seed=1).run_name == "cifar10_mlp-seed1"


def test_an_experiment_without_a_configuration(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("CONFIG = None")
    with pytest.raises(UserError, match=rf"`EXPERIMENT` must be a file with a CONFIG of type Config, got {path}"):
        load_experiment(str(path))
    with pytest.raises(UserError, match="`EXPERIMENT` must be a file with a CONFIG of type Config"):
        experiment_of(re, None)


def test_ctrl_c_says_what_is_lost(capsys):
    def stop(*arguments):
        raise KeyboardInterrupt(*arguments)

    assert _status(stop, resumable=True) == _status(lambda: stop("The result is saved."), resumable=True) == 130
    lost = "Stopped at once. Everything since the last checkpoint is lost."
    assert capsys.readouterr().err == f"{lost}\nStopped at once. The result is saved.\n"


@dataclass(frozen=True)
class Noisy:
    """Data of the user."""

    noise: float = 0.2
    """Fraction of wrong labels."""

    def __call__(self):
        raise AssertionError("not called")


def test_the_fields_of_a_data_set_are_options(capsys):
    config = Config(name="noisy", dataset=Noisy(), model=MLP())
    assert parse(config=config) == config
    assert parse("--dataset.noise", "0.4", config=config) == replace(config, dataset=Noisy(0.4))
    assert parse("--dataset", "mnist", config=config) == replace(config, dataset="mnist", name="noisy_mnist")
    with pytest.raises(UserError, match=r"got --dataset\.nois\. Did you mean --dataset\.noise\?"):
        parse("--dataset.nois", "1", config=config)
    with pytest.raises(SystemExit):
        parse("--help", config=config)
    assert re.search(r"--dataset\.noise FLOAT\W+Fraction of wrong labels", capsys.readouterr().out)


@dataclass(frozen=True)
class Cosine:
    period: int = 3


@dataclass(frozen=True)
class Warm:
    steps: int = 5


class Scheduled(nn.Module):
    sched: Cosine | Warm = Cosine()
    extra: Warm | None = Warm()


def test_a_union_of_dataclasses_is_a_choice():
    config = Config(model=Scheduled())
    parsed = parse("model.sched:warm", "--model.sched.steps", "3", "model.extra:none", config=config).model
    assert (parsed.sched, parsed.extra) == (Warm(3), None)


@pytest.mark.parametrize("arguments", [("train", "--run-dir="), ("train", "--data-dir", ""), ("runs", "")])
def test_a_path_is_not_empty(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "A path must not be empty, got ''. Write . for the current folder." in capsys.readouterr().err
