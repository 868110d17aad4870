from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax.optim.transforms import average, delay, keep_norm, lookahead, orthogonalize

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("shape", [(3, 3, 2, 4), (1, 1, 3, 8)], ids=["more rows", "more columns"])
def test_orthogonalized_kernels_keep_their_singular_vectors(shape):
    """The quintic acts on each singular value, scaled by the norm of all."""
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    got, _ = orthogonalize().update({"kernel": jnp.asarray(kernel)}, optax.EmptyState())
    u, s, v = np.linalg.svd(kernel.reshape(-1, shape[-1]).astype(np.float64), full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    np.testing.assert_allclose(got["kernel"].reshape(-1, shape[-1]), u * s @ v, rtol=0, atol=1e-5)


def test_kernels_are_orthogonalized_together_as_each_alone(monkeypatch):
    """On an accelerator: in bfloat16, padded with zeros to the largest; one has more columns than rows."""
    rng = np.random.default_rng(0)
    shapes = {"wide": (1, 1, 3, 8), "small": (3, 3, 2, 4), "large": (3, 3, 4, 6)}
    kernels = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    @jax.jit
    def on_cpu(kernels):
        return orthogonalize().update(kernels, optax.EmptyState())[0]

    exact = on_cpu(kernels)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, cpu, default: default(*operands))

    @jax.jit
    def on_accelerator(kernels):
        def update(kernels):
            return orthogonalize().update(kernels, optax.EmptyState())[0]

        return update(kernels), {name: update({name: kernel})[name] for name, kernel in kernels.items()}

    together, alone = on_accelerator(kernels)
    for name, shape in shapes.items():
        assert together[name].shape == shape
        assert together[name].dtype == jnp.float32
        assert jnp.any(together[name] != exact[name])  # It is in bfloat16.
        np.testing.assert_allclose(together[name], alone[name], rtol=0, atol=2**-7)
        # Each iteration multiplies the first rounding error, 2**-9, as it does small values.
        np.testing.assert_allclose(together[name], exact[name], rtol=0, atol=3.4445**3 * 2**-9)


def test_keep_norm_by_hand():
    params = jnp.array([3.0, 0.0, 0.0, 4.0]).reshape(1, 1, 1, 4)  # Norm 5, and 4 features: to the norm 2.
    update = jnp.full((1, 1, 1, 4), 0.5)
    tx = keep_norm()
    updates, _ = tx.update(update, tx.init(params), params)
    np.testing.assert_allclose((params + updates).ravel(), [1.7, 0.5, 0.5, 2.1], rtol=1e-6)


def test_a_kernel_of_zeros_gets_its_update():
    params, update = jnp.zeros((1, 1, 2, 4)), jnp.full((1, 1, 2, 4), 0.5)
    np.testing.assert_array_equal(keep_norm().update(update, optax.EmptyState(), params)[0], update)


def test_lookahead_by_hand():
    """Steps of -1 to -5 from 10; synchronized after every second one; the last leaves the slow weights."""
    tx = lookahead(optax.sgd(lambda step: 1.0 + step), every=2, num_updates=5)
    params = {"x": jnp.array([10.0])}
    state, got = tx.init(params), []
    for _ in range(5):
        updates, state = tx.update({"x": jnp.ones(1)}, state, params)
        params = optax.apply_updates(params, updates)
        got.append(float(params["x"][0]))
    decay2, decay4 = (0.95**2 * (step / 5) ** 3 for step in (2, 4))
    slow2 = decay2 * 10 + (1 - decay2) * (10 - 1 - 2)
    slow4 = decay4 * slow2 + (1 - decay4) * (slow2 - 3 - 4)
    np.testing.assert_allclose(got, [9, slow2, slow2 - 3, slow4, slow4], rtol=1e-6)


def test_after_its_last_update_lookahead_keeps_what_it_does_at_the_last():
    values, _ = run(lookahead(optax.sgd(1.0), every=1, num_updates=2), [1.0] * 4, jnp.float32(10))
    kept = 0.95 * np.array([1 / 8, 1, 1, 1])
    np.testing.assert_allclose(values, 10 - np.cumsum(1 - kept), rtol=1e-6)


def run(tx, grads, x):
    """Returns the parameter after each update, and the last state."""
    # XLA's default, also in `make test`: the other emitters, of jaxlib 0.10 only, round two programs differently.
    emitters = {"xla_cpu_use_fusion_emitters": True} if version("jaxlib").startswith("0.10.") else {}
    update = jax.jit(tx.update, compiler_options=emitters)
    state, values = tx.init(x), []
    for grad in grads:
        updates, state = update(jnp.float32(grad), state, x)
        x = optax.apply_updates(x, updates)
        values.append(x)
    return np.array(values), state


def test_delayed_parameters_keep_their_bits_and_then_train_as_from_the_start():
    grads = np.random.default_rng(0).normal(size=8)
    for x in (jnp.float32(1.5), jnp.float32(-0.0)):
        values, _ = run(delay(optax.adam(0.1), 3), grads, x)
        np.testing.assert_array_equal(values[:3].view(np.int32), np.repeat(np.float32(x), 3).view(np.int32))
        np.testing.assert_array_equal(values[3:], run(optax.adam(0.1), grads[3:], x)[0])


def test_the_average_equals_its_recurrence_and_changes_no_update():
    grads = np.random.default_rng(0).normal(size=40)
    values, state = run(average(optax.sgd(0.1), 0.7), grads, jnp.float32(2))
    np.testing.assert_array_equal(values, run(optax.sgd(0.1), grads, jnp.float32(2))[0])
    expected = 2.0
    for t, x in enumerate(values.astype(np.float64), start=1):
        kept = min(0.7, t / (9 + t))
        expected = kept * expected + (1 - kept) * x
    np.testing.assert_allclose(state.params, expected, rtol=1e-6)


def test_the_average_of_a_constant_keeps_its_bits():
    x = jnp.float32(0.1)
    _, state = run(average(optax.sgd(0.1), 0.99), np.zeros(30), x)
    assert state.params == x
