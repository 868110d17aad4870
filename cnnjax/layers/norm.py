"""Batch normalization and GELU as one operation that keeps a single activation for its backward pass."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnnjax.layers.derivatives import fast_vjp
from cnnjax.onednn import elementwise

EPSILON, MOMENTUM = 1e-12, 0.6  # Source: Keller Jordan (2024), airbench94.


@fast_vjp
def batch_norm_gelu(
    x: Float[Array, "B H W C"], bias: Float[Array, " C"], residual: Float[Array, "B H W C"] | None = None
) -> tuple[Float[Array, "B H W C"], Float[Array, " C"], Float[Array, " C"]]:
    """Normalizes each channel of `x`, adds `bias` and `residual`, and applies GELU.

    The computation is in float32; the result and the gradient before the norm are rounded to the dtype of `x`. The
    backward pass recomputes values: on an accelerator this is faster than reading them from memory.

    Returns:
      The features, and the float32 mean and variance of each channel, through which no gradient flows.
    """
    return _batch_norm_gelu_fwd(x, bias, residual)[0]


def plain_batch_norm_gelu(
    x: Float[Array, "B H W C"], bias: Float[Array, " C"], residual: Float[Array, "B H W C"] | None = None
) -> tuple[Float[Array, "B H W C"], Float[Array, " C"], Float[Array, " C"]]:
    """Returns `batch_norm_gelu` of the same arguments, by plain XLA operations."""
    wide = x.astype(jnp.float32)
    mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    y = _norm_gelu(x, mean, lax.rsqrt(var + EPSILON), bias, residual)
    return y, lax.stop_gradient(mean), lax.stop_gradient(var)


def _batch_norm_gelu_fwd(x, bias, residual):
    operands = (x, bias) if residual is None else (x, bias, residual)
    y, mean, var, scale = elementwise.on_cpu(_fast_forward, _forward, *operands)
    return (y, mean, var), (x, mean, scale, bias, residual)


def _forward(x, bias, residual=None):
    wide = x.astype(jnp.float32)
    mean = wide.mean((0, 1, 2))
    var = jnp.maximum((wide * wide).mean((0, 1, 2)) - mean**2, 0)
    scale = lax.rsqrt(var + EPSILON)
    return _norm_gelu(x, mean, scale, bias, residual), mean, var, scale


def _fast_forward(x, bias, *residual):
    mean, square = elementwise.norm_sums(x) / (x.size // x.shape[-1])
    var = jnp.maximum(square - mean**2, 0)
    scale = lax.rsqrt(var + EPSILON)
    return elementwise.norm_gelu(x, mean, scale, bias, *residual), mean, var, scale


def _batch_norm_gelu_bwd(residuals, cotangents):
    x, *others, residual = residuals
    operands = (x, cotangents[0], *others) if residual is None else (x, cotangents[0], *others, residual)
    x_grad, bias_grad, g = elementwise.on_cpu(_fast_backward, _backward, *operands)
    return x_grad, bias_grad, None if residual is None else g.astype(residual.dtype)


def _backward(x, g, mean, scale, *shift):  # shift: bias and, if there is one, residual.
    x = lax.optimization_barrier(x)  # Without it XLA keeps the normalized `x` in float32.
    _, pullback = jax.vjp(nn.gelu, _norm(x, mean, scale, *shift))
    # Rounded once for all of its readers, which halves the memory traffic of float32.
    g = lax.optimization_barrier(pullback(g.astype(jnp.float32))[0].astype(x.dtype))
    wide, count = g.astype(jnp.float32), x.size // x.shape[-1]
    bias_grad, along = wide.sum((0, 1, 2)), (wide * _norm(x, mean, scale)).sum((0, 1, 2))
    # scale * (g - bias_grad / count - normal * along / count), with the normalized `x` written out.
    slope = -(scale**2) * along / count
    x_grad = _row(scale) * wide + _row(slope) * x.astype(jnp.float32) - _row(scale * bias_grad / count + slope * mean)
    return x_grad.astype(x.dtype), bias_grad.astype(shift[0].dtype), g


def _fast_backward(x, g, mean, scale, bias, *residual):
    g, sums = elementwise.norm_gelu_grad(x, g, mean, scale, bias, *residual)
    x_grad = elementwise.norm_grad(x, g, mean, scale, *(sums / (x.size // x.shape[-1])))
    return x_grad, sums[0].astype(bias.dtype), g


batch_norm_gelu.defvjp(_batch_norm_gelu_fwd, _batch_norm_gelu_bwd)
batch_norm_gelu.defplain(plain_batch_norm_gelu)


def _norm(x, mean, scale, bias=None, residual=None):
    y = (x.astype(jnp.float32) - _row(mean)) * _row(scale)
    y = y if bias is None else y + _row(bias.astype(jnp.float32))
    return y if residual is None else y + residual.astype(jnp.float32)


def _norm_gelu(x, mean, scale, bias, residual):
    return nn.gelu(_norm(x, mean, scale, bias, residual)).astype(x.dtype)


def _row(x: Float[Array, " C"]) -> Float[Array, "1 1 1 C"]:
    return x[None, None, None]


class NormGelu(nn.Module):
    """Batch normalization without a learned scale, an optional residual connection, and GELU."""

    plain: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], residual: Float[Array, "B H W C"] | None = None, *, train: bool
    ) -> Float[Array, "B H W C"]:
        """Returns the features; in training, normalizes by batch statistics and updates their running averages."""
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), shape, jnp.float32)
        if not train:
            return _norm_gelu(x, mean.value, lax.rsqrt(var.value + EPSILON), bias, residual)
        y, batch_mean, batch_var = (plain_batch_norm_gelu if self.plain else batch_norm_gelu)(x, bias, residual)
        if not self.is_initializing():
            mean.value = MOMENTUM * mean.value + (1 - MOMENTUM) * batch_mean
            var.value = MOMENTUM * var.value + (1 - MOMENTUM) * batch_var
        return y
