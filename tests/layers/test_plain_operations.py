"""The switch `plain_operations`, against the fast operations that it replaces."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.layers.blocks import ConvNorm
from cnnjax.layers.derivatives import plain_operations
from cnnjax.layers.modules import Conv, Dense
from cnnjax.layers.norm import NormGelu
from cnnjax.layers.ops import gelu, max_pool_2x2
from cnnjax.models.resnet import max_pool_3x3


class Everything(nn.Module):
    """Every layer with a fast form."""

    @nn.compact
    def __call__(self, x, *, train):
        x = ConvNorm(6, 5, 2, relu=None)(gelu(Conv(4, relu=True)(x)), train=train)
        x = ConvNorm(None, same=True)(ConvNorm(8, 1, relu=6.0)(x, train=train), train=train)
        x = NormGelu()(max_pool_2x2(max_pool_3x3(x)), train=train)
        return Dense(3)(x.reshape(len(x), -1))


def test_every_layer_becomes_a_standard_operation_and_back(quick_compilation):
    """The jitted function is the same one, which JAX has traced before."""
    random = np.random.default_rng(0)
    model, x = Everything(), jnp.asarray(random.normal(size=(2, 19, 16, 3)), jnp.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    variables = jax.tree.map(lambda a: jnp.asarray(random.uniform(0.1, 0.5, a.shape), jnp.float32), shapes)

    def apply(variables, train):
        return model.apply(variables, x, train=train, mutable=["batch_stats"])[0]

    forward = jax.jit(apply, static_argnames="train")
    fast = forward(variables, train=False)
    with plain_operations():
        plain = forward(variables, train=False)
        text = forward.lower(variables, train=False).as_text()
        gradient = jax.jit(jax.grad(lambda variables: apply(variables, True).sum())).lower(variables).as_text()
    np.testing.assert_allclose(plain, fast, rtol=1e-5)
    assert np.abs(fast).max() > 0.1
    for program in (text, gradient):
        assert "custom_call" not in program and "case" not in program  # No kernel of oneDNN, no branch per platform.
    counts = {name: text.count(f"stablehlo.{name}") for name in ("convolution", "reduce_window", "dot_general")}
    assert counts == {"convolution": 4, "reduce_window": 2, "dot_general": 1}
    np.testing.assert_array_equal(forward(variables, train=False), fast)
