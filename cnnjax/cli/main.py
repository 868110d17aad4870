"""The command line, which chooses among the commands of this package. Imports jax only if needed."""

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
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional, arg

from cnnjax import __version__
from cnnjax.cli.export import Export
from cnnjax.cli.help_text import make_registry
from cnnjax.cli.inspection import Compare, Diff, Reproduce, Runs, Verify
from cnnjax.cli.launch import is_launched
from cnnjax.cli.predict import Eval, Predict
from cnnjax.cli.report import WriteReport
from cnnjax.errors import MissingProcessError, UserError, messages_for_shell
from cnnjax.process.settings import keep_memory, write_exit_code
from cnnjax.process.signals import REQUEUE, Interrupted, acknowledged_ctrl_c, ignore_signals, stop_signals
from cnnjax.process.streams import OutputError, guarded_streams, quote

if TYPE_CHECKING:
    from cnnjax.config import Config


@dataclass(frozen=True)
class Data:
    """Download, check and prepare a data set, and describe it; or check a folder of images, and report on it."""

    dataset: Positional[Annotated[str, arg(metavar="DATASET")]]
    """mnist, fashion_mnist, cifar10, cifar100, or any image classification set of TensorFlow Datasets; or the path of a
    folder of images, or of a .csv or .jsonl file with the columns path and label."""
    data_dir: Path | None = None
    """The tfds directory; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""

    def __call__(self) -> None:
        """Prints source, folder, shapes, digests and class names; or the report on a folder of images.

        Images of several sizes are not decoded: of them, only the number is printed.
        """
        from cnnjax.data.datasets import is_path, load_dataset
        from cnnjax.data.folders import absolute, default_data_dir
        from cnnjax.data.tfds_format import inspect_set

        data_dir = default_data_dir() if self.data_dir is None else absolute(self.data_dir)
        if is_path(self.dataset, data_dir, print):
            from cnnjax.data.image_folder import check_folder

            return check_folder(Path(os.path.expanduser(self.dataset)), data_dir)
        name = self.dataset.strip("/")
        if _print_if_of_several_sizes(name, data_dir):
            return None
        dataset = load_dataset(name, data_dir)
        folder: Any = dataset.folder  # Not None, because the set has a name.
        print(f"{dataset.name}, from {dataset.source}, in {folder}")
        counts, _ = inspect_set(folder)
        for split, sha256 in dataset.sha256.items():
            shape = "×".join(map(str, (counts[split], *dataset.image_shape)))
            print(f"  {split}: {shape}, SHA-256 {sha256}")
        _print_classes(dataset.class_names)


def _print_if_of_several_sizes(name: str, data_dir: Path) -> bool:
    """Describes a set whose images have several sizes, and returns whether it is one.

    Without --image-size, its images cannot be decoded into arrays.
    """
    from cnnjax.data.named import NAMED_SETS
    from cnnjax.data.prepared import prepare_tfds
    from cnnjax.data.tfds_format import class_names, inspect_set

    if name.partition(":")[0] in NAMED_SETS:
        return False
    folder = prepare_tfds(name, data_dir, print)
    counts, one_size = inspect_set(folder)
    if one_size:
        return False
    print(f"{name}, in {folder}")
    for split, count in counts.items():
        print(f"  {split}: {count} images of any size")
    _print_classes(class_names(folder))
    return True


def _print_classes(names: Sequence[str]) -> None:
    print(f"  {len(names)} classes: {', '.join(names)}")


@dataclass(frozen=True)
class _Train:
    """Train a network, validate each epoch, and score it on the test set once at the end."""


@dataclass(frozen=True)
class _LrFind:
    """Find a learning rate: raise it from step to step until the loss diverges, and plot the loss."""


@dataclass(frozen=True)
class _Summary:
    """Print the layers of a network with output shapes, parameters and floating-point operations per image."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with 0, or with 2 and a message if the user has to fix something."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Any] = {
        "train": _Train,
        "eval": Eval,
        "predict": Predict,
        "report": WriteReport,
        "export": Export,
        "data": Data,
        "runs": Runs,
        "compare": Compare,
        "diff": Diff,
        "verify": Verify,
        "reproduce": Reproduce,
        "summary": _Summary,
        "lr-find": _LrFind,
    }

    def parse() -> Any:
        if arguments == ["--version"]:
            return lambda: print(f"cnnjax {__version__}")
        if arguments[:1] in (["train"], ["lr-find"], ["summary"]):  # Their options depend on the network: Flax.
            return _parse_experiment(*arguments)
        if arguments[:1] in (["-h"], ["--help"]):
            for name, command in commands.items():  # The rest is in the help on each command.
                commands[name] = dataclass(type(name, (), {"__doc__": command.__doc__.partition("\n\n")[0]}))
        about = "Train image classifiers with JAX and Flax. --version prints the version."
        return tyro.extras.subcommand_cli_from_dict(
            commands, args=arguments, prog="cnnjax", description=about, registry=make_registry()
        )

    resumable = arguments[:1] in (["train"], ["reproduce"])
    _run(parse, resumable, process_ends=argv is None)


def _parse_experiment(name: str, *arguments: str) -> Any:
    """Parses a command whose options are the fields of a configuration."""
    from cnnjax.cli.experiment import Experiment, load_experiment
    from cnnjax.cli.lr_find import LrFind
    from cnnjax.cli.summary import Summary, SummaryOfExperiment, is_of_experiment
    from cnnjax.cli.train_command import Train, parse_train
    from cnnjax.config import Config

    if name == "summary" and not is_of_experiment(arguments):
        return tyro.cli(Summary, args=arguments, prog="cnnjax summary", registry=make_registry())
    named = bool(arguments) and not arguments[0].startswith("-")
    experiment = load_experiment(arguments[0]) if named else Experiment(Config(), {})
    prog = " ".join(["cnnjax", name, *arguments[:named]])
    command = {"train": Train, "lr-find": LrFind, "summary": SummaryOfExperiment}[name]
    return parse_train(experiment, arguments[named:], prog=prog, command=command)


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
            # Ctrl-C reaches the processes that this one launches, too; one of them says so.
            with nullcontext() if is_launched() else acknowledged_ctrl_c(stop):
                with stop.held():  # An exception while an extension module is imported can crash the process.
                    command = parse()
                    import_module("cnnjax.train")
                return command()

        status, flushed = _status(run, resumable), _status(sys.stdout.flush, resumable)
        code = status or flushed or 0
        write_exit_code(code)
        if stop is not None:
            stop.exit_code = code if isinstance(code, int) else 1
    if code:
        if process_ends and isinstance(code, int) and "cnnjax.hosts" in sys.modules:
            sys.modules["cnnjax.hosts"].end_process(code)
        raise SystemExit(code)


def _status(run: Callable[[], Any], resumable: bool) -> Any:
    """Returns the exit status of `run`, or prints why it failed, and returns the status for that."""
    try:
        return run()
    except SystemExit as stopped:  # Raised by tyro.
        return stopped.code
    except Interrupted as stop:
        message, status = f"{stop} {_how_to_resume()}".rstrip(), REQUEUE
    except OutputError as error:
        if error.errno == errno.EPIPE:  # As in `cnnjax runs | head -1`.
            return 128 + signal.SIGPIPE  # The status of programs that it ends.
        message, status = f"Standard output cannot be written: {error.strerror}.", 1
    except UserError as error:
        message, status = str(error), 1 if isinstance(error, OSError) else 2
        if isinstance(error, MissingProcessError):
            status = REQUEUE
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
    except KeyboardInterrupt as error:
        lost = str(error) or ("Everything since the last checkpoint is lost." if resumable else "")
        message, status = f"Stopped at once. {lost}".rstrip(), 130
    print(message, file=sys.stderr)
    return status


def _how_to_resume() -> str:
    """Returns the end of a message, with the command that resumes; of several processes, the first one says it."""
    if is_launched() and os.environ.get("JAX_PROCESS_ID") != "0":
        return ""
    return f"Resume with:\n  {_resume_command()}"


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
