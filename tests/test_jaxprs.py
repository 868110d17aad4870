"""Random numbers that a program would draw again in every step."""

import jax
import jax.numpy as jnp
import pytest

from cnnjax.jaxprs import repeats_draws

KEY = jax.random.key(7)


def folded(key, step):
    return jax.random.normal(jax.random.fold_in(key, step), (2,))


def split_after_folding(key, step):
    return jax.random.bernoulli(jax.random.split(jax.random.fold_in(key, step), 3)[1])


def in_a_loop(key, step):
    return jax.lax.fori_loop(0, 3, lambda i, x: x + jax.random.normal(jax.random.fold_in(key, i)), 0.0 * step)


def in_a_scan(key, step):
    return jax.lax.scan(lambda x, key: (x + jax.random.normal(key), None), 0.0 * step, jax.random.split(key, 3))[0]


def in_a_while(key, step):
    return jax.lax.while_loop(lambda x: x < 3, lambda x: x + jax.random.uniform(key), 0.0 * step)


def until_it_is_low(key, step):
    return jax.lax.while_loop(lambda x: jax.random.uniform(key) < x, lambda x: x / 2, 1.0 * step)


def folded_in_a_scan(key, step):
    return in_a_scan(jax.random.fold_in(key, step), step)


def rematerialized(key, step):
    return jax.checkpoint(lambda x, key: x + jax.random.normal(key))(1.0 * step, key)


def constant(key, step):
    return jax.random.normal(jax.random.key(3), (2,)) + step


def alone(key, step):
    return jax.random.normal(key, (2,)) + step


def split_alone(key, step):
    return jax.jit(lambda key: jax.vmap(jax.random.uniform)(jax.random.split(key, 3)))(key) + step


def under_a_derivative(key, step):
    return jax.grad(lambda x: (x * jax.random.normal(key)).sum())(1.0 * step)


def in_a_branch(key, step):
    return jax.lax.cond(True, lambda key: jax.random.gamma(key, 2.0), lambda key: jnp.zeros(()), key) + step


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (folded, False),
        (split_after_folding, False),
        (in_a_loop, True),  # The counter of the loop begins anew in each step.
        (in_a_scan, True),
        (in_a_while, True),
        (rematerialized, True),
        (folded_in_a_scan, False),
        (until_it_is_low, True),
        (constant, False),
        (alone, True),
        (split_alone, True),
        (under_a_derivative, True),
        (in_a_branch, True),
    ],
)
def test_draws_that_depend_on_the_key_alone(draw, expected):
    assert repeats_draws(jax.make_jaxpr(draw)(KEY, 5), [True, False]) == expected
