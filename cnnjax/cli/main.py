"""The command line: train | eval | predict | data, and those of `inspection`. Imports jax only if needed."""

import atexit
import errno
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from tyro.conf import Positional

from cnnjax.cli.inspection import Compare, Diff, Reproduce, Runs, Verify, config_of
from cnnjax.cli.process import keep_memory
from cnnjax.cli.signals import Interrupted, ignore_signals, stop_signals
from cnnjax.cli.streams import OutputError, guarded_streams, quote
from cnnjax.cli.tables import accuracies, class_lines, printable
from cnnjax.errors import UserError, check, messages_for_shell

if TYPE_CHECKING:
    from cnnjax.config import Config

# The exit code of a run that a signal stopped and --resume continues: EX_TEMPFAIL of sysexits.h, for schedulers.
REQUEUE = 75


@dataclass(frozen=True)
class Eval:
    """Score a trained network on every image of a split, and on those of each class."""

    run: Positional[Path]
    """The run directory."""
    split: Literal["test", "validation"] = "test"
    """The split; validation is the validation split of the data, or else the part of the training split that was held
    out."""
    data_dir: Path | None = None
    """The tfds directory; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""
    experiment: str | None = None
    """The experiment file, if the run has classes or data of its own."""

    def __call__(self) -> None:
        """Prints the scores of the classes, accuracy and loss."""
        from cnnjax.class_scores import class_scores, confusion_matrix, is_uneven
        from cnnjax.runs.run import load_run

        run = load_run(self.run, config_of(self.run, self.experiment))
        scores = run.evaluate(self.split, data_dir=self.data_dir)
        names = run.facts.class_names
        classes, matrix = class_scores(scores.confusion, len(names)), confusion_matrix(scores.confusion, len(names))
        rest = f"In Python, load_run({str(self.run)!r}).evaluate({self.split!r}) counts all of them."
        for line in class_lines(classes.rows(names), matrix, classes.means(), rest):
            print(line)
        unfinished = "" if run.result else ", which is not finished"
        score = accuracies(scores.accuracy, scores.balanced_accuracy, is_uneven(classes.num_examples.tolist()))
        print(
            f"{self.split} {score}, loss {scores.loss:.4f}, on all "
            f"{scores.num_examples:,} images ({self.run}{unfinished})"
        )


@dataclass(frozen=True)
class Predict:
    """Print the most probable classes of image files of any size and format.

    A file that cannot be read has a line on standard error. The others are classified all the same, and the exit code
    is 2. The first frame of an animation counts.
    """

    run: Positional[Path]
    """The run directory."""
    images: Positional[tuple[Path, ...]]
    """The image files; -- before a name that begins with a hyphen."""
    top: int = 3
    """Number of classes to print."""
    invert: bool = False
    """Swap dark and bright first: for dark digits on white paper, if the training images are the reverse."""
    experiment: str | None = None
    """The experiment file, if the run has classes or data of its own."""

    def __call__(self) -> int:
        """Prints one line per file."""
        from cnnjax.data.image_files import read_image
        from cnnjax.runs.run import load_run

        check("images", "at least one file", bool(self.images), "none")
        check("top", "at least 1", self.top >= 1, self.top)
        run = load_run(self.run, config_of(self.run, self.experiment))
        status, facts = 0, run.facts
        for path in self.images:
            try:
                image = read_image(path, facts.image_shape, facts.resize, facts.interpolation)
            except UserError as error:
                print(printable(error), file=sys.stderr)
                status = 2
                continue
            color = image[..., : 1 if image.shape[-1] < 3 else 3]  # Without the alpha channel.
            if self.invert:
                color ^= 255
            elif color.mean() > 2 * max(facts.mean[: color.shape[-1]]):
                print(f"{printable(path)} is much brighter than the training images; try --invert", file=sys.stderr)
            probability = run.predict(image[None])[0]
            top = (-probability).argsort(kind="stable")[: self.top]
            classes = ", ".join(f"{facts.class_names[k]} {probability[k]:.1%}" for k in top)
            print(f"{printable(path)}: {classes}")
        return status


@dataclass(frozen=True)
class Data:
    """Download, check and prepare a data set, and describe it; or check a folder of images, and report on it."""

    dataset: Positional[str]
    """mnist, fashion_mnist, cifar10, cifar100, or any image classification set of TensorFlow Datasets; or the path of a
    folder of images, or of a .csv or .jsonl file with the columns path and label."""
    data_dir: Path | None = None
    """The tfds directory; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""

    def __call__(self) -> None:
        """Prints source, folder, shapes, digests and class names; or the report on a folder of images."""
        from cnnjax.data.datasets import is_path, load_dataset
        from cnnjax.data.folders import absolute, default_data_dir

        data_dir = default_data_dir() if self.data_dir is None else absolute(self.data_dir)
        if is_path(self.dataset, data_dir, print):
            from cnnjax.data.image_folder import check_folder

            return check_folder(Path(os.path.expanduser(self.dataset)), data_dir)
        dataset = load_dataset(self.dataset, data_dir)
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

    resumable = arguments[:1] in (["train"], ["reproduce"])
    _run(parse, resumable, process_ends=argv is None)


def run_experiment(config: "Config") -> None:
    """Runs an experiment file: trains `config`, any value of which can be changed on the command line.

    Raises:
      SystemExit: 0 at the end; 2 with a message if the user has to fix something.
    """
    from cnnjax.cli.experiment import check_not_loading, experiment_of
    from cnnjax.cli.train_command import parse_train

    check_not_loading()
    atexit.register(ignore_signals)  # At the end of the process they would hide its exit code.
    _run(lambda: parse_train(experiment_of(sys.modules["__main__"], config), sys.argv[1:]), resumable=True)


def _run(parse: Callable[[], Any], resumable: bool, process_ends: bool = False) -> None:
    keep_memory()
    for name in ("absl", "PIL"):  # Messages of tfds that do not help users; those of Pillow do not name the file.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with messages_for_shell(), guarded_streams(), stop_signals(process_ends) if resumable else nullcontext() as stop:

        def run() -> Any:
            if stop is None:
                return parse()()
            with stop.held():  # An exception while an extension module is imported can crash the process.
                command = parse()
                import_module("cnnjax.train")
            return command()

        status, flushed = _status(run, resumable), _status(sys.stdout.flush, resumable)
    if status or flushed:
        raise SystemExit(status or flushed)


def _status(run: Callable[[], Any], resumable: bool) -> Any:
    """Returns the exit status of `run`, or prints why it failed, and returns the status for that."""
    try:
        return run()
    except SystemExit as stopped:  # Of tyro.
        return stopped.code
    except Interrupted as stop:
        message, status = f"{stop} Resume with:\n  {_resume_command()}", REQUEUE
    except OutputError as error:
        if error.errno == errno.EPIPE:  # As in `cnnjax runs | head -1`.
            return 128 + signal.SIGPIPE  # The status of programs that it ends.
        message, status = f"Standard output cannot be written: {error.strerror}.", 1
    except UserError as error:
        message, status = str(error), 1 if isinstance(error, OSError) else 2
    except OSError as error:  # A full disk, a missing permission.
        named = f"{error.filename} cannot be used: {error.strerror}. Check its permissions, and the disk."
        message, status = named if error.filename and error.strerror else str(error), 1
    except ValueError as error:  # jax reads its environment variables when it is imported.
        if "jax" in sys.modules:
            raise
        message, status = f"jax refuses an environment variable: {str(error).rstrip('.')}. Correct or unset it.", 2
    except (ImportError, MemoryError, RuntimeError) as error:  # The limits of `ulimit -v` and `ulimit -u`.
        if not re.search("failed to map segment|allocate memory|start new thread|MemoryError", repr(error)):
            raise
        message, status = f"The process ran out of memory or threads ({error!r}). Raise ulimit -v or -u.", 1
    except KeyboardInterrupt:
        lost = " Everything since the last checkpoint is lost." if resumable else ""
        message, status = f"Stopped at once.{lost}", 130
    print(message, file=sys.stderr)
    return status


def _resume_command() -> str:
    """Returns the command of this process with --resume, or that of make if it was started by the Makefile."""
    encoding, resume = sys.stderr.encoding, [] if "--resume" in sys.orig_argv else ["--resume"]
    if (own := os.environ.get("CNNJAX_MAKE")) is None:
        # As it was typed; the console script is started by way of python.
        typed = sys.argv if Path(sys.argv[0]).name == "cnnjax" else sys.orig_argv
        return " ".join(quote(argument, encoding) for argument in [*typed, *resume])
    folder = ["-C", os.getcwd()] if "-C" in own.split() else []
    values = {name: os.environ.get(name, "") for name in (*own.split(), "ARGS") if name != "-C"}
    values["ARGS"] = " ".join(filter(None, [values["ARGS"], *resume]))
    variables = [f"{name}={quote(value.replace('$', '$$'), encoding)}" for name, value in values.items()]
    return " ".join(["make", *(quote(word, encoding) for word in folder), "train", *variables])
