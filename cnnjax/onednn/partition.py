"""Divides calls among the devices that share a batch, and maps them over further axes: XLA cannot do so itself."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import NamedSharding, PartitionSpec


def divided(call: Callable[..., Any], dims: str, config: np.ndarray) -> Callable[..., Any]:
    """Makes XLA divide an FFI call along the batch, and defines its `vmap`.

    Each device computes the examples that it holds; results that are sums over the batch are then added. XLA gathers
    any other dimension that is sharded, and the batch if the devices do not divide it. On a mesh with explicit axes, it
    gathers the batch, too. `vmap` folds an axis that all examples and nothing else have into the batch; it computes any
    other axis one element after another.

    Args:
      call: the function of arrays, for any number of examples.
      dims: names of the dimensions of operands and results, as in einops. `b` is the batch, the first dimension of
        operands and results; no other name occurs twice. Results without `b` are sums over the batch. The first operand
        has `b`, and a single result that has it is not in a list.
      config: identifies the call in the key of the compilation cache. JAX's own key has only an address there, which
        another call can have later.
    """
    operands, results = dims.split("->")
    has_batch, kept = ([names.split()[0] == "b" for names in side.split(",")] for side in (operands, results))

    def partition(mesh: Any, operands: Any, results: Any) -> Any:
        axes = [x.sharding.spec[0] for x, b in zip(operands, has_batch, strict=True) if b]
        axes = next(filter(None, axes), ())
        axes = (axes,) if isinstance(axes, str) else axes
        if operands[0].shape[0] % math.prod(mesh.shape[axis] for axis in axes):
            axes = ()
        whole, part = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(axes)))

        def local(*operands: Array) -> Any:
            results, tree = jax.tree.flatten(call(*operands))
            sums = iter(lax.psum([x for x, b in zip(results, kept, strict=True) if not b], axes))
            return tree.unflatten([x if b else next(sums) for x, b in zip(results, kept, strict=True)])

        return_to = jax.tree.structure(results).unflatten([part if b else whole for b in kept])
        return mesh, local, return_to, tuple(part if b else whole for b in has_batch)

    across_devices = custom_partitioning(call)
    across_devices.def_partition(partition, sharding_rule=dims, reduction_factors=() if any(kept) else ("b",))

    @custom_vmap
    def f(*operands: Array) -> Any:
        mesh, shardy = jax.sharding.get_abstract_mesh(), jax.config.values["jax_use_shardy_partitioner"]
        if mesh.manual_axes or mesh.explicit_axes or not shardy:  # custom_partitioning fails there.
            return call(*operands)
        with set_xla_metadata(onednn=" ".join(map(str, config))):
            return across_devices(*operands)

    @f.def_vmap
    def _(size: int, is_mapped: list[bool], *operands: Array) -> Any:
        if is_mapped == has_batch and all(kept):
            folded = (
                x.reshape(size * x.shape[1], *x.shape[2:]) if m else x for x, m in zip(operands, is_mapped, strict=True)
            )
            y = f(*folded)
            return y.reshape(size, operands[0].shape[1], *y.shape[1:]), True

        def one(mapped: list[Array]) -> Any:
            rest = iter(mapped)
            return f(*(next(rest) if m else x for x, m in zip(operands, is_mapped, strict=True)))

        results = lax.map(one, [x for x, m in zip(operands, is_mapped, strict=True) if m])
        return results, jax.tree.map(lambda _: True, results)

    return f
