import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from reference import assert_near, draw

from cnnjax.layers.modules import Conv, Dense, Dropout
from cnnjax.layers.ops import max_pool_2x2


@pytest.mark.parametrize(("ours", "flax"), [(Conv(5, relu=True), nn.Conv(5, (3, 3))), (Dense(5), nn.Dense(5))])
def test_variables_and_results_match_flax(ours, flax):
    (x,) = draw((4, 6, 6, 3) if isinstance(ours, Conv) else (4, 8))
    variables = jax.jit(flax.init)(jax.random.key(0), x)
    got = jax.eval_shape(ours.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, variables)
    expected = jax.jit(flax.apply)(variables, x)
    expected = nn.relu(expected) if isinstance(ours, Conv) else expected
    np.testing.assert_allclose(jax.jit(ours.apply)(variables, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kernel_size", "h", "w"), [(3, 7, 5), (3, 8, 6), (2, 7, 6), (1, 7, 6)])
def test_even_convolution_skips_an_odd_row_and_column(kernel_size, h, w):
    """A max pool ignores them: neither its result nor a gradient changes."""
    x, weight = draw((2, h, w, 3), (2, h // 2, w // 2, 4))
    whole, even = Conv(4, kernel_size), Conv(4, kernel_size, even=True)
    variables = whole.init(jax.random.key(0), x)

    def forward_and_gradients(module):
        def loss(variables, x):
            y = module.apply(variables, x)
            return jnp.sum(weight * max_pool_2x2(y)), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables, x)

    (got_grads, got), (wanted_grads, wanted) = forward_and_gradients(even), forward_and_gradients(whole)
    assert_near(got, wanted[:, : h // 2 * 2, : w // 2 * 2], 1e-6)
    jax.tree.map(lambda a, b: assert_near(a, b, 1e-5), got_grads, wanted_grads)


def test_dropout_consumes_the_dropout_key_in_training_only():
    (x,) = draw((4, 64))
    train = Dropout(0.5).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    assert 0 < np.mean(np.asarray(train) == 0) < 1
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, train=False), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, train=True), x)
