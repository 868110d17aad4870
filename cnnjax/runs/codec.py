"""A `Config` as JSON, and back. JSON names classes and functions; reading it imports nothing.

A name is looked up among cnnjax's own classes, then among those of an experiment file that the user passes. (dacite and
msgspec build dataclasses from annotations; neither looks up Linen modules by name.)
"""

import dataclasses
import hashlib
import inspect
import math
import sysconfig
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import field
from functools import partial
from pathlib import Path
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
from cnnjax.runs.files import changes, file_sha256
from cnnjax.runs.schema import EncodedConfig

ARRAYS = "(arrays in memory)"
UNUSED = ("loss", "augment", "dataset")  # By a network that predicts.


def built_in() -> dict[str, Any]:
    """Returns cnnjax's own classes and functions that a configuration may name, by name."""
    # Other functions are not named in it, and import what training does not need, such as charts.
    classes = {f"cnnjax.{name}": getattr(cnnjax, name) for name in dir(cnnjax) if name[0].isupper()}
    found = {name: x for name, x in classes.items() if _is_dataclass(x)}
    return {**found, "cnnjax.softmax_cross_entropy": cnnjax.softmax_cross_entropy}


def encode(config: Config, objects: list[Any] | None = None) -> EncodedConfig:
    """Returns the configuration as JSON.

    Args:
      config: the configuration.
      objects: receives the classes and functions that it names.

    Raises:
      UserError: a value is not JSON, a dataclass, a dtype, or a class or function with a name.
    """
    encoder = _Encoder({id(x): name for name, x in built_in().items()}, [] if objects is None else objects)
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if isinstance(config.dataset, tuple):
        values["dataset"] = ARRAYS  # Identified by their digests.
    encoded: Any = {name: encoder.encode(value, name) for name, value in values.items()}
    return encoded


class _Encoder(NamedTuple):
    ours: dict[int, str]
    objects: list[Any]

    def encode(self, value: Any, path: str, default: Any = dataclasses.MISSING) -> Any:  # noqa: PLR0911  One per case.
        value = value.item() if isinstance(value, np.generic) else value
        if value is None or isinstance(value, (bool, int, float, str)):
            if isinstance(value, float) and math.isnan(value):
                raise UserError(f"`{path}` must be a number, got nan.")
            return value
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
        if value is default:
            return {"default": getattr(value, "__qualname__", repr(type(value)))}
        return {"function": self.name(value, path)}

    def name(self, x: Any, path: str) -> str:
        name = self.ours.get(id(x)) or getattr(x, "__qualname__", None)
        if name is None or "<" in name:
            fix = " Write it with `def` at the top level of a file." if inspect.isfunction(x) else ""
            raise UserError(
                f"`{path}` must be a value that config.json can name (a number, a string, a dataclass, or a class or "
                f"function at the top level of a file), got {show(x)}.{fix}"
            )
        if id(x) not in self.ours:
            self.objects.append(x)
        return name


def decode(content: Mapping[str, Any], names: Mapping[str, Any], files: Iterable[str] = ()) -> Config:
    """Returns the configuration that `encode` wrote.

    A network predicts without the loss, the augmentation and the data that trained it. If their names are missing,
    something of the same name replaces them, which raises the error when it is called; see `check_complete`.

    Args:
      content: of `encode`.
      names: see `collect_names`.
      files: the files that defined them, for the error message.

    Raises:
      UserError: a name is missing in `model` or `optim`, or the content is of another version.
    """
    try:
        if missing := [f.name for f in dataclasses.fields(Config) if f.name not in content]:
            raise UserError(f"config.json: `{missing[0]}` must be there, got nothing.")
        values = {key: _decode(value, key, names, tuple(files)) for key, value in content.items()}
        if values["dataset"] == ARRAYS:
            values["dataset"] = names.get(ARRAYS) or _replacement(
                "function", "arrays", {}, _missing("dataset", ARRAYS, tuple(files))
            )
        config = _build(Config, values)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"`config` must fit this version of cnnjax and its own classes, got {error}.") from error
    again: Mapping[str, Any] = {**encode(config)} | ({"dataset": ARRAYS} if content["dataset"] == ARRAYS else {})
    if different := changes(content, again):  # For example, a field that is missing.
        raise UserError(
            "`config` must fit this version of cnnjax and its own classes, got other values (recorded, now): "
            f"{different}."
        )
    return config


def _decode(value: Any, path: str, names: Mapping[str, Any], files: tuple[str, ...]) -> Any:
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
    found = built_in().get(name, names.get(name))
    if found is None or (kind == "class" and not _is_dataclass(found)):
        missing = _missing(path, name, files)
        if path.partition(".")[0] not in UNUSED:
            raise missing
        found = _replacement(kind, name, arguments, missing, (Augment,) if path == "augment" else ())
    if kind == "class":
        return _build(found, arguments)
    return partial(found, *arguments["args"], **arguments["keywords"]) if kind == "partial" else found


def _replacement(
    kind: str, name: str, values: Mapping[str, Any], error: UserError, bases: tuple[type, ...] = ()
) -> Any:
    """Returns a class or function that `encode` calls `name`, and that raises `error` when it is used."""

    def call(*arguments: Any, **keywords: Any) -> None:
        raise error

    if kind == "class":
        # The default of `num_classes` is not known; `Config.with_num_classes` sets it from the data.
        fields = [(k, Any, *([field(default=v)] if k == "num_classes" else [])) for k, v in values.items()]
        namespace = {"__call__": call, "_missing": error}
        return dataclasses.make_dataclass(name, fields, bases=bases, namespace=namespace, frozen=True, kw_only=True)
    call.__name__ = call.__qualname__ = name
    vars(call)["_missing"] = error
    return call


def check_complete(config: Config) -> None:
    """Checks that a configuration can be trained: it may have been read from a run, see `decode`.

    Raises:
      UserError: a class or function is missing.
    """
    encode(config, objects := [])
    for error in (getattr(x, "_missing", None) for x in (*objects, config.dataset)):
        if isinstance(error, UserError):
            raise error


def _build(cls: Any, values: Mapping[str, Any]) -> Any:
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"config.json: {error}") from error


def _missing(path: str, name: str, files: tuple[str, ...]) -> UserError:
    file = next((file for file in files if not file.endswith(" in a cell")), "FILE")
    found = f"that defines it: --experiment {file}"
    if file != "FILE" and not Path(file).exists():
        found = f"that defines it ({file} in the working directory of the training): --experiment FILE"
    fix = for_reader(f"Pass the file {found}", "Pass a `config` that has it, such as that of training.")
    return UserError(
        f"`{path}` of this run is {name}, which is not part of cnnjax, and a run directory imports no code. {fix}"
    )


def source_files(config: Config) -> dict[str, str]:
    """Returns the SHA-256 of each file that defines a class or function of the configuration outside of libraries."""
    found, libraries = {}, [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    encode(config, objects := [])
    for x in objects:
        if hasattr(x, "_missing"):
            continue
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
      others: objects, the dataclasses among which are added. Functions are not: a run directory from someone else must
        not choose what is called.
    """
    encode(config, objects := [])
    names: dict[str, Any] = {}
    for x in (*objects, *(x for x in others if _is_dataclass(x))):
        if names.setdefault(x.__qualname__, x) is not x:
            raise UserError(f"The names in an experiment must be unique, got two objects called {x.__qualname__}.")
    return names | ({ARRAYS: config.dataset} if isinstance(config.dataset, tuple) else {})


def _is_dataclass(x: Any) -> bool:
    return isinstance(x, type) and dataclasses.is_dataclass(x)
