"""The command line: train | eval | predict | data, and those of `inspection`. Imports jax only if needed."""

import logging
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import tyro
from tyro.conf import Positional

from cnnjax.cli.inspection import Compare, Diff, Reproduce, Runs, Verify, config_of
from cnnjax.cli.signals import Interrupted
from cnnjax.errors import StorageError, UserError

if TYPE_CHECKING:
    from cnnjax.cli.train_command import Train
    from cnnjax.config import Config

# The exit code of a run that a signal stopped and --resume continues: EX_TEMPFAIL of sysexits.h, for schedulers.
REQUEUE = 75


@dataclass(frozen=True)
class Eval:
    """Score a trained network on every image of a split."""

    run: Positional[Path]
    """The run directory."""
    split: Literal["test", "validation"] = "test"
    """The split; validation is the part of the training split that the run held out."""
    data_dir: Path | None = None
    """The tfds directory; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""
    experiment: str | None = None
    """The experiment file, if the run has classes or data of its own."""

    def __call__(self) -> None:
        """Prints accuracy and loss."""
        from cnnjax.runs.trained import load_trained, score

        trained = load_trained(self.run, config_of(self.run, self.experiment))
        scores = score(trained, self.split, self.data_dir)
        print(
            f"{self.split} accuracy {scores.accuracy:.2%}, loss {scores.loss:.4f}, on all "
            f"{scores.num_examples:,} images ({self.run})"
        )


@dataclass(frozen=True)
class Predict:
    """Print the most probable classes of image files of any size and format."""

    run: Positional[Path]
    """The run directory."""
    images: Positional[tuple[Path, ...]]
    """The image files."""
    top: int = 3
    """Number of classes to print."""
    invert: bool = False
    """Swap dark and bright first: for dark digits on white paper, if the training images are the reverse."""
    experiment: str | None = None
    """The experiment file, if the run has classes or data of its own."""

    def __call__(self) -> None:
        """Prints one line per file."""
        from cnnjax.runs.trained import classify, load_trained, read_image

        if not self.images or self.top < 1:
            raise UserError(
                f"`images` must name a file and `top` be at least 1, got {len(self.images)} files and {self.top}."
            )
        trained = load_trained(self.run, config_of(self.run, self.experiment))
        for path in self.images:
            image = read_image(path, trained.facts.image_shape)
            image = 255 - image if self.invert else image
            if image.mean() > 2 * max(trained.facts.mean) and not self.invert:
                print(f"{path} is much brighter than the training images; try --invert", file=sys.stderr)
            probability = classify(trained, image)
            top = (-probability).argsort(kind="stable")[: self.top]
            print(f"{path}: " + ", ".join(f"{trained.facts.class_names[k]} {probability[k]:.1%}" for k in top))


@dataclass(frozen=True)
class Data:
    """Download, check and prepare a data set, and describe it."""

    dataset: Positional[str]
    """mnist, fashion_mnist, cifar10, cifar100, or any image classification set of TensorFlow Datasets."""
    data_dir: Path | None = None
    """The tfds directory; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""

    def __call__(self) -> None:
        """Prints source, folder, shapes, digests and class names."""
        from cnnjax.data.datasets import load_dataset

        dataset = load_dataset(self.dataset, self.data_dir)
        print(f"{dataset.name}, from {dataset.source}, in {dataset.folder}")
        for split, sha256 in dataset.sha256.items():
            shape = "×".join(map(str, dataset.load(split).image.shape))
            print(f"  {split}: {shape}, SHA-256 {sha256}")
        print(f"  {dataset.num_classes} classes: {', '.join(dataset.class_names)}")


@dataclass(frozen=True)
class _Train:
    """Train a network, validate each epoch, and score it on the test set once at the end."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with 0, or with 2 and a message if the user has to fix something."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Any] = {"train": _Train, "eval": Eval, "predict": Predict, "data": Data, "runs": Runs}
    commands |= {"verify": Verify, "reproduce": Reproduce, "diff": Diff, "compare": Compare}

    def parse() -> Any:
        if arguments[:1] == ["train"]:  # Its options depend on the network, so that it imports Flax.
            from cnnjax.cli.experiment import Experiment, load_experiment
            from cnnjax.cli.train_command import parse_train
            from cnnjax.config import Config

            named = len(arguments) > 1 and not arguments[1].startswith("-")
            experiment = load_experiment(arguments[1]) if named else Experiment(Config(), {})
            prog = " ".join(["cnnjax", *arguments[: 1 + named]])
            return parse_train(experiment, arguments[1 + named :], prog=prog)
        return tyro.extras.subcommand_cli_from_dict(
            commands, args=arguments, prog="cnnjax", description="Train image classifiers with JAX and Flax."
        )

    _run(parse)


def run_experiment(config: "Config") -> None:
    """Runs an experiment file: trains `config`, any value of which can be changed on the command line.

    Raises:
      SystemExit: 0 at the end; 2 with a message if the user has to fix something.
    """
    from cnnjax.cli.experiment import experiment_of
    from cnnjax.cli.train_command import parse_train

    _run(lambda: parse_train(experiment_of(sys.modules["__main__"], config), sys.argv[1:]))


def _run(parse: "Callable[[], Train | Any]") -> None:
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Messages of tfds and Orbax that do not help users.
    # An error in a thread of Orbax is raised again where the loop waits for it.
    threading.excepthook = lambda args: None
    try:
        status = parse()()
    except Interrupted as stop:
        again = [*sys.orig_argv, *([] if "--resume" in sys.orig_argv else ["--resume"])]
        _fail(f"{stop} Resume with:\n  {shlex.join(again)}", REQUEUE)
    except StorageError as error:
        _fail(str(error), 1)
    except UserError as error:
        _fail(str(error), 2)
    except OSError as error:  # A full disk, a missing permission: the system's message names the file.
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("Stopped at once; everything since the last checkpoint is lost.", 130)
    if status:
        raise SystemExit(status)


def _fail(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(status)
