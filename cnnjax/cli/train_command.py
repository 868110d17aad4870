"""The command `cnnjax train`, whose options are the fields of a `Config` and of the objects that it holds."""

import dataclasses
import difflib
import inspect
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec, StructConstructorSpec

from cnnjax.cli.experiment import PARTS, Experiment
from cnnjax.cli.help_text import make_registry
from cnnjax.cli.launch import follow_launcher, is_launched, launch
from cnnjax.config import Config, word
from cnnjax.errors import UserError, check, check_name, unknown_name, user_code
from cnnjax.process.settings import use_compilation_cache
from cnnjax.process.signals import REQUEUE, Interrupted
from cnnjax.runs.loggers import Logger, check_loggers

_ABBREVIATIONS = {"lr": "learning-rate", "bs": "batch-size", "wd": "weight-decay"}


@dataclass(frozen=True)
class Train:
    """Train a network, validate each epoch, and score it on the test set once at the end.

    The defaults of `cnnjax train EXPERIMENT` come from experiments/EXPERIMENT.py, or from a file EXPERIMENT.py. Ctrl-C,
    SIGTERM and a closed terminal (SIGHUP) save, print the command that resumes, and exit with 75.
    """

    config: Annotated[Config, arg(name="")] = field(default_factory=Config)
    seeds: str | None = None
    """Train with many seeds in one process, 0:10 (0 to 9) or 0,3,7, and print the mean and its 95% interval."""
    run_dir: Path | None = None
    """The run directory, runs/NAME-seedSEED by default, or runs/NAME_DATASET-seedSEED on another data set than that of
    the experiment; with --seeds, the folder of the runs."""
    data_dir: Path | None = None
    """The tfds directory; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""
    resume: bool = False
    """Resume the run in the run directory exactly where it stopped (or train longer, at a constant learning rate)."""
    stream: bool | None = None
    """Read the images from disk while training, with --stream; or keep them in memory, with --no-stream. Otherwise they
    are streamed if they would take more than half of the memory and are in ArrayRecord format. On a CPU this changes no
    bit of the result."""
    log: tuple[Logger, ...] = ()
    """Where else to record the run: tensorboard (files in RUN/tensorboard), wandb (Weights & Biases), mlflow, or a
    subclass of Logger in the experiment file. Does not change the result."""
    profile: str | None = None
    """Trace the steps from A to B, given as A:B, into RUN/profile for XProf, and print what they spend their time on.
    10:20 are the ten steps after the tenth; on an accelerator, where an epoch of images in memory is one program, all
    of its steps."""
    mesh: str | None = None
    """How devices share each batch: data=8 divides it among eight, each with a copy of the parameters; so does
    data=4,model=2, where pairs of devices also divide large arrays of parameters and optimizer state. By default as
    many devices as divide the batch, with copies. With --seeds, the devices of each seed, one by default."""
    report: bool = True
    """Write a report on the run at the end, RUN/report.html; with --seeds, one on all of them."""
    checkpoint_seconds: float = 60.0
    """Save during an epoch, too, this long after the last save: the most that a power failure costs. Changes no bit.

    On an accelerator an epoch of images in memory is one program, so only its end is saved."""
    processes: int | None = None
    """Train in this many processes on this machine, which share its CPU cores, as on several hosts: to try that out.
    A GPU machine needs one process for all of its GPUs."""
    coordinator: str | None = None
    """HOST:PORT on which process 0 listens, for training on several hosts: run the same command on each of them, with
    its own --process-id. $JAX_COORDINATOR_ADDRESS by default; under Slurm, Open MPI and Cloud TPU none is needed."""
    num_processes: int | None = None
    """The number of processes on all hosts; $JAX_NUM_PROCESSES by default."""
    process_id: int | None = None
    """The number of this process, from 0; $JAX_PROCESS_ID by default."""
    host_timeout: float = 60.0
    """Seconds without an answer from a process after which the others stop, with exit code 75."""

    def __post_init__(self) -> None:
        check("checkpoint_seconds", "a number of at least 0", self.checkpoint_seconds >= 0, self.checkpoint_seconds)
        check_loggers(self.log)

    def __call__(self) -> None:
        """Trains, and prints the result."""
        given = (self.coordinator, self.num_processes, self.process_id)
        if self.processes is not None and not is_launched():
            rule = "left out with --coordinator, --num-processes and --process-id"
            check("processes", rule, given == (None, None, None), self.processes)
            raise SystemExit(launch(self.processes, grace_seconds=self.host_timeout + 30))
        follow_launcher(self.host_timeout + 30)
        from cnnjax.hosts import connect

        with connect(*given, host_timeout=self.host_timeout) as hosts:
            try:
                self._train(hosts)
            except Interrupted as error:
                if hosts.leads:
                    raise
                hosts.close(error)
                raise SystemExit(REQUEUE) from None  # Process 0 has said how to resume.

    def _train(self, hosts: Any) -> None:
        from cnnjax.class_scores import is_uneven
        from cnnjax.cli.inspection import expand
        from cnnjax.cli.report import report_on_run, report_on_seeds
        from cnnjax.process.console import Report
        from cnnjax.runs.profile import parse_steps
        from cnnjax.runs.statistics import describe
        from cnnjax.seeds import parse_seeds, train_seeds, use_cores
        from cnnjax.sharding import parse_mesh
        from cnnjax.train import train_and_evaluate

        seeds = None if self.seeds is None else parse_seeds(self.seeds)
        profile = None if self.profile is None else parse_steps(self.profile)
        check("profile", "left out with --seeds", profile is None or seeds is None, self.profile)
        rule = "left out with several processes: start one job for each seed"
        check("seeds", rule, seeds is None or hosts.count == 1, self.seeds)
        if seeds is not None:
            use_cores(len(seeds) * (1 if self.mesh is None else math.prod(parse_mesh(self.mesh))))
        report = Report() if hosts.leads else Report(quiet=True)
        use_compilation_cache(report.say)
        options: Any = {"data_dir": self.data_dir, "resume": self.resume, "report": report}
        options |= {"loggers": self.log, "checkpoint_seconds": self.checkpoint_seconds, "mesh": self.mesh}
        options |= {"stream": self.stream}
        if seeds is None:
            run = train_and_evaluate(self.config, run_dir=expand(self.run_dir), profile=profile, **options)
            if self.report and hosts.leads:
                report_on_run(run, self.data_dir, report.say)
            return
        folder = expand(self.run_dir)
        results = train_seeds(self.config, seeds, folder=folder, **options)
        uneven = is_uneven([row["count"] for row in results[0]["classes"]])
        names = ("test_accuracy", *(["test_balanced_accuracy"] if uneven else []))
        scores = {name: [result[name] for result in results] for name in names}
        own = [result.get("test_metrics", {}) for result in results]
        scores |= {f"test_{name}": [x[name] for x in own] for name in own[0] if all(name in x for x in own)}
        for metric, values in scores.items():
            summary = describe(values, metric)
            report.say(f"{len(results)} seed{'s' if len(results) > 1 else ''}, {self.seeds}: {summary}")
        if self.report:
            report_on_seeds(self.config, seeds, folder, self.data_dir, report.say)


def parse_train(experiment: Experiment, arguments: Sequence[str], prog: str | None = None, command: Any = Train) -> Any:
    """Parses the options of `cnnjax train`, or of another command with a field `config`.

    The words after --model, --optim and --augment choose a class, which then determines the options.
    """
    config, arguments = experiment.config, list(arguments)
    flags = {"--stream": "--stream=True", "--no-stream": "--stream=False"}  # tyro makes flags of plain booleans only.
    following = [*arguments, "-"][1:]  # It may also have a value, as --help shows.
    arguments = [
        flags.get(argument, argument) if after.startswith("-") else argument
        for argument, after in zip(arguments, following, strict=True)
    ]
    for part in PARTS:
        config = _choose(config, part, experiment.words(part), arguments)
    given = {argument.partition("=")[0] for argument in arguments}
    own = config.dataset
    if "--dataset" in given and dataclasses.is_dataclass(own):  # Else its fields are options.
        config = dataclasses.replace(config, dataset="cifar10")
    logs = sum(argument.partition("=")[0] == "--log" for argument in arguments)
    check("--log", "given once, with all names", logs < 2, f"{logs} times")
    if several := re.search(r"(?<!\S)--seed[= ](\d+[:,]\S*)", " ".join(arguments)):
        check("seed", "one number", False, f"{several[1]}. Several seeds are --seeds {several[1]}")
    check("seed", "left out with --seeds", not {"--seed", "--seeds"} <= given, "both")
    words = "\n".join(f"--{part} {'|'.join(experiment.words(part))}" for part in PARTS)
    classes = f"The classes of network, optimizer and augmentation, whose options follow:\n{words}"
    description = f"{inspect.getdoc(command)}\n\n{classes}"
    registry = make_registry()
    registry.struct_rule(_opaque)
    registry.primitive_rule(_dataset)
    registry.primitive_rule(_image_size)
    registry.primitive_rule(partial(_logger, words=experiment.words("log")))
    options: Any = {"prog": prog, "description": description, "registry": registry}
    default = command(config)
    train, unknown = tyro.cli(command, default=default, args=arguments, return_unknown_args=True, **options)
    if unknown:
        raise _unknown_option(unknown, arguments, [*_options(default)])
    if config.name and "--name" not in given and "--dataset" in given and train.config.dataset != own:
        named = dataclasses.replace(train.config, name=f"{config.name}_{train.config.dataset_word}")
        train = dataclasses.replace(train, config=named)
    return train


def _options(x: Any, prefix: str = "--") -> Iterator[str]:
    """Yields the options that set the fields of a dataclass and of those in it, and choose a part."""
    for f in dataclasses.fields(x):
        name, value = prefix + f.name.replace("_", "-"), getattr(x, f.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from [name] if f.name in (*PARTS, "dataset") else []
            yield from _options(value, prefix if f.name == "config" else f"{name}.")
        elif prefix != "--" and f.name in ("parent", "name"):  # Flax's own.
            continue
        elif value is not None or f.type is not Any:  # Else it may only be set in Python.
            yield name


def _unknown_option(unknown: Sequence[str], arguments: Sequence[str], known: Sequence[str]) -> UserError:
    """Returns the error for those of the arguments that belong to no option. It suggests options with near words."""
    options = [x for x in unknown if x.startswith("-")]
    if not options:
        last = max((i for i, x in enumerate(arguments) if x == unknown[0]), default=0)
        before = arguments[:last]
        start = max((i for i, x in enumerate(before) if x.startswith("-")), default=len(before))
        got = repr(unknown[0]) + (f" after {shlex.join(before[start:])}" if before[start:] else "")
        fix = "--help shows the form of each value; quote one that contains spaces."
        return UserError(f"An argument must be an option or its value, got {got}. {fix}")
    given = options[0].partition("=")[0]
    names: dict[str, list[str]] = {}
    for option in known:
        names.setdefault(re.split(r"--|\.", option)[-1], []).append(option)
    last = re.split(r"--|\.", given)[-1].replace("_", "-").lower()
    close = [_ABBREVIATIONS[last]] if last in _ABBREVIATIONS else difflib.get_close_matches(last, names)
    near = [option for name in close for option in names.get(name, ())]
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    fix = f"{hint}--help lists those of the chosen network, optimizer and augmentation."
    return UserError(f"An option must be a known name, got {given}. {fix}")


def _choose(config: Config, part: str, words: dict[str, type], arguments: list[str]) -> Config:
    """Replaces a part of the configuration by the class whose word is in `arguments`, and removes the word.

    The fields of the base class (a learning rate, flips) keep their values.
    """
    option = f"--{part}"
    given = [argument for argument in arguments if argument.partition("=")[0] == option]
    check(option, "given once", len(given) < 2, f"{len(given)} times")
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != option:
            continue
        if not equals:
            value = arguments[i + 1] if i + 1 < len(arguments) else ""
        if value not in words:
            raise unknown_name(part, value, words)
        del arguments[i : i + (1 if equals else 2)]
        old, base = getattr(config, part), PARTS[part]
        if type(old) is words[value]:
            return config
        kept = {f.name: getattr(old, f.name) for f in dataclasses.fields(base)} if part != "model" else {}
        return dataclasses.replace(config, **{part: words[value](**kept)})
    return config


def _opaque(info: Any) -> StructConstructorSpec | None:
    """Hides a field whose value is a function or class: it cannot be written on a command line."""
    value = info.default
    if not callable(value) or dataclasses.is_dataclass(value):
        return None
    return StructConstructorSpec(instantiate=lambda: value, fields=())


def _logger(info: Any, words: dict[str, type]) -> PrimitiveConstructorSpec[Any] | None:
    """Parses a logger from the word of its class."""
    if info.type is not Logger:
        return None

    def make(args: list[str]) -> Logger:
        name = args[0]
        if name in words and _needs_arguments(words[name]):
            cls = words[name].__name__
            raise UserError(
                f"`log` must be the name of a logger that can be made without arguments, got {name!r}. Give defaults "
                f"to the parameters of {cls}, or pass loggers=[{cls}(...)] in Python."
            )
        check_name("log", name, [other for other, cls in words.items() if not _needs_arguments(cls)])
        with user_code(f"The constructor of the logger {name}"):
            return words[name]()

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME",
        instance_from_str=make,
        is_instance=lambda x: isinstance(x, Logger),
        str_from_instance=lambda x: [word(type(x))],
    )


def _needs_arguments(cls: type) -> bool:
    try:
        inspect.signature(cls).bind()
    except TypeError:
        return True
    except ValueError:  # It has no signature.
        pass
    return False


def _dataset(info: Any) -> PrimitiveConstructorSpec[Any] | None:
    """Parses the field `dataset`, which may also be arrays or a function, from a name."""
    if info.type != Config.__dataclass_fields__["dataset"].type:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME",
        instance_from_str=lambda args: args[0],
        is_instance=lambda x: True,
        str_from_instance=lambda x: [x if isinstance(x, str) else getattr(x, "__name__", "(arrays)")],
    )


def _image_size(info: Any) -> PrimitiveConstructorSpec[Any] | None:
    """Parses the field `image_size` from "128", "96 128" or "96x128"."""
    if info.type != Config.__dataclass_fields__["image_size"].type:
        return None

    def make(args: list[str]) -> int | tuple[int, ...] | None:
        if args == ["None"]:
            return None
        sizes = re.split("[x× ]", " ".join(args))
        valid = len(sizes) <= 2 and all(re.fullmatch("[0-9]{1,9}", size) for size in sizes)
        check("image_size", "one number, or height and width, such as 96 128", valid, " ".join(args) or "nothing")
        return int(sizes[0]) if len(sizes) == 1 else tuple(map(int, sizes))

    return PrimitiveConstructorSpec(
        nargs=(1, 2),
        metavar="SIZE|HEIGHT WIDTH|HEIGHTxWIDTH",
        instance_from_str=make,
        is_instance=lambda x: x is None or isinstance(x, (int, tuple)),
        str_from_instance=lambda x: [*map(str, x)] if isinstance(x, tuple) else [str(x)],
    )
