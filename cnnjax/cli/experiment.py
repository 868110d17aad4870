"""Experiment files: Python files with a CONFIG, perhaps with classes and functions of their own."""

import dataclasses
import sys
from importlib.machinery import SourceFileLoader
from inspect import isabstract
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn

from cnnjax.config import Config, word
from cnnjax.data.augment import Augment
from cnnjax.errors import UserError, unknown_name
from cnnjax.optim.optimizer import Optimizer
from cnnjax.runs import codec

# The parts of a configuration that can be chosen by a word, and their base classes.
PARTS = {"model": nn.Module, "optim": Optimizer, "augment": Augment}


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
        """Returns the classes that can be chosen for a part of the configuration, by their words."""
        found: dict[str, type] = {}
        for x in (*codec.built_in().values(), type(getattr(self.config, part)), *self.classes):
            if isinstance(x, type) and issubclass(x, PARTS[part]) and not isabstract(x):
                if (other := found.get(word(x), x)) is not x and other in self.classes:
                    raise UserError(f"The classes of an experiment must have distinct words, got {word(x)!r} twice.")
                found[word(x)] = x
        return found


def find_experiment(name: str) -> Path:
    """Returns the path of an experiment file: experiments/<name>.py, or `name` itself if it ends in .py.

    Raises:
      UserError: there is no such file.
    """
    path = Path(name) if name.endswith(".py") else Path("experiments", f"{name}.py")
    if not path.is_file():
        files = [
            path
            for path in (*Path("experiments").glob("*.py"), *Path().glob("*.py"))
            if "CONFIG = " in path.read_text()
        ]
        known = [path.stem if path.parent.name else path.name for path in files]
        raise unknown_name("EXPERIMENT", name, known or ["(there is no file with a CONFIG in experiments/)"])
    return path


def load_experiment(name: str) -> Experiment:
    """Runs an experiment file as a Python program.

    Raises:
      UserError: there is no such file, or it has no CONFIG.
    """
    path = find_experiment(name)
    module = ModuleType(f"cnnjax_experiment_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # `inspect` finds the docstrings of options there.
    sys.path.insert(0, str(path.resolve().parent))  # As Python does for a file that it runs.
    SourceFileLoader(module.__name__, str(path)).exec_module(module)
    return experiment_of(module, getattr(module, "CONFIG", None))


def experiment_of(module: ModuleType, config: Any) -> Experiment:
    """Returns the experiment of a module that has run.

    Raises:
      UserError: `config` is not a `Config`.
    """
    path = Path(getattr(module, "__file__", None) or "")
    if not isinstance(config, Config):
        raise UserError(f"`EXPERIMENT` must be a file with a CONFIG of type Config, got {path}.")
    if not config.name and path.suffix == ".py":
        config = dataclasses.replace(config, name=path.stem)
    values = vars(module).values()
    classes = tuple(x for x in values if isinstance(x, type) and x.__module__ == module.__name__)
    return Experiment(config, codec.collect_names(config, values), classes)
