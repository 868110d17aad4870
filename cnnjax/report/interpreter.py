"""Evaluates the program of a network, and records the operations that are worth showing.

The interpreter follows each value back to the operation that it stems from: elementwise operations on one value are an
activation or a normalization, those of two values an addition or a multiplication. So it works for every network.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from cnnjax.jaxprs import CALLS, LOOPS, called_program
from cnnjax.report.operations import (
    ACTIVATIONS,
    AFFINE,
    NONLINEAR,
    OPERATIONS,
    REDUCTIONS,
    UNCHANGED,
    activation_name,
    is_normalization,
)
from cnnjax.summary import Module, layer_of


class Record:
    """An operation that is shown."""

    def __init__(self, name: str, operation: str, source: Any, full: Any, shown: Any) -> None:
        self.name, self.operation, self.source = name, operation, source
        self.full, self.shown = full, shown  # The value in the program, and as [h w c] or [n].


class _Source:
    """The image, or a result that is not looked into."""


class _Value(NamedTuple):
    """A value that depends on the image.

    Attributes:
      base: the `Record`, the `_Source`, or another object, from which it is computed by elementwise operations.
      ops: these operations.
      layout: the axes of batch, height, width and channels, if it has four.
      layer: the call of the module in which the operations are.
    """

    array: Any
    base: Any
    ops: tuple[str, ...] = ()
    layout: tuple[int, ...] = (0, 1, 2, 3)
    layer: int | None = None

    def is_recorded(self) -> bool:
        return isinstance(self.base, Record) and self.base.full is self.array


class Interpreter:
    """Evaluates a program and records the operations that are shown."""

    def __init__(self, modules: Sequence[Module], image: Any) -> None:
        self.modules = modules
        self.records: list[Record] = []
        self.kernel: Any = None
        self.image = _Value(image, _Source())
        self._flushed: dict[int, tuple[_Value, _Value]] = {}  # By the id of an array; a value may be used twice.

    def run(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], layer: int | None = None) -> list[Any]:
        """Returns the outputs; a value is an array, or a `_Value` if it depends on the image."""
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
        uses = Counter(v for e in jaxpr.eqns for v in e.invars if not isinstance(v, Literal))
        uses += Counter(v for v in jaxpr.outvars if not isinstance(v, Literal))
        for equation in jaxpr.eqns:
            inputs = [v.val if isinstance(v, Literal) else values[v] for v in equation.invars]
            outputs = self._evaluate(equation, inputs, layer_of(equation, layer))
            for variable, value in zip(equation.outvars, outputs, strict=True):
                ends = uses[variable] > 1 and isinstance(value, _Value) and is_normalization(value.ops)
                values[variable] = self._flush(value) if ends else value
        return [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]

    def finish(self, logits: Any) -> None:
        """Records the logits."""
        if not isinstance(logits, _Value):
            return
        logits = self._flush(logits)
        if logits.is_recorded() and logits.base.operation == "dense":
            logits.base.operation = "logits"
        else:
            self._record(logits, "logits", None)

    def _evaluate(self, equation: Any, inputs: list[Any], layer: int | None) -> Sequence[Any]:
        name, params = equation.primitive.name, equation.params
        traced = [x for x in inputs if isinstance(x, _Value)]
        if name == "name":
            _, is_layer, index = params["name"].partition("layer=")
            return [self._leave(inputs[0], int(index))] if is_layer else inputs
        activation = len(traced) == len(equation.outvars) == 1 and _called(equation) in ACTIVATIONS
        if name in CALLS and not activation:
            inner = called_program(equation)
            return self.run(inner.jaxpr, inner.consts, inputs, layer)
        if not traced:
            return _bind(equation, inputs)
        if name in AFFINE or name in NONLINEAR or activation:
            value = self._elementwise(equation, inputs, layer)
            return [self._flush(value) if activation else value]
        shape = traced[0].array.shape
        vector = len(shape) == 2 and 1 in shape  # `jax.vmap` of a matrix and a vector ends with a transpose.
        if (name in UNCHANGED or (name == "transpose" and vector)) and _is_same_shape(
            equation.outvars[0].aval.shape, shape
        ):
            return [self._unchanged(equation, inputs[0])]
        return self._compute(equation, [self._flush(x) if isinstance(x, _Value) else x for x in inputs], layer)

    def _compute(self, equation: Any, inputs: list[Any], layer: int | None) -> list[_Value]:
        """Evaluates an operation that is not elementwise."""
        name, params = equation.primitive.name, equation.params
        outputs = _bind(equation, [_array(x) for x in inputs])
        source = next(x for x in inputs if isinstance(x, _Value))
        if name in UNCHANGED:  # To another shape.
            return [source._replace(array=outputs[0], layout=(0, 1, 2, 3))]
        if name == "transpose":
            axes = tuple(map(params["permutation"].index, source.layout)) if source.array.ndim == 4 else (0, 1, 2, 3)
            return [source._replace(array=outputs[0], layout=axes)]
        results = [_Value(x, _Source() if name in LOOPS else object(), layout=source.layout) for x in outputs]
        if name == "conv_general_dilated":
            n, c, *spatial = params["dimension_numbers"].out_spec
            results = [results[0]._replace(layout=(n, *spatial, c))]
        operation = self._operation(equation, inputs, source)
        return [self._record(results[0], operation, layer, source), *results[1:]] if operation else results

    def _operation(self, equation: Any, inputs: Sequence[Any], source: _Value) -> str:
        """Returns what an operation is in words, or "" if it is not shown."""
        name, params, both = equation.primitive.name, equation.params, all(isinstance(x, _Value) for x in inputs)
        if name == "conv_general_dilated" and not both:
            numbers, groups = params["dimension_numbers"], params["feature_group_count"]
            k, c, *spatial = numbers.rhs_spec
            if self.kernel is None and len(spatial) == 2:
                self.kernel = jnp.transpose(inputs[1], (*spatial, c, k)).astype(jnp.float32)
            depthwise = 1 < groups == source.array.shape[numbers.lhs_spec[1]]
            return "depthwise convolution" if depthwise else "convolution"
        if name in REDUCTIONS:
            ndim, axes = source.array.ndim, set(params["axes"])
            if ndim == 6 and len(axes) == 2:  # The windows are axes of their own.
                return "max-pool" if name == "reduce_max" else "average-pool"
            return REDUCTIONS[name] if ndim == 4 and axes == {*source.layout[1:3]} else ""
        return "" if name == "dot_general" and both else OPERATIONS.get(name, "")

    def _leave(self, value: Any, index: int) -> Any:
        """Ends a module, which may be a normalization."""
        if not isinstance(value, _Value):
            return value
        value = self._flush(value)
        if value.is_recorded() or "Norm" not in self.modules[index].kind:
            return value
        return self._record(value, "normalization", index, value)

    def _unchanged(self, equation: Any, value: _Value) -> _Value:
        (array,) = _bind(equation, [value.array])
        if value.is_recorded():
            value.base.full = array
        return value._replace(array=array)

    def _elementwise(self, equation: Any, inputs: list[Any], layer: int | None) -> _Value:
        shape = equation.outvars[0].aval.shape
        op, traced = equation.primitive.name, [x for x in inputs if isinstance(x, _Value)]
        same = len({id(x.base) for x in traced}) == 1
        if not same or (len(traced) == 1 and self._is_complete(traced[0], op, layer)):
            inputs = [self._flush(x) if isinstance(x, _Value) else x for x in inputs]
            traced = [x for x in inputs if isinstance(x, _Value)]
        (array,) = _bind(equation, [_array(x) for x in inputs])
        first = traced[0]
        if not same:
            result = _Value(array, object(), layout=first.layout)
            both = len(shape) >= 4 and all(isinstance(x.base, Record) for x in traced)
            operation = {"add": "addition", "mul": "multiplication"}.get(op) if both else None
            return self._record(result, operation, layer, first) if operation else result
        record = first.base
        if first.is_recorded() and len(traced) == 1 and first.array.shape == shape:
            bias = op == "add" and record.operation.endswith(("convolution", "dense"))
            count = op in ("mul", "div") and record.operation in ("sum", "mean", "average-pool")
            if bias or count:
                if record.operation == "sum":
                    record.operation = "mean"
                record.full, record.shown = array, _view(array, first.layout)
                return first._replace(array=array)
        ops = dict.fromkeys((*(op for x in traced for op in x.ops), _token(equation, inputs)))
        return _Value(array, first.base, tuple(ops), first.layout, layer)

    def _is_complete(self, value: _Value, op: str, layer: int | None) -> bool:
        """Returns whether the next operation does not continue the normalization or the activation of a value."""
        if {*value.ops} <= AFFINE:
            return op not in AFFINE and is_normalization(value.ops)
        return value.layer != layer or (op in AFFINE and activation_name({*value.ops}) in ("ReLU", "ReLU6"))

    def _flush(self, value: _Value) -> _Value:
        """Records the elementwise operations that led to a value."""
        if not value.ops:
            return value
        if id(value.array) in self._flushed:
            return self._flushed[id(value.array)][1]
        operation = "normalization" if is_normalization(value.ops) else activation_name({*value.ops})
        shown = operation and isinstance(value.base, Record | _Source)
        result = self._record(value, operation, value.layer, value) if shown else value._replace(ops=())
        self._flushed[id(value.array)] = (value, result)
        return result

    def _record(self, value: _Value, operation: str, layer: int | None, source: _Value | None = None) -> _Value:
        shown = _view(value.array, value.layout)
        if shown is None:
            return _Value(value.array, object(), layout=value.layout)
        path = () if layer is None else self.modules[layer].path
        record = Record("/".join(path), operation, source and source.base, value.array, shown)
        self.records.append(record)
        return _Value(value.array, record, layout=value.layout)


def _bind(equation: Any, arrays: Sequence[Any]) -> list[Any]:
    primitive, params = equation.primitive, equation.primitive.get_bind_params(equation.params)
    is_number = primitive.name in AFFINE | UNCHANGED and not any(isinstance(x, Tracer) or np.ndim(x) for x in arrays)
    # Numbers stay known: the bounds of a ReLU.
    with jax.ensure_compile_time_eval() if is_number else equation.ctx.manager:
        outputs = primitive.bind(*arrays, **params)
    return list(outputs) if primitive.multiple_results else [outputs]


def _array(x: Any) -> Any:
    return x.array if isinstance(x, _Value) else x


def _called(equation: Any) -> str:
    """Returns the name of the function that an equation calls."""
    return str(equation.params.get("name", ""))


def _view(array: Any, layout: tuple[int, ...]) -> Any:
    """Returns the value of the one image as [h w c] or [n], or None if it is neither."""
    while array.ndim > 2 and array.ndim != 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 4 and array.shape[layout[0]] == 1:
        return jnp.transpose(array, layout)[0]
    return array.reshape(-1) if array.ndim == 2 and 1 in array.shape else None


def _is_same_shape(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Returns whether shapes are equal except for axes of size 1."""
    same_kind = len(a) == len(b) or min(len(a), len(b)) >= 4
    return same_kind and [n for n in a if n != 1] == [n for n in b if n != 1]


def _token(equation: Any, inputs: Sequence[Any]) -> str:
    """Returns the name of an elementwise operation; "mul of both" if all of its operands depend on the image."""
    if equation.primitive.name in CALLS:
        return _called(equation)
    name, constants = equation.primitive.name, [x for x in inputs if not isinstance(x, _Value)]
    if not constants and len(inputs) > 1:
        return f"{name} of both"
    if name in ("max", "min") and not isinstance(constants[0], Tracer) and np.size(constants[0]) == 1:
        return f"{name} {float(np.asarray(constants[0]).item()):g}"
    return name
