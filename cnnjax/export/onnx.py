"""The predictor as ONNX, through jax2onnx.

jax2onnx replaces functions of JAX and Flax while it traces. It gets a program that is already traced, in basic
operations, so that it converts networks of any library alike.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from cnnjax.errors import UserError, describe
from cnnjax.export.predictor import PredictFn
from cnnjax.jaxprs import called_program
from cnnjax.layers.derivatives import plain_operations

INPUT, OUTPUT = "image", "probabilities"
_WITHOUT = "`formats` must be without onnx for this network"
_NARROW = (np.dtype(jnp.bfloat16), np.dtype(jnp.float16))
_WIDE = np.dtype(np.float32)
_POOLS = {"reduce_window_max": (jax.lax.max, -np.inf), "reduce_window_sum": (jax.lax.add, 0.0)}


def is_installed() -> bool:
    """Returns whether the converter and the runtime are installed."""
    return find_spec("jax2onnx") is not None and find_spec("onnxruntime") is not None


def widen(predict: PredictFn, image: jax.ShapeDtypeStruct) -> tuple[PredictFn, bool]:
    """Returns a predictor in basic operations and in float32, and whether a part of it was narrower.

    The operations are those of the network, without the rounding to bfloat16 or float16.
    """
    with plain_operations():
        traced = jax.make_jaxpr(predict)(image)

    def wide(image: Any) -> Any:
        return _evaluate(traced, [image], _WIDE)[0]

    return wide, _is_narrow(traced)


def without_pools(predict: PredictFn, image: jax.ShapeDtypeStruct) -> PredictFn:
    """Returns a predictor in basic operations, whose reductions over windows are strided slices.

    On a CPU, jaxlib 0.12.0 computes nan for a max-pool of bfloat16 behind a convolution with bias and ReLU.
    """
    with plain_operations():
        traced = jax.make_jaxpr(predict)(image)
    return lambda image: _evaluate(traced, [image], None)[0]


def to_onnx(predict: PredictFn, image: jax.ShapeDtypeStruct, metadata: dict[str, str]) -> bytes:
    """Returns a predictor of `widen` as an ONNX model with the input "image" and the output "probabilities".

    Raises:
      UserError: jax2onnx cannot convert it.
    """
    try:
        import jax2onnx
        from onnx.helper import set_model_props
    except ImportError as error:
        raise UserError(
            f"`formats` may contain onnx only if jax2onnx can be imported, got {describe(error)} Reinstall it: pip "
            "install 'cnnjax[onnx]'"
        ) from error
    try:
        with _quiet():
            options: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT]}
            model: Any = jax2onnx.to_onnx(predict, [image], model_name="cnnjax", **options)
            _merge_equal(model.graph)
            for node in model.graph.node:
                del node.metadata_props[:]  # Traces of the source code, with the paths of this machine.
            set_model_props(model, metadata)
            return model.SerializeToString()
    except Exception as error:
        raise UserError(f"{_WITHOUT}, which jax2onnx cannot convert: {describe(error)}") from error


def read_onnx(content: bytes) -> PredictFn:
    """Returns the predictor in a file of `to_onnx`, run by ONNX Runtime.

    Raises:
      UserError: ONNX Runtime cannot run it; the function raises this error, too.
    """
    import onnxruntime

    def call(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        except Exception as error:  # Its own errors have no common class.
            raise UserError(f"{_WITHOUT}, which ONNX Runtime cannot run: {describe(error)}") from error

    session = call(onnxruntime.InferenceSession, content, providers=["CPUExecutionProvider"])
    return lambda image: call(session.run, [OUTPUT], {INPUT: image})[0]


def _evaluate(closed: Any, values: Sequence[Any], dtype: Any) -> list[Any]:
    """Evaluates a program with its calls inlined, and without pads and pools.

    Args:
      dtype: replaces narrower ones; None: they are kept.
    """

    def wide(value: Any) -> Any:
        return dtype if dtype is not None and isinstance(value, np.dtype) and value in _NARROW else value

    def widened(x: Any) -> Any:
        return np.asarray(x, dtype) if dtype is not None and getattr(x, "dtype", None) in _NARROW else x

    jaxpr = closed.jaxpr
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*map(widened, closed.consts), *values], strict=True))

    def read(x: Any) -> Any:
        return widened(np.asarray(x.val)) if isinstance(x, Literal) else known[x]

    for equation in jaxpr.eqns:
        operands, name = [read(x) for x in equation.invars], equation.primitive.name
        if (inner := called_program(equation)) is not None:
            results = _evaluate(inner, operands, dtype)
        elif name == "pad" and not any(interior for _, _, interior in equation.params["padding_config"]):
            results = [_pad(operands[0], operands[1], equation.params["padding_config"])]
        elif name in _POOLS and {*equation.params["base_dilation"]} == {1}:
            results = [_pool(operands[0], *_POOLS[name], equation.params)]
        elif name == "convert_element_type" and wide(equation.params["new_dtype"]) == operands[0].dtype:
            results = operands
        else:
            params = {key: wide(value) for key, value in equation.params.items()}
            result = equation.primitive.bind(*operands, **params)
            results = result if equation.primitive.multiple_results else [result]
        known.update(zip(equation.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _pad(x: Any, value: Any, config: Sequence[Sequence[Any]]) -> Any:
    """Returns a padded array as a concatenation: jax2onnx pads batches of a known size only."""
    for axis, (low, high, _) in enumerate(config):
        if min(low, high) < 0:
            x = jax.lax.slice_in_dim(x, max(-low, 0), x.shape[axis] - max(-high, 0), axis=axis)
        shapes = [(*x.shape[:axis], max(n, 0), *x.shape[axis + 1 :]) for n in (low, high)]
        parts = [jax.lax.full(shapes[0], value), x, jax.lax.full(shapes[1], value)]
        x = jax.lax.concatenate([part for part in parts if part.shape[axis] != 0], axis)
    return x


def _pool(x: Any, combine: Callable[[Any, Any], Any], fill: float, params: dict[str, Any]) -> Any:
    """Returns a reduction over windows as strided slices: jax2onnx pools over all axes, ONNX Runtime over at most 3."""
    x = _pad(x, np.asarray(fill, x.dtype), [(low, high, 0) for low, high in params["padding"]])
    axes = (params[f"window_{name}"] for name in ("dimensions", "strides", "dilation"))
    for axis, (size, stride, dilation) in enumerate(zip(*axes, strict=True)):
        if (size, stride) != (1, 1):
            last = (x.shape[axis] - dilation * (size - 1) - 1) // stride * stride
            starts = range(0, dilation * size, dilation)
            parts = [jax.lax.slice_in_dim(x, start, start + last + 1, stride, axis) for start in starts]
            x = reduce(combine, parts)
    return x


def _is_narrow(closed: Any) -> bool:
    def narrow(equation: Any) -> bool:
        inner = called_program(equation)
        own = any(getattr(x.aval, "dtype", None) in _NARROW for x in equation.outvars)
        return own or (inner is not None and _is_narrow(inner))

    return any(map(narrow, closed.jaxpr.eqns))


def _merge_equal(graph: Any) -> None:
    """Keeps one of several equal arrays of an ONNX graph: each view of test-time augmentation has its own."""
    kept, names = {}, {}
    for array in graph.initializer:
        key = (array.data_type, tuple(array.dims), array.raw_data or array.SerializeToString())
        names[array.name] = kept.setdefault(key, array).name
    _rename(graph, names)
    arrays = [*kept.values()]
    del graph.initializer[:]
    graph.initializer.extend(arrays)


def _rename(graph: Any, names: dict[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        for attribute in node.attribute:  # The bodies of loops.
            _rename(attribute.g, names)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the warnings of the converter about parts of it that are not used."""
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
