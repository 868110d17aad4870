"""Gradient transformations that optax does not have."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree


def orthogonalize() -> optax.GradientTransformation:
    """Orthogonalizes each kernel [I J C K], as a matrix [I*J*C K], by three Newton-Schulz iterations.

    On an accelerator all kernels form one batch of matrices in bfloat16, padded with zeros, which change nothing: a few
    large products are faster than many small ones.

    Source: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024).
    """

    def each(*matrices: Array) -> tuple[Array, ...]:
        return tuple(_newton_schulz(matrix) for matrix in matrices)

    def together(*matrices: Array) -> tuple[Array, ...]:
        rows, columns = (max(matrix.shape[i] for matrix in matrices) for i in range(2))
        padded = [jnp.pad(m, ((0, rows - m.shape[0]), (0, columns - m.shape[1]))) for m in matrices]
        x = _newton_schulz(jnp.stack(padded), jnp.bfloat16)  # [N rows columns]
        return tuple(x[i, : m.shape[0], : m.shape[1]] for i, m in enumerate(matrices))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        leaves, tree = jax.tree.flatten(updates)
        matrices = [leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves]
        matrices = lax.platform_dependent(*matrices, cpu=each, default=together) if leaves else ()
        return tree.unflatten([m.reshape(leaf.shape) for m, leaf in zip(matrices, leaves, strict=True)]), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _newton_schulz(x: Float[Array, "*N R C"], dtype: DTypeLike = jnp.float32) -> Float[Array, "*N R C"]:
    """Source: Keller Jordan, "Muon" (2024): a quintic polynomial that amplifies small singular values."""
    a, b, c = 3.4445, -4.7750, 2.0315
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = (x / (norm + 1e-8)).astype(dtype)
    for _ in range(3):
        gram = x.mT @ x
        x = a * x + x @ (b * gram + c * (gram @ gram))
    return x.astype(jnp.float32)


def keep_norm() -> optax.GradientTransformation:
    """Rescales each convolution kernel [I J C K] to norm sqrt(K) before its update is added; the last of a chain.

    A kernel of zeros is not rescaled.
    """

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        def add(u: Array, p: Array) -> Array:
            # Selected per element: a selected factor would round differently.
            return jnp.where(p == 0, u, u + p * (p.shape[-1] ** 0.5 / jnp.linalg.norm(p.ravel()) - 1))

        return jax.tree.map(add, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class DelayState(NamedTuple):
    """The state of `delay`.

    Attributes:
      step: number of updates, int32.
      inner: the state of the wrapped optimizer.
    """

    step: Int[Array, ""]
    inner: Any


def delay(tx: optax.GradientTransformation, start: int) -> optax.GradientTransformationExtraArgs:
    """Freezes the parameters and the state of an optimizer for the first `start` updates."""
    tx = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> DelayState:
        return DelayState(jnp.zeros((), jnp.int32), tx.init(params))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> tuple[PyTree, DelayState]:
        updates, inner = tx.update(updates, state.inner, params, **extra)
        started = state.step >= start
        updates = jax.tree.map(lambda u: jnp.where(started, u, jnp.full_like(u, -0.0)), updates)  # -0.0 changes no bit.
        inner = jax.tree.map(lambda new, old: jnp.where(started, new, old), inner, state.inner)
        return updates, DelayState(state.step + 1, inner)

    return optax.GradientTransformationExtraArgs(init, update)


class AverageState(NamedTuple):
    """The state of `average`.

    Attributes:
      step: number of updates, int32.
      params: the average, which `eval_params` returns.
      inner: the state of the wrapped optimizer.
    """

    step: Int[Array, ""]
    params: PyTree
    inner: Any


def average(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformationExtraArgs:
    """Keeps an exponential moving average of the parameters, which changes no update.

    After update t (from 1) it keeps min(decay, t / (9 + t)) of its value: little at first.

    Source: TensorFlow's `ExponentialMovingAverage` with `num_updates`; Polyak and Juditsky (1992).
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> tuple[PyTree, AverageState]:
        updates, inner = tx.update(updates, state.inner, params, **extra)
        count = state.step + 1
        kept = jnp.minimum(decay, count / (9 + count))

        def next_average(a: Array, p: Array, u: Array) -> Array:
            new = p + u.astype(p.dtype)
            return jnp.where(new == a, a, a + (1 - kept).astype(a.dtype) * (new - a))  # Frozen ones keep their bits.

        return updates, AverageState(count, jax.tree.map(next_average, state.params, params, updates), inner)

    return optax.GradientTransformationExtraArgs(init, update)


class LookaheadState(NamedTuple):
    """The state of `lookahead`.

    Attributes:
      step: number of updates, int32.
      slow: the slow weights, shaped like the parameters.
      inner: the state of the wrapped optimizer.
    """

    step: Int[Array, ""]
    slow: PyTree
    inner: Any


def lookahead(tx: optax.GradientTransformation, every: int, num_updates: int) -> optax.GradientTransformationExtraArgs:
    """Synchronizes the parameters with slow weights every `every` updates.

    At update t the slow weights keep 0.95**every * (t / num_updates)**3 of their value: little at first, most at the
    end and later. After the last update the parameters are the slow weights. Unlike `optax.lookahead`, the decay is
    scheduled and the state holds plain parameters. Extra arguments are passed to `tx`.

    Source: Zhang et al., "Lookahead Optimizer" (2019), with the decay of Keller Jordan's airbench94.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> LookaheadState:
        return LookaheadState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> tuple[PyTree, LookaheadState]:
        updates, inner = tx.update(updates, state.inner, params, **extra)
        count = state.step + 1
        synchronize = count % every == 0
        decay = jnp.where(synchronize, 0.95**every * (jnp.minimum(count, num_updates) / num_updates) ** 3, 1.0)
        synchronize |= count == num_updates

        def slow_of(s: Array, p: Array, u: Array) -> Array:
            return jnp.where(synchronize, s + (1 - decay) * (p + u - s), s)

        slow = jax.tree.map(slow_of, state.slow, params, updates)
        updates = jax.tree.map(lambda u, s, p: jnp.where(synchronize, s - p, u), updates, slow, params)
        return updates, LookaheadState(count, slow, inner)

    return optax.GradientTransformationExtraArgs(init, update)
