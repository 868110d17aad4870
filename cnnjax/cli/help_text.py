"""The help on options, as a user expects it from the types and docstrings of dataclasses."""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from tyro.conf import Fixed, Suppress, arg
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from cnnjax.errors import UserError

_METAVARS: dict[Any, str] = {str: "STR", int: "INT", float: "FLOAT", Path: "PATH", bool: "{True,False}"}
_ITEM = re.compile(r"\s*([-*•]|\d+\.)\s")  # Begins an item of a list.


class _Readable:
    """A rule of tyro for the help on the fields of a dataclass.

    Joins the lines of a paragraph, except the items of a list: tyro keeps indented lines apart. A default of (), or of
    None if `_metavar` knows the type, is shown only if the field has no docstring.
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
    kind, text = field.type, partial(_join, field.helptext)
    if kind in (Any, type(None)) and field.default is None:  # No other value can be written on a command line.
        return dataclasses.replace(field, type=Annotated[kind, Suppress, Fixed])
    if dataclasses.is_dataclass(field.default) and not _has_choices(kind):
        kind = type(field.default)  # Its fields become options.
        field = dataclasses.replace(field, type=kind)
    metavar = _metavar(kind)
    is_empty = isinstance(field.default, tuple) and not field.default
    if not is_empty and (field.default is not None or metavar is None):
        return dataclasses.replace(field, helptext=text)

    # tyro appends a hint to the text, here its last word: after an empty one the space might wrap into a blank row.
    def last_word(default: str) -> str:
        return (text() or "").rpartition(" ")[2] or f"(default: {default})"

    kind = Annotated[kind, arg(metavar=metavar, help_behavior_hint=last_word)]
    return dataclasses.replace(field, type=kind, helptext=lambda: (text() or "").rpartition(" ")[0])


def _has_choices(kind: Any) -> bool:
    """Returns whether a type is no union, or one with dataclasses or None, whose members tyro lets the user choose."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (None,)
    return any(part in (None, type(None)) or dataclasses.is_dataclass(part) for part in parts)


def _metavar(kind: Any) -> str | None:
    """Returns the values of a type that allows None, and a type of `_METAVARS` or words; None for any other type."""
    if get_origin(kind) not in (Union, UnionType):
        return None
    others = [part for part in get_args(kind) if part is not type(None)]
    if len(others) != 1 or len(get_args(kind)) != 2:
        return None
    if get_origin(others[0]) is Literal:
        return "{" + ",".join(map(str, get_args(others[0]))) + "}"
    return _METAVARS.get(others[0])


def _join(text: str | Callable[[], str | None] | None) -> str | None:
    text = text() if callable(text) else text
    return text and "\n\n".join(map(_join_paragraph, re.split(r"\n\s*\n", text)))


def _join_paragraph(paragraph: str) -> str:
    lines: list[str] = []
    for line in paragraph.splitlines():
        if lines and not _ITEM.match(line):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line.strip())
    return "\n".join(lines)


def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """Parses a path, which must not be empty, as that of an unset variable is: it would be the current folder."""
    if info.type is not Path:
        return None

    def make(args: list[str]) -> Path:
        if not args[0]:
            raise UserError("A path must not be empty, got ''. Write . for the current folder.")
        return Path(args[0])

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=make,
        is_instance=lambda x: isinstance(x, Path),
        str_from_instance=lambda x: [str(x)],
    )


def make_registry() -> ConstructorRegistry:
    """Returns the rules by which tyro reads the fields of a command."""
    registry = ConstructorRegistry()
    registry.struct_rule(_Readable())
    registry.primitive_rule(_path)
    return registry
