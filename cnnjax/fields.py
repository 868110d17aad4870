"""Checks of the user's classes, and that the fields of a dataclass or Linen module hold what they declare."""

import dataclasses
import difflib
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, MemberDescriptorType, NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import flax.linen as nn
import numpy as np

from cnnjax.errors import UserError

_SCALARS = {bool: "a bool", int: "an int", float: "a float", str: "a str", NoneType: "None"}
_LOW, _HIGH = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_FLOAT32 = f"finite, and 0 or a normal number of float32 ({_LOW:.1e} to {_HIGH:.1e} in size)"


class _Fault(NamedTuple):
    path: str
    rule: str
    value: Any


def check_fields(x: Any, path: str = "") -> None:
    """Checks the fields of a dataclass, and of the dataclasses in them, against their annotations.

    An int may stand for a float, a NumPy scalar for Python's, a tuple for a list. A float must be 0 or in the range of
    float32; in a user's class it may be infinite. A field that has its default is not checked: `width: int = None` is
    common. An annotation that cannot be evaluated, or is of another kind than the usual ones, accepts every value.

    Args:
      x: the dataclass.
      path: its name in messages; empty for the configuration itself.

    Raises:
      UserError: a field has another type, or is out of range; or its class keeps values that are not fields.
    """
    _check_class(type(x), path)
    for field in dataclasses.fields(x):
        if not field.init or (isinstance(x, nn.Module) and field.name in ("parent", "name")):  # Flax's own.
            continue
        value, default = getattr(x, field.name), field.default
        if value is default or (type(value) is type(default) and value == default):
            continue
        name = f"{path}.{field.name}" if path else field.name
        owner = next((c for c in type(x).__mro__ if field.name in vars(c).get("__annotations__", {})), type(x))
        if owner.__module__.partition(".")[0] != "cnnjax" and isinstance(value, float) and math.isinf(value):
            continue  # What it means is up to the user's class.
        if (fault := _fault(name, value, _annotation(owner, field))) is not None:
            why = ", which is hashable" if fault.rule == "a tuple" and isinstance(fault.value, list) else ""
            raise UserError(f"`{fault.path}` must be {fault.rule}{why}, got {show(fault.value)}.")
        for part_name, part in _parts(name, value):
            if dataclasses.is_dataclass(part) and not isinstance(part, type):
                check_fields(part, part_name)


def _check_class(cls: Any, path: str) -> None:
    """Checks that a dataclass declares all its values as fields: no other value is recorded, compared or copied."""
    if cls.__module__.partition(".")[0] == "cnnjax":
        return
    named = f"`{path}`" if path else "The configuration"
    names, several = {field.name for field in dataclasses.fields(cls)}, ("VAR_POSITIONAL", "VAR_KEYWORD")
    for name, parameter in inspect.signature(cls).parameters.items():
        if name not in names and parameter.kind.name not in several:
            raise UserError(
                f"{named} must be made of fields alone, which a run records, got {cls.__name__} with the parameter "
                f"{name!r}. Declare it as a field of the dataclass, without InitVar or a constructor of its own."
            )
    of_derived = {"parent", "name"}  # Flax's own; then the fields that a class declares which is derived from the next.
    for part in cls.__mro__:
        if part.__module__.partition(".")[0] in ("cnnjax", "flax", "builtins"):
            continue
        is_dataclass, hints = "__dataclass_fields__" in vars(part), inspect.get_annotations(part)
        constants = "ClassVar" if is_dataclass else "ClassVar|Final"
        declared = [name for name, hint in hints.items() if not re.search(constants, str(hint))]
        undecorated = declared if hasattr(part, "__dataclass_fields__") and not is_dataclass else []
        members = [name for name, value in vars(part).items() if not isinstance(value, MemberDescriptorType)]
        for name in (*undecorated, *(name for name in members if name in names and name not in declared)):
            if name not in of_derived:
                raise UserError(
                    f"{named} must declare its values as fields, got {part.__name__}.{name}, which is not a field and "
                    f"would have no effect. Write `{name}: <type> = ...` in a class with @dataclass(frozen=True)."
                )
        of_derived |= {*declared} if is_dataclass else set()


def check_methods(cls: type, base: type, path: str) -> None:
    """Checks that a subclass has no unused method whose name is almost that of a method of its base class.

    Raises:
      UserError: it has one.
    """
    known = [name for name in dir(base) if not name.startswith("_") and callable(getattr(base, name))]
    parts = [part for part in cls.__mro__[: cls.__mro__.index(base)] if issubclass(part, base)]
    methods = [
        (part, name, member) for part in parts for name, member in vars(part).items() if inspect.isfunction(member)
    ]
    used = {*known, *getattr(cls, "__dataclass_fields__", ())}.union(*(_names_in(f.__code__) for *_, f in methods))
    for part, name, _ in methods:
        if name[0] == "_" or name in used:
            continue
        near = difflib.get_close_matches(name, known, 1, 0.84)
        near = near or ([k for k in known if k.startswith("on_")] if name.startswith("on_") else [])
        if near:
            raise UserError(
                f"`{path}` must have methods with the names of {base.__name__}, got {part.__name__}.{name}, which "
                f"nothing calls. Is it {' or '.join(near)}? If not, begin its name with an underscore."
            )


def _names_in(code: CodeType) -> set[str]:
    """Returns the names that a function, and the functions in it, use as attributes or globals."""
    return {*code.co_names}.union(*(_names_in(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _annotation(owner: type, field: dataclasses.Field[Any]) -> Any:
    holder: Any = SimpleNamespace(__annotations__={field.name: field.type})
    try:
        return get_type_hints(holder, vars(sys.modules[owner.__module__]))[field.name]
    except Exception:  # It is evaluated, so that anything may happen.
        return Any


def _fault(path: str, value: Any, hint: Any) -> _Fault | None:  # noqa: PLR0911  One per kind of annotation.
    """Returns the first fault of a value, or None."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return _fault_of_union(path, value, args)
    if kind in _SCALARS:
        return _fault_of_scalar(path, value, kind)
    if kind in (tuple, list, Sequence, dict, Mapping):
        return _fault_of_container(path, value, kind, args)
    if kind is Literal:
        return None if value in args else _Fault(path, f"one of {', '.join(map(repr, args))}", value)
    if kind is Callable:
        return None if callable(value) else _Fault(path, "a function", value)
    # `jnp.dtype` often stands for whatever names a dtype.
    if not isinstance(kind, type) or kind in (Any, np.dtype) or getattr(kind, "_is_protocol", False):
        return None
    package = "" if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}'s "
    return None if isinstance(value, kind) else _Fault(path, f"an instance of {package}{kind.__qualname__}", value)


def _fault_of_union(path: str, value: Any, args: tuple[Any, ...]) -> _Fault | None:
    faults = [fault for fault in (_fault(path, value, arg) for arg in args) if fault is not None]
    if len(faults) < len(args):
        return None
    inside = [fault for fault in faults if fault.path != path]
    return inside[0] if inside else _Fault(path, " or ".join(fault.rule for fault in faults), value)


def _fault_of_scalar(path: str, value: Any, kind: type) -> _Fault | None:
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, (int, float) if kind is float else kind) or (type(value) is bool and kind is not bool):
        return _Fault(path, _SCALARS[kind], value)
    if kind is float and not (value == 0 or _LOW <= abs(value) <= _HIGH):
        return _Fault(path, _FLOAT32, value)
    return _Fault(path, "an int of 64 bits", value) if kind is int and not -(2**63) <= value < 2**64 else None


def _fault_of_container(path: str, value: Any, kind: type, args: tuple[Any, ...]) -> _Fault | None:
    if kind in (dict, Mapping):
        if not isinstance(value, Mapping):
            return _Fault(path, "a dict", value)
        members = [(f"{path}.{key}", x, args[1]) for key, x in value.items() if args]
    elif not isinstance(value, tuple if kind is tuple else (tuple, list)):
        return _Fault(path, "a tuple", value)
    elif kind is tuple and args and Ellipsis not in args:
        if len(value) != len(args):
            return _Fault(path, f"a tuple of {len(args)}", value)
        members = [(f"{path}.{i}", x, arg) for i, (x, arg) in enumerate(zip(value, args, strict=True))]
    else:
        members = [(f"{path}.{i}", x, args[0]) for i, x in enumerate(value) if args]
    return next((fault for member in members if (fault := _fault(*member)) is not None), None)


def _parts(path: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, (tuple, list)):
        return [(f"{path}.{i}", x) for i, x in enumerate(value)]
    return [(path, value)]


def show(value: Any) -> str:
    """Returns a value on one line of at most 100 characters, for messages."""
    return shorten(hex(value) if isinstance(value, int) and value.bit_length() > 10_000 else repr(value))


def shorten(text: str) -> str:
    """Returns a text on one line of at most 100 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."
