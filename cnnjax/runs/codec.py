"""A `Config` as JSON, and back. JSON names classes and functions; reading it imports nothing.

A name is looked up among cnnjax's own classes, then among those of an experiment file that the user passes. (dacite and
msgspec build dataclasses from annotations; neither looks up Linen modules by name.)
"""

import dataclasses
import enum
import hashlib
import inspect
import json
import math
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePath
from types import ModuleType, NoneType
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

import cnnjax
from cnnjax.config import Config
from cnnjax.data.augment import Augment
from cnnjax.errors import UserError, for_reader
from cnnjax.fields import show
from cnnjax.files import changes, file_sha256, open_regular
from cnnjax.runs.schema import EncodedConfig
from cnnjax.step import train_step

ARRAYS = "(arrays in memory)"
_LATER = {"metrics": None, "patience": None, "train_step": train_step}  # Fields that older runs lack: their defaults.
OPTIONAL = ("loss", "train_step", "metrics", "augment", "dataset")  # A network predicts without them.


class _MissingNameError(UserError):
    """A class or function that a configuration names is not known."""


class _Missing:
    """Takes the place of a loss, a training step, metrics or data. A call raises the error.

    Attributes:
      recorded: the part of the configuration as JSON.
      message: says what to do.
    """

    recorded: Any
    message: str

    @classmethod
    def of(cls, recorded: Any, message: str, key: str) -> Any:
        """Returns a placeholder for the part `key` of a configuration."""
        kind, name = ("function", "arrays") if recorded == ARRAYS else next(iter(recorded.items()))
        # As `Config.dataset_word` and the report call it.
        named = kind == "function" or key in ("loss", "train_step")
        known = {"__name__": str(name).rpartition(".")[2]} if named else {}
        placeholder = object.__new__(cls)
        vars(placeholder).update(recorded=recorded, message=message, **known)  # An augmentation is frozen.
        return placeholder

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        raise self.error()

    def error(self) -> _MissingNameError:
        """Returns a new error: one that is kept would keep what its traceback refers to."""
        return _MissingNameError(self.message)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Missing) and self.recorded == other.recorded

    def __hash__(self) -> int:
        return hash(json.dumps(self.recorded, sort_keys=True))

    def __repr__(self) -> str:
        return f"<missing: {json.dumps(self.recorded)}>"


class _MissingAugment(_Missing, Augment):
    """Takes the place of an augmentation."""

    @classmethod
    def of(cls, recorded: Any, message: str, key: str) -> Any:
        placeholder = super().of(recorded, message, key)
        vars(placeholder).update({f.name: recorded[f.name] for f in dataclasses.fields(Augment) if f.name in recorded})
        return placeholder

    def transform_pixels(self, key: Any, image: Any) -> Any:
        raise self.error()

    def output_size(self, image_size: Any) -> Any:
        raise self.error()

    def transform(self, key: Any, batch: Any) -> Any:
        raise self.error()

    def at_epoch(self, epoch: int, num_epochs: int) -> Any:
        raise self.error()


def built_in() -> dict[str, Any]:
    """Returns cnnjax's own classes and functions that a configuration may name, by name."""
    # Other functions are not named in it, and import what training does not need, such as charts.
    classes = {f"cnnjax.{name}": getattr(cnnjax, name) for name in dir(cnnjax) if name[0].isupper()}
    found = {name: x for name, x in classes.items() if _is_dataclass(x)}
    functions = (cnnjax.softmax_cross_entropy, cnnjax.conv_general_dilated, train_step)
    return found | {f"cnnjax.{f.__name__}": f for f in functions}


def encode(config: Config, objects: list[Any] | None = None) -> EncodedConfig:
    """Returns the configuration as JSON.

    Args:
      config: the configuration.
      objects: receives the classes and functions that it names.

    Raises:
      UserError: a value is not JSON, a path, an enum, a dataclass, a dtype, or a class or function with a name.
    """
    encoder = _Encoder({id(x): name for name, x in built_in().items()}, [] if objects is None else objects)
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if isinstance(config.dataset, tuple):
        values["dataset"] = ARRAYS  # Identified by their digests.
    for name, default in _LATER.items():
        if values[name] is default:
            del values[name]  # So that it equals a configuration that was recorded before the field existed.
    encoded: Any = {name: encoder.encode(value, name) for name, value in values.items()}
    return encoded


class _Encoder(NamedTuple):
    ours: dict[int, str]
    objects: list[Any]

    def encode(self, value: Any, path: str, default: Any = dataclasses.MISSING) -> Any:  # noqa: PLR0911, PLR0912  One per case.
        if isinstance(value, _Missing):
            return value.recorded
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, enum.Enum):
            content = {"value": value.value} if isinstance(value, enum.Flag) else {"name": value.name}
            return {"enum": self.name(type(value), path), **content}
        if isinstance(value, PurePath):
            return {"path": str(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            if isinstance(value, float) and math.isnan(value):
                raise UserError(f"`{path}` must be a number, got nan.")
            return value
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            raise UserError(f"`{path}` must not be a NamedTuple, got {show(value)}. Make it a frozen dataclass.")
        if isinstance(value, (tuple, list)):
            return [self.encode(x, f"{path}.{i}") for i, x in enumerate(value)]
        if isinstance(value, Mapping):
            if strange := [k for k in value if not isinstance(k, str)]:
                raise UserError(f"`{path}` must have strings as keys, got {strange[0]!r}.")
            return {"dict": {k: self.encode(x, f"{path}.{k}") for k, x in value.items()}}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            hidden = ("parent", "name") if isinstance(value, nn.Module) else ()  # Flax's own.
            fields = [f for f in dataclasses.fields(value) if f.init and f.name not in hidden]
            kept = {f.name: self.encode(getattr(value, f.name), f"{path}.{f.name}", f.default) for f in fields}
            return {"class": self.name(type(value), path), **kept}
        if isinstance(value, partial):
            arguments = {"args": self.encode(value.args, path), "keywords": self.encode(value.keywords, path)}
            return {"partial": self.name(value.func, path), **arguments}
        scalar_type = isinstance(value, type) and issubclass(value, np.generic)
        if scalar_type or isinstance(value, (np.dtype, type(jnp.bfloat16))):
            return {"dtype": np.dtype(value).name}
        if value is default and callable(value):
            return {"default": getattr(value, "__qualname__", repr(type(value)))}
        return {"function": self.name(value, path)}

    def name(self, x: Any, path: str) -> str:
        name = self.ours.get(id(x)) or getattr(x, "__qualname__", None)
        owner = getattr(inspect.unwrap(x), "__self__", None) if callable(x) else None
        has_state = not isinstance(owner, (type, ModuleType, NoneType))  # A method of an object.
        if name is None or "<" in name or has_state:
            as_class = "a dataclass with a method `__call__`, whose fields are recorded."
            write = "Write it with `def` at the top level of a file, or make" if inspect.isfunction(x) else "Make"
            fix = f" {write} it {as_class}" if callable(x) else ""
            raise UserError(
                f"`{path}` must be a value that config.json can name (a number, a string, a dataclass, or a class or "
                f"function at the top level of a file), got {show(x)}.{fix}"
            )
        if id(x) not in self.ours:
            if _is_another(x, name):
                raise UserError(
                    f"`{path}` must be the function that its name stands for, got another one with the name {name}, "
                    "whose parameters would be lost. Make it a dataclass with a method `__call__`, whose fields are "
                    "recorded, or a partial without anything around it."
                )
            self.objects.append(x)
        return name


def _is_another(x: Any, name: str) -> bool:
    """Returns whether a function wraps what its module has by its name, or is that method, but of another class.

    For example a decorated function, or the method of a base class, bound to the class that is derived from it. A name
    that was defined again, as in a cell of a notebook or a file that is loaded twice, is not compared.
    """
    if isinstance(_innermost(x), partial):  # Inside of `jax.jit`, say.
        return True
    inner, found = x, sys.modules.get(getattr(x, "__module__", None) or "")
    while hasattr(inner, "__wrapped__") and not inspect.isfunction(inner):  # `jax.jit` changes no value.
        inner = inner.__wrapped__
    for part in name.split("."):
        found = getattr(found, part, None)
    return _innermost(found) is _innermost(x) and found not in (x, inner)


def _innermost(x: Any) -> Any:
    """Returns the function that wrappers and bound methods call in the end."""
    x = inspect.unwrap(x) if callable(x) else x
    return getattr(x, "__func__", x)


def decode(content: Mapping[str, Any], names: Mapping[str, Any], files: Iterable[str] = ()) -> Config:
    """Returns the configuration that `encode` wrote.

    If names are missing in its loss, training step, metrics, augmentation or data, a placeholder that keeps their JSON
    takes their place. Using it raises the error, see `check_complete`: a network predicts without them.

    Args:
      content: of `encode`.
      names: see `collect_names`.
      files: the files that defined them, for the error message.

    Raises:
      UserError: a name is missing in the network or the optimizer, or the content is of another version.
    """
    try:
        known = {*content, *_LATER}  # See `encode`.
        if missing := [f.name for f in dataclasses.fields(Config) if f.name not in known]:
            raise UserError(f"config.json: `{missing[0]}` must be there, got nothing.")
        values = {}
        for key, value in content.items():
            try:
                if (key, value) == ("dataset", ARRAYS):
                    values[key] = _find(ARRAYS, key, names, tuple(files))
                else:
                    values[key] = _decode(value, key, names, tuple(files))
            except _MissingNameError as error:
                if key not in OPTIONAL:
                    raise
                values[key] = (_MissingAugment if key == "augment" else _Missing).of(value, str(error), key)
        config = _build(Config, values)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"`config` must fit this version of cnnjax and its own classes, got {error}.") from error
    if different := changes(content, encode(config)):  # For example, a field that is missing.
        raise UserError(
            "`config` must fit this version of cnnjax and its own classes, got other values (recorded, now): "
            f"{different}."
        )
    return config


def _decode(value: Any, path: str, names: Mapping[str, Any], files: tuple[str, ...]) -> Any:  # noqa: PLR0911
    if isinstance(value, list):
        return tuple(_decode(x, f"{path}.{i}", names, files) for i, x in enumerate(value))
    if not isinstance(value, dict) or not value:
        return value

    def decoded(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            k: _decode(x, f"{path}.{k}", names, files)
            for k, x in values.items()
            if not (isinstance(x, dict) and x.keys() == {"default"})
        }

    kind, name = next(iter(value.items()))
    arguments = decoded({k: x for k, x in value.items() if k != kind})
    if kind == "dict":
        return FrozenDict(decoded(name))  # Hashable, as a module must be.
    if kind == "dtype":
        return jnp.dtype(name).type
    if kind == "path":
        return Path(name)
    found = _find(name, path, names, files, kind)
    if kind == "enum":
        return found(arguments["value"]) if "value" in arguments else found[arguments["name"]]
    if kind == "class":
        return _build(found, arguments)
    return partial(found, *arguments["args"], **arguments["keywords"]) if kind == "partial" else found


def has_config(path: Path) -> bool:
    """Returns whether a file sets CONFIG, without running it."""
    with suppress(OSError), open_regular(path) as file:
        return re.search(rb"^CONFIG\b", file.read(), re.MULTILINE) is not None
    return False


def _find(name: str, path: str, names: Mapping[str, Any], files: tuple[str, ...], kind: str = "") -> Any:
    found = built_in().get(name, names.get(name))
    valid = {"class": _is_dataclass, "enum": _is_enum}.get(kind, lambda found: found is not None)
    if not valid(found):
        raise _missing(path, name, files)
    return found


def _build(cls: Any, values: Mapping[str, Any]) -> Any:
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"config.json: {error}") from error


def _missing(path: str, name: str, files: tuple[str, ...]) -> _MissingNameError:
    known = [file for file in files if not file.endswith(" in a cell")]
    experiments = [file for file in known if has_config(Path(file))]
    found = f"that defines it: --experiment {experiments[0] if experiments else 'FILE'}"
    if len(experiments) != 1 and known:  # It was moved, or imports the file that defines the name.
        found = f"with the CONFIG that was trained, which is or imports {' and '.join(known)}: --experiment FILE"
    fix = for_reader(f"Pass the file {found}", "Pass a `config` that has it, such as that of training.")
    return _MissingNameError(
        f"`{path}` of this run is {name}, which is not part of cnnjax, and a run directory imports no code. {fix}"
    )


def check_complete(config: Config, *names: str) -> None:
    """Checks that these parts of a configuration, or all, are not missing, as they may be if `decode` returned it.

    Raises:
      UserError: one is.
    """
    for name in names or OPTIONAL:
        if isinstance(part := getattr(config, name), _Missing):
            raise part.error()


def source_files(config: Config) -> dict[str, str]:
    """Returns the SHA-256 of each file that defines a class or function of the configuration outside of libraries."""
    found, libraries = {}, [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    encode(config, objects := [])
    for x in objects:
        try:
            file = inspect.getsourcefile(x)
        except (TypeError, OSError):  # Defined in C, or typed into a notebook or an interpreter.
            file = None
        if file is None or not Path(file).is_file():
            if typed := _typed_source(x):
                found[f"{x.__qualname__} in a cell"] = hashlib.sha256(typed.encode()).hexdigest()
            continue
        if not any(Path(file).is_relative_to(folder) for folder in libraries):
            path, here = Path(file).resolve(), Path.cwd()
            name = str(path.relative_to(here) if path.is_relative_to(here) else path)
            found[name.encode(errors="backslashreplace").decode()] = file_sha256(path)
    return dict(sorted(found.items()))


def _typed_source(x: Any) -> str:
    """Returns the source of a class or function that was typed into a notebook, or "" if it is not known."""
    if getattr(x, "__module__", "") != "__main__":
        return ""
    parts = []
    for part in vars(x).values() if isinstance(x, type) else [x]:
        with suppress(TypeError, OSError):
            parts.append(inspect.getsource(inspect.unwrap(part)))
    return "".join(parts)


def collect_names(config: Config, others: Iterable[Any] = ()) -> dict[str, Any]:
    """Returns what `decode` needs to build configurations like this one: its classes, functions and arrays, by name.

    Args:
      config: the configuration.
      others: objects, the dataclasses and enums among which are added. Functions are not: a run directory from someone
        else must not choose what is called.
    """
    encode(config, objects := [])
    names: dict[str, Any] = {}
    others = [x for x in others if _is_dataclass(x) or _is_enum(x)]
    fields = [f for x in (*objects, *others) if _is_dataclass(x) for f in dataclasses.fields(x)]
    for x in (*objects, *others, *(type(f.default) for f in fields if isinstance(f.default, enum.Enum))):
        if names.setdefault(x.__qualname__, x) is not x:
            raise UserError(f"The names in an experiment must be unique, got two objects called {x.__qualname__}.")
    return names | ({ARRAYS: config.dataset} if isinstance(config.dataset, tuple) else {})


def _is_enum(x: Any) -> bool:
    return isinstance(x, type) and issubclass(x, enum.Enum)


def _is_dataclass(x: Any) -> bool:
    return isinstance(x, type) and dataclasses.is_dataclass(x)
