"""The commands that the report names."""

import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from cnnjax.runs.codec import ARRAYS, has_config
from cnnjax.runs.manifest import read_manifest
from cnnjax.runs.records import read_record
from cnnjax.runs.run import Run


def command_for(run: Run, name: str, data_dir: Path | None = None, experiment: str | None = None) -> str:
    """Returns the command `cnnjax NAME RUN`, with the options --experiment and --data-dir if the run needs them.

    It starts `cnnjax` as the command that trained the run.

    Args:
      name: of a command that has both options.
      data_dir: the tfds directory; that of the command that trained the run if None.
      experiment: the experiment file, if the run needs one; as far as that command tells if None.
    """
    command = read_manifest(run.run_dir)["sessions"][-1]["command"]
    record = read_record(run.run_dir)
    own, is_needed = record.files, bool(record.files) or record.config["dataset"] == ARRAYS
    experiment = (experiment or _experiment(command, [*own])) if is_needed else None
    options = {"--experiment": experiment, "--data-dir": str(data_dir) if data_dir else _option(command, "--data-dir")}
    words = [word for option, value in options.items() if value is not None for word in (option, value)]
    program, _ = _split(command) or (["cnnjax"], [])
    return shlex.join([*program, name, str(run.run_dir), *words])


def resume_command(run: Run) -> str | None:
    """Returns the command that resumes a run, or None if neither `cnnjax` nor an experiment file trained it.

    A script that is not found here is taken for an experiment file.
    """
    command = read_manifest(run.run_dir)["sessions"][-1]["command"]
    if parts := _split(command):
        command = [*parts[0], *parts[1]]
    elif not _is_experiment(command):
        return None
    if _option(command, "--seeds") is None:  # It may have been moved.
        command = [*_without(command, "--run-dir"), "--run-dir", str(run.run_dir.resolve())]
    return shlex.join(command if "--resume" in command else [*command, "--resume"])


def _split(command: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """Returns how a command that trains starts `cnnjax`, and the arguments; or None if it does not."""
    for i, (program, name) in enumerate(pairwise(command)):
        if Path(program).stem == "cnnjax" and name in ("train", "reproduce"):
            is_module = i > 1 and command[i - 1] == "-m"
            return [*command[: i + 1]] if is_module else [program], [*command[i + 1 :]]
    return None


def _is_experiment(command: Sequence[str]) -> bool:
    """Returns whether a command of Python may run an experiment file."""
    number = next((i for i, word in enumerate(command) if word.endswith(".py")), 0)
    script = Path(command[number])
    return number > 0 and "-m" not in command[:number] and (not script.exists() or has_config(script))


def _without(command: Sequence[str], name: str) -> list[str]:
    """Returns a command without an option that has a value."""
    kept, is_value = [], False
    for word in command:
        option, equals, _ = word.partition("=")
        if is_value or option.replace("_", "-") == name:
            is_value = not is_value and not equals
        else:
            kept.append(word)
    return kept


def _experiment(command: Sequence[str], files: Sequence[str]) -> str:
    """Returns the experiment of a run with classes or data of its own, or a placeholder if it is not known.

    Args:
      command: that trained it.
      files: those that define its classes and functions, among them modules that the experiment imports.
    """
    if (given := _option(command, "--experiment")) is not None:  # As `cnnjax reproduce` has it.
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
