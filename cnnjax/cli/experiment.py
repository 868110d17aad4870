"""Experiment files: Python files with a CONFIG, perhaps with classes and functions of their own."""

import dataclasses
import os
import sys
import sysconfig
from contextvars import ContextVar
from importlib.util import decode_source
from inspect import isabstract
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from cnnjax.config import Config, word
from cnnjax.data.augment import Augment
from cnnjax.errors import UserError, describe, unknown_name
from cnnjax.files import open_regular
from cnnjax.network import Network
from cnnjax.optim.optimizer import Optimizer
from cnnjax.runs import codec
from cnnjax.runs.loggers import Logger
from cnnjax.runs.tensorboard import TensorBoard
from cnnjax.runs.trackers import MLflow, WandB

_LOADING = ContextVar("loading", default=False)  # Whether an experiment file is running now.
# The parts of a configuration that can be chosen by a word, and their base classes.
PARTS: dict[str, Any] = {"model": Network, "optim": Optimizer, "augment": Augment}


class Experiment(NamedTuple):
    """An experiment.

    Attributes:
      config: the CONFIG of the file.
      names: what a configuration may name besides cnnjax's own classes, see `codec.decode`.
      classes: the classes that the file defines.
    """

    config: Config
    names: dict[str, Any]
    classes: tuple[type, ...] = ()

    def words(self, part: str) -> dict[str, type]:
        """Returns the classes that can be chosen for a part of the configuration, or for "log", by their words."""
        found: dict[str, type] = {}
        if part == "log":
            base, known = Logger, (TensorBoard, WandB, MLflow)
        else:
            base, known = PARTS[part], (*codec.built_in().values(), type(getattr(self.config, part)))
        for x in (*known, *self.classes):
            if isinstance(x, type) and issubclass(x, base) and x is not Logger and not isabstract(x):
                if (other := found.get(word(x), x)) is not x and other in self.classes:
                    raise UserError(
                        f"The classes of an experiment must have distinct names in lower case, got {other.__name__} "
                        f"and {x.__name__} of {x.__module__}. Rename one of them."
                    )
                found[word(x)] = x
        return found


def find_experiment(name: str) -> Path:
    """Returns the path of an experiment file: `name` itself if it ends in .py; experiments/<name>.py; or <name>.py.

    Raises:
      UserError: there is no such file.
    """
    path, folder = Path(name) if name.endswith(".py") else Path("experiments", f"{name}.py"), Path("experiments")
    for found in (path, Path(f"{name}.py")):
        if os.path.lexists(found):
            return found
    if not name.endswith(".py") and not folder.is_dir():
        raise UserError(
            f"`EXPERIMENT` must be the path of a file, or a name in the folder experiments, got {name!r}, and there is "
            f"no such folder in {Path.cwd()}. Change to the project's folder, or pass the path of a file FILE.py."
        )
    files = [path for path in (*folder.glob("*.py"), *Path().glob("*.py")) if codec.has_config(path)]
    known = [path.stem if path.parent.name else path.name for path in files]
    raise unknown_name("EXPERIMENT", name, known or ["(there is no file with a CONFIG in experiments/)"])


def load_experiment(name: str) -> Experiment:
    """Runs an experiment file as a Python program.

    Raises:
      UserError: there is no such file, it cannot be read, it fails, or it has no CONFIG. The message names the line.
    """
    path = find_experiment(name)
    try:
        with open_regular(path) as file:
            source = file.read()
    except OSError as error:
        raise UserError(f"`EXPERIMENT` must be a file that can be read, got {path} ({error.strerror}).") from error
    module = ModuleType(f"cnnjax_experiment_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # `inspect` finds the docstrings of options there.
    _add_to_path(str(path.resolve().parent))
    token = _LOADING.set(True)
    try:
        exec(compile(decode_source(source), str(path), "exec", dont_inherit=True), vars(module))
    except SystemExit as error:
        raise UserError(f"{describe(error)} An experiment file must define CONFIG and not exit.") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(describe(error, str(path))) from error
    finally:
        _LOADING.reset(token)
    return experiment_of(module, getattr(module, "CONFIG", None))


def check_not_loading() -> None:
    """Checks that no experiment file is being loaded.

    Raises:
      UserError: one is, and has called `run_experiment`.
    """
    if _LOADING.get():
        raise UserError('`run_experiment` must be called below `if __name__ == "__main__":`, got a call without it.')


def _add_to_path(folder: str) -> None:
    """Lets an experiment import the files next to it, as Python does for a file that it runs.

    The standard library stays in front, so that an experiment named random.py does not replace a module of it.
    """
    if folder not in sys.path:
        standard = sysconfig.get_path("stdlib")
        last = [i for i, entry in enumerate(sys.path) if entry in (standard, os.path.join(standard, "lib-dynload"))]
        sys.path.insert(max(last, default=-1) + 1, folder)


def experiment_of(module: ModuleType, config: Any) -> Experiment:
    """Returns the experiment of a module that has run.

    Raises:
      UserError: `config` is not a `Config`.
    """
    path = Path(getattr(module, "__file__", None) or "")
    if not isinstance(config, Config):
        raise UserError(f"`EXPERIMENT` must be a file with a CONFIG of type Config, got {path}.")
    if not config.name and path.suffix == ".py":
        try:
            config = dataclasses.replace(config, name=path.stem)
        except UserError as error:
            raise UserError(f"{error} Rename the file, or set `name` in its CONFIG.") from error
    values = vars(module).values()
    classes = tuple(x for x in values if isinstance(x, type) and x.__module__ == module.__name__)
    return Experiment(config, codec.collect_names(config, values), classes)
