"""The filters of the first layer of a trained network, and the feature maps of all layers for one image."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from cnnjax.report.interpreter import Interpreter, Record
from cnnjax.runs.run import Run
from cnnjax.state import eval_params
from cnnjax.summary import trace

NUM_MAPS = 16  # Maps that are shown of a layer.
SIDE = 64  # Pixels of the longer side of a map, at most.


class FeatureMap(NamedTuple):
    """The output of one operation.

    Attributes:
      name: the path of the Linen module that computes it, or the operation and its number.
      operation: in words: "convolution", "ReLU", "max-pool", "normalization", "dense", "logits", ...
      shape: (h, w, c), or (n,) for a vector.
      maps: float32, the channels that vary most (those of the convolution that they stem from); a vector is [1 1 n].
        Of more than 64 pixels a side, the means of square blocks.
      channels: their indices.
    """

    name: str
    operation: str
    shape: tuple[int, ...]
    maps: Float[np.ndarray, "h w k"]
    channels: tuple[int, ...]


def first_filters(run: Run) -> Float[np.ndarray, "I J C K"] | None:
    """Returns the kernel of the first convolution that sees the image, float32, or None if there is none."""
    _, kernel = _interpret(run, np.zeros(run.facts.image_shape, np.uint8), kernel_only=True)
    return kernel


def feature_maps(run: Run, image: UInt8[np.ndarray, "H W C"]) -> list[FeatureMap]:
    """Returns the outputs of the operations for one image, in the order in which they are computed.

    A bias is a part of its convolution. Reshapes, casts and the inside of `jax.lax.scan` are not shown.
    """
    return _interpret(run, image)[0]


def _interpret(
    run: Run, image: UInt8[np.ndarray, "H W C"], kernel_only: bool = False
) -> tuple[list[FeatureMap], Float[np.ndarray, "I J C K"] | None]:
    state = run.state
    arguments = (eval_params(state), state.model_state, run.standardize(image[None]))
    traced = trace(run.config.model, *arguments)
    records: list[Record] = []

    # One program: a call for each operation would compile each of them. It runs once, so that it need not be fast.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})
    def program(*leaves: Any) -> tuple[list[Any], Any]:
        found = Interpreter(traced.modules, leaves[-1])
        outputs = found.run(traced.jaxpr.jaxpr, traced.jaxpr.consts, [*leaves[:-1], found.image])
        found.finish(outputs[0])
        records.extend(found.records)
        return [] if kernel_only else [_reduce(record.shown.astype(jnp.float32)) for record in records], found.kernel

    maps, kernel = program(*jax.tree.leaves(arguments))
    return list(_choose_channels(records, maps)), None if kernel is None else np.asarray(kernel)


def _reduce(x: jax.Array) -> jax.Array:
    """Returns the means of blocks of maps [h w c] that are larger than `SIDE`; their last rows may be left out."""
    if x.ndim == 1:
        return x
    h, w, _ = x.shape
    block = -(-max(h, w) // SIDE)
    a, b = min(block, h), min(block, w)
    return x[: h // a * a, : w // b * b].reshape(h // a, a, w // b, b, -1).mean((1, 3))


def _choose_channels(records: Sequence[Record], maps: Sequence[Any]) -> Iterator[FeatureMap]:
    totals, numbers = Counter(record.operation for record in records if not record.name), Counter[str]()
    chosen: dict[int, np.ndarray] = {}
    for record, values in zip(records, maps, strict=bool(maps)):
        x, operation = np.asarray(values), record.operation
        name = record.name
        if not name:
            numbers[operation] += 1
            name = f"{operation} {numbers[operation]}" if totals[operation] > 1 else operation
        if x.ndim == 1:
            yield FeatureMap(name, operation, record.shown.shape, x[None, None], tuple(range(len(x))))
            continue
        same = record.source.shown.shape[-1:] == x.shape[-1:] if id(record.source) in chosen else False
        if same and operation != "convolution":
            channels = chosen[id(record.source)]  # To compare the maps before and after.
        else:
            channels = np.sort(np.argsort(-x.std((0, 1)), kind="stable")[:NUM_MAPS])
        chosen[id(record)] = channels
        yield FeatureMap(name, operation, record.shown.shape, x[..., channels], tuple(channels.tolist()))
