"""The command line: train | eval | predict | data, and those of `cli_runs`. Imports jax only when a command runs."""

import logging
import runpy
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro
from tyro.conf import Positional, arg

from cnnjax.cli.inspection import Compare, Diff, Reproduce, Runs, Verify, describe
from cnnjax.cli.process import use_compilation_cache
from cnnjax.cli.signals import Interrupted
from cnnjax.config import Config
from cnnjax.errors import StorageError, UserError, unknown_name

# The exit code of a run that a signal stopped and --resume goes on with: EX_TEMPFAIL of sysexits.h, for schedulers.
REQUEUE = 75


@dataclass(frozen=True)
class Train:
    """Train a network, validate each epoch, and score it on the test set once at the end.

    `cnnjax train EXPERIMENT` takes the values of experiments/EXPERIMENT.py (or of such a file, by its path) as
    defaults. Any value of the configuration can be given by its name. Ctrl-C and SIGTERM save, tell how to go on, and
    exit with 75.
    """

    config: Annotated[Config, arg(name="")] = field(default_factory=Config)
    seeds: str | None = None
    """Train with many seeds in one process, 0:10 (0 to 9) or 0,3,7, and print the mean and its 95% interval."""
    run_dir: Path | None = None
    """Where the run goes, runs/EXPERIMENT-seedSEED by default; with --seeds, the folder of the runs."""
    data_dir: Path | None = None
    """The tfds directory; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""
    resume: bool = False
    """Go on with the run in the run directory, exactly where it stopped (or longer, at a constant learning rate)."""
    checkpoint_seconds: float = 60.0
    """Save within an epoch, too, this long after the last save: what a power cut may cost. No bit depends on it."""

    def __post_init__(self) -> None:
        if not self.checkpoint_seconds >= 0:
            raise UserError(f"`checkpoint_seconds` must be at least 0, got {self.checkpoint_seconds}.")


@dataclass(frozen=True)
class Eval:
    """Score a trained network on every image of a split."""

    run: Positional[Path]
    """The run directory."""
    split: Literal["test", "validation"] = "test"
    """The split; validation is the part of the training split that the run held out."""
    data_dir: Path | None = None
    """The tfds directory; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""


@dataclass(frozen=True)
class Predict:
    """Print the most probable classes of image files, of any size and kind."""

    run: Positional[Path]
    """The run directory."""
    images: Positional[tuple[Path, ...]]
    """The image files."""
    top: int = 3
    """How many classes to print."""
    invert: bool = False
    """Exchange dark and bright first: for dark digits on white paper, where the training images are the reverse."""


@dataclass(frozen=True)
class Data:
    """Fetch, check and prepare a data set, and say what it holds."""

    dataset: Positional[str]
    """mnist, fashion_mnist, cifar10, cifar100, or any image classification set of TensorFlow Datasets."""
    data_dir: Path | None = None
    """The tfds directory; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with 0, or with 2 and a message if the user has to fix something."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": Train, "eval": Eval, "predict": Predict, "data": Data}
    commands |= {"runs": Runs, "verify": Verify, "reproduce": Reproduce, "diff": Diff, "compare": Compare}

    def parse() -> Any:
        if len(arguments) > 1 and arguments[0] == "train" and not arguments[1].startswith("-"):
            default = Train(_read_experiment(arguments[1]))
            return tyro.cli(Train, default=default, args=arguments[2:], prog=f"cnnjax train {arguments[1]}")
        return tyro.extras.subcommand_cli_from_dict(
            commands, args=arguments, prog="cnnjax", description="Train image classifiers with JAX and Flax."
        )

    _run(parse)


def run_experiment(config: Config) -> None:
    """Runs an experiment file: trains `config`, of which the command line may change any value.

    Raises:
      SystemExit: 0 at the end; 2 with a message if the user has to fix something.
    """
    _run(lambda: tyro.cli(Train, default=Train(config)))


def _read_experiment(name: str) -> Config:
    """Returns the CONFIG of experiments/<name>.py, or of the file `name`; the file is run, as a Python program."""
    folder = Path("experiments")
    path = Path(name) if name.endswith(".py") else folder / f"{name}.py"
    if not path.is_file():
        known = (path.stem for path in folder.glob("*.py") if "CONFIG = " in path.read_text())
        raise unknown_name("EXPERIMENT", name, known)
    config = runpy.run_path(str(path)).get("CONFIG")
    if not isinstance(config, Config):
        raise UserError(f"`EXPERIMENT` must be a file with a CONFIG of type Config, got {path}.")
    return config


def _run(parse: Callable[[], Any]) -> None:
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # tfds and Orbax tell there what is of no use to users.
    threading.excepthook = lambda args: (
        None
    )  # An error of Orbax's threads is raised again where the loop waits for them.
    try:
        command = parse()
        actions = {Train: _train, Eval: _eval, Predict: _predict, Data: _data}
        status = actions[type(command)](command) if type(command) in actions else command()
    except Interrupted as stop:
        again = [*sys.orig_argv, *([] if "--resume" in sys.orig_argv else ["--resume"])]
        _fail(f"{stop} Go on with:\n  {shlex.join(again)}", REQUEUE)
    except StorageError as error:
        _fail(str(error), 1)
    except UserError as error:
        _fail(str(error), 2)
    except OSError as error:  # A full disk, a missing permission: the system's message names the file.
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("Stopped at once; whatever was not saved is lost.", 130)
    if status:
        raise SystemExit(status)


def _fail(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(status)


def _train(command: Train) -> None:
    from cnnjax.cli.console import Report
    from cnnjax.runs.seeds import parse_seeds, train_seeds, use_cores
    from cnnjax.train import train_and_evaluate

    seeds = None if command.seeds is None else parse_seeds(command.seeds)
    if seeds is not None:
        use_cores(len(seeds))
    use_compilation_cache(print)
    where: Any = {"data_dir": command.data_dir, "resume": command.resume, "report": Report()}
    where["checkpoint_seconds"] = command.checkpoint_seconds
    if seeds is None:
        train_and_evaluate(command.config, run_dir=command.run_dir, **where)
        return
    results = train_seeds(command.config, seeds, folder=command.run_dir, **where)
    print(f"{len(results)} seeds, {command.seeds}: {describe([result['test_accuracy'] for result in results])}")


def _eval(command: Eval) -> None:
    from cnnjax.runs.trained import load_trained, score

    trained = load_trained(command.run)
    scores = score(trained, command.split, command.data_dir)
    print(
        f"{command.split} accuracy {scores.accuracy:.2%}, loss {scores.loss:.4f}, on all "
        f"{scores.num_examples:,} images ({trained.config.dataset}, {command.run})"
    )


def _predict(command: Predict) -> None:
    from cnnjax.runs.trained import classify, load_trained, read_image

    if not command.images or command.top < 1:
        raise UserError(
            f"`images` must name a file and `top` be at least 1, got {len(command.images)} files and {command.top}."
        )
    trained = load_trained(command.run)
    for path in command.images:
        image = read_image(path, trained.facts.image_shape)
        image = 255 - image if command.invert else image
        if image.mean() > 2 * max(trained.facts.mean) and not command.invert:
            print(f"{path} is much brighter than the training images; try --invert", file=sys.stderr)
        probability = classify(trained, image)
        top = (-probability).argsort(kind="stable")[: command.top]
        print(f"{path}: " + ", ".join(f"{trained.facts.class_names[k]} {probability[k]:.1%}" for k in top))


def _data(command: Data) -> None:
    from cnnjax.data.datasets import load_dataset

    dataset = load_dataset(command.dataset, command.data_dir)
    print(f"{dataset.name}, from {dataset.source}, in {dataset.folder}")
    for split, sha256 in dataset.sha256.items():
        shape = "×".join(map(str, dataset.load(split).image.shape))
        print(f"  {split}: {shape}, SHA-256 {sha256}")
    print(f"  {dataset.num_classes} classes: {', '.join(dataset.class_names)}")


if __name__ == "__main__":
    main()
