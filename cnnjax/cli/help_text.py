"""The help on options, as a user expects it from the types and docstrings of dataclasses."""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from tyro.conf import arg
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

_METAVARS: dict[Any, str] = {str: "STR", int: "INT", float: "FLOAT", Path: "PATH"}


class _Readable:
    """A rule of tyro for the help on the fields of a dataclass.

    The lines of a paragraph are joined, which tyro itself keeps apart if they are indented. If None is the default, it
    is not mentioned.
    """

    def __init__(self) -> None:
        self._is_asking = False

    def __call__(self, info: StructTypeInfo) -> StructConstructorSpec | None:
        if self._is_asking or not dataclasses.is_dataclass(info.type):
            return None
        self._is_asking = True  # The other rules.
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            self._is_asking = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        return dataclasses.replace(spec, fields=tuple(map(_readable, spec.fields)))


def _readable(field: StructFieldSpec) -> StructFieldSpec:
    kind: Any = field.type
    metavar = _metavar(kind)
    if field.default is None and metavar is not None:
        kind = Annotated[kind, arg(metavar=metavar, help_behavior_hint="")]
    return dataclasses.replace(field, type=kind, helptext=partial(_join, field.helptext))


def _metavar(kind: Any) -> str | None:
    """Returns the values of a type that allows None and strings, numbers, a path, or one of several words."""
    if get_origin(kind) not in (Union, UnionType) or len(get_args(kind)) != 2 or get_args(kind)[1] is not type(None):
        return None
    value = get_args(kind)[0]
    return "{" + ",".join(map(str, get_args(value))) + "}" if get_origin(value) is Literal else _METAVARS.get(value)


def _join(text: str | Callable[[], str | None] | None) -> str | None:
    text = text() if callable(text) else text
    return text and "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))


def make_registry() -> ConstructorRegistry:
    """Returns the rules by which tyro reads the fields of a command."""
    registry = ConstructorRegistry()
    registry.struct_rule(_Readable())
    return registry
