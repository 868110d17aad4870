"""The layers of a network: their output shapes, parameters and floating-point operations."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jaxtyping import PyTree

from cnnjax.jaxprs import programs_in
from cnnjax.layers.derivatives import plain_operations
from cnnjax.network import Network, apply_in_evaluation, logits_of, mode_of
from cnnjax.state import abstract_state, eval_params

Path = tuple[str, ...]


class Layer(NamedTuple):
    """A row of the table. The parameters and operations of the rows add up to those of the network.

    Attributes:
      name: the path of a Linen module; otherwise the top-level name of parameters.
      kind: the class of the module.
      output_shape: of one image; () if it is unknown.
      num_params: of the layer itself, not of the modules in it.
      flops: floating-point operations of the layer itself for one image, see `forward_flops`.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    num_params: int
    flops: int


class Module(NamedTuple):
    """A call of a Linen module.

    Attributes:
      output_shape: of the first array that it returns, without the batch.
    """

    path: Path
    kind: str
    output_shape: tuple[int, ...]


class Traced(NamedTuple):
    """The evaluation pass of a network by plain operations.

    Attributes:
      jaxpr: the program of (params, model_state, image).
      output_shape: of the logits, without the batch.
      modules: the calls of Linen modules, in the order in which they begin. In the program, "layer=i" is the scope of
        the operations of call i, and the name of its result (`checkpoint_name`).
    """

    jaxpr: Any
    output_shape: tuple[int, ...]
    modules: list[Module]


def layer_table(model: Network, image_shape: tuple[int, ...]) -> list[Layer]:
    """Returns the layers in evaluation, in the order of their first calls, the network itself last.

    The layers of a Linen network are its modules. Containers that compute nothing themselves are left out. For other
    networks, only the parameters have names, and the last row has the operations. Computes no output.

    Args:
      image_shape: (H, W, C).
    """
    state = abstract_state(image_shape, model=model, tx=optax.identity())
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    jaxpr, output_shape, calls = trace(model, eval_params(state), state.model_state, image)
    flops: Counter[Path | None] = Counter()
    for call, count in _operations(jaxpr.jaxpr):
        flops[None if call is None else calls[call].path] += count
    if not isinstance(model, nn.Module):
        counts = _by_top_level_name(state.params).items()
        rows = [Layer(name, "parameters", (), num_params, 0) for name, num_params in counts]
        return [*rows, Layer("forward pass", "", output_shape, 0, flops[None])]
    modules: dict[Path, Module] = {}
    for call in calls:
        modules.setdefault(call.path, call)
    num_params = Counter[Path]()
    for keys, leaf in jax.tree.leaves_with_path(state.params):
        path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        owner = next((path[:i] for i in range(len(path) - 1, -1, -1) if path[:i] in modules), ())
        num_params[owner] += math.prod(leaf.shape)
    containers = {path[:i] for path in modules for i in range(len(path))}
    return [
        Layer("/".join(path) or kind, kind, shape, num_params[path], flops[path])
        for path, kind, shape in sorted(modules.values(), key=lambda module: module.path == ())
        if num_params[path] or flops[path] or path not in containers
    ]


def trace(model: Network, params: PyTree, model_state: dict[str, PyTree], image: Any) -> Traced:
    """Traces the evaluation pass of a network. The arguments may be shapes."""
    calls: list[Module] = []

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "setup":
            return call(*args, **kwargs)
        index, module = len(calls), Module(context.module.path, type(context.module).__name__, ())
        calls.append(module)
        with jax.named_scope(f"layer={index}"):
            output = call(*args, **kwargs)
        calls[index] = module._replace(output_shape=_shape_of(output))
        return jax.tree.map(lambda x: checkpoint_name(x, f"layer={index}") if isinstance(x, Tracer) else x, output)

    with plain_operations(), nn.intercept_methods(record):
        program = jax.make_jaxpr(partial(apply_in_evaluation, model), return_shape=True)
        jaxpr, output = program(params, model_state, image)
    return Traced(jaxpr, _shape_of(logits_of(output)), calls)


def flax_table(model: nn.Module, image_shape: tuple[int, ...], width: int) -> str:
    """Returns Flax's own table of the modules, with their inputs and the shape of every array.

    Args:
      image_shape: (H, W, C).
      width: of the terminal, in columns.
    """
    console = {"force_terminal": False, "width": width}
    mode = mode_of(model, train=False)
    return model.tabulate(jax.random.key(0), jnp.zeros((1, *image_shape)), console_kwargs=console, **mode)


def forward_flops(model: Network, image_shape: tuple[int, ...]) -> int:
    """Returns the floating-point operations of the forward pass of one image in evaluation.

    Counts the multiplications and the additions of all convolutions and matrix products, as publications do, with those
    of the zeros around an image. Kernels that XLA does not know (`jax.ffi`, Pallas) count as nothing, the body of a
    `jax.lax.while_loop` once.

    Args:
      image_shape: (H, W, C).
    """
    return sum(layer.flops for layer in layer_table(model, image_shape))


def layer_of(equation: Any, outer: int | None) -> int | None:
    """Returns the index of the innermost module call of a `Traced` network that an equation belongs to.

    Args:
      outer: that of the equation whose program it is a part of.
    """
    scopes = re.findall(r"layer=(\d+)", str(equation.source_info.name_stack))
    return int(scopes[-1]) if scopes else outer


def _operations(jaxpr: Any, layer: int | None = None) -> Iterator[tuple[int | None, int]]:
    """Yields the index of the layer and the number of operations of each convolution and matrix product."""
    for equation in jaxpr.eqns:
        own, name = layer_of(equation, layer), equation.primitive.name
        if name == "conv_general_dilated":
            kernel, features = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec[0]
            yield own, 2 * equation.outvars[0].aval.size * math.prod(kernel) // kernel[features]
        elif name == "dot_general":
            (axes, _), _ = equation.params["dimension_numbers"]
            summed = math.prod(equation.invars[0].aval.shape[axis] for axis in axes)
            yield own, 2 * equation.outvars[0].aval.size * summed
        times = equation.params["length"] if name == "scan" else 1
        inner = [[*_operations(program, own)] for program in programs_in(equation)]
        if name == "cond":  # One branch is executed: that with the most operations.
            inner = [max(inner, key=lambda found: sum(count for _, count in found))]
        for found in inner:
            yield from ((index, times * count) for index, count in found)


def _shape_of(output: Any) -> tuple[int, ...]:
    """Returns the shape of the first array of an output, without the batch."""
    return next((tuple(leaf.shape[1:]) for leaf in jax.tree.leaves(output) if hasattr(leaf, "shape")), ())


def _by_top_level_name(params: PyTree) -> dict[str, int]:
    counts = Counter[str]()
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path[:1], simple=True) or "params"
        counts[name] += math.prod(leaf.shape)
    return dict(counts)
