"""The commands that the report names."""

import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from cnnjax.cli.experiment import has_config
from cnnjax.runs.manifest import read_manifest
from cnnjax.runs.records import read_record
from cnnjax.runs.run import Run


def command_for(run: Run, name: str, data_dir: Path | None = None) -> str:
    """Returns the command `cnnjax NAME RUN`, with the options --experiment and --data-dir if the run needs them.

    Args:
      name: of a command that has both options.
      data_dir: the tfds directory; that of the command that trained the run if None.
    """
    command = read_manifest(run.run_dir)["sessions"][-1]["command"]
    own = read_record(run.run_dir).files
    experiment = _experiment(command, [*own]) if own or isinstance(run.config.dataset, tuple) else None
    options = {"--experiment": experiment, "--data-dir": str(data_dir) if data_dir else _option(command, "--data-dir")}
    words = [word for option, value in options.items() if value is not None for word in (option, value)]
    return shlex.join(["cnnjax", name, str(run.run_dir), *words])


def resume_command(run: Run) -> str | None:
    """Returns the command that resumes a run, or None if neither `cnnjax` nor an experiment file trained it."""
    command = read_manifest(run.run_dir)["sessions"][-1]["command"]
    starts = [i for i, (program, name) in enumerate(pairwise(command)) if _trains(program, name)]
    if starts:
        command = ["cnnjax", *command[starts[0] + 1 :]]
    elif not any(word.endswith(".py") and has_config(Path(word)) for word in command[1:2]):
        return None
    if _option(command, "--seeds") is None and _option(command, "--run-dir") is None:
        command = [*command, "--run-dir", str(run.run_dir)]
    return shlex.join(command if "--resume" in command else [*command, "--resume"])


def _trains(program: str, command: str) -> bool:
    return Path(program).stem == "cnnjax" and command in ("train", "reproduce")


def _experiment(command: Sequence[str], files: Sequence[str]) -> str:
    """Returns the experiment of a run with classes or data of its own, or a placeholder if it is not known.

    Args:
      command: that trained it.
      files: those that define its classes and functions, among them modules that the experiment imports.
    """
    if (given := _option(command, "--experiment")) is not None:  # Of `cnnjax reproduce`.
        return given
    for program, train, name in zip(command, command[1:], command[2:], strict=False):
        if Path(program).stem == "cnnjax" and train == "train" and not name.startswith("-"):
            return name
    script = [word for word in command[1:] if word.endswith(".py")][:1]  # `run_experiment`.
    return next((file for file in (*script, *files) if has_config(Path(file))), "EXPERIMENT.py")


def _option(command: Sequence[str], name: str) -> str | None:
    """Returns the last value of an option, given as --name VALUE or --name=VALUE."""
    found = None
    for word, following in zip(command, [*command[1:], None], strict=True):
        option, equals, value = word.partition("=")
        if option.replace("_", "-") == name:
            found = value if equals else following
    return found
