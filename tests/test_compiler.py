import os
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from cnnjax import compiler
from cnnjax.compiler import compiler_options, jit

DETERMINISM = "xla_gpu_deterministic_ops"
CONVOLUTION = "xla_cpu_experimental_ynn_fusion_type"
SCHEDULER = "xla_cpu_scheduler_type"
X = jnp.arange(1.0, 5.0)


def options(monkeypatch, jaxlib="0.10.2", flags="", backend="cpu", runs_once=False):
    """Returns the names of the options in a new process."""
    monkeypatch.setattr(compiler, "version", lambda package: {"jaxlib": jaxlib}[package])
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setenv("XLA_FLAGS", flags)
    return set(compiler._options.__wrapped__(runs_once=runs_once))


@pytest.mark.parametrize(
    ("jaxlib", "expected"),
    [
        ("0.10.2", {DETERMINISM, CONVOLUTION, SCHEDULER}),
        ("0.12.0", {DETERMINISM, CONVOLUTION}),
        ("0.13.0", {DETERMINISM}),
    ],
)
def test_only_versions_that_know_an_option_get_it(jaxlib, expected, monkeypatch):
    assert options(monkeypatch, jaxlib) == options(monkeypatch, jaxlib, backend="gpu") == expected


def test_other_platforms_get_no_options(monkeypatch):
    assert options(monkeypatch, backend="tpu") == set()


def test_flags_of_the_user_take_precedence(monkeypatch, tmp_path):
    assert options(monkeypatch, flags=f"--{CONVOLUTION}=-reduce --{SCHEDULER}_of_others=1") == {DETERMINISM, SCHEDULER}
    file = tmp_path / "flags"  # XLA reads them from a file if the variable is not a flag.
    file.write_text(f"--{DETERMINISM}=false\n--{SCHEDULER}=CPU_SCHEDULER_TYPE_DEFAULT\n")
    assert options(monkeypatch, flags=str(file)) == {CONVOLUTION}


EMITTERS = "xla_cpu_use_fusion_emitters"  # Of jaxlib 0.10 only.
QUICK = {"xla_backend_optimization_level": 1, EMITTERS: False}


def test_only_a_program_that_runs_once_on_a_cpu_is_compiled_quickly(monkeypatch):
    for jaxlib, expected in [("0.10.2", set(QUICK)), ("0.11.2", set(QUICK) - {EMITTERS})]:
        assert options(monkeypatch, jaxlib, runs_once=True) - options(monkeypatch, jaxlib) == expected
    for how in [{"backend": "gpu"}, {"jaxlib": "0.13.0"}]:
        assert options(monkeypatch, **how, runs_once=True) == options(monkeypatch, **how)
    assert set(QUICK) - options(monkeypatch, flags=f"--{EMITTERS}", runs_once=True) == {EMITTERS}


def test_the_installed_jaxlib_knows_the_options():
    for runs_once in (False, True):
        assert jax.jit(jnp.sin, compiler_options=compiler_options(runs_once=runs_once))(0.0) == 0


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the options are for a CPU")
def test_quick_compilation_gives_the_bits_of_xlas_defaults():
    def draw(key):
        kernel, bias, embedding, projection = jax.random.split(key, 4)
        return (
            nn.initializers.he_normal()(kernel, (3, 3, 16, 24)),
            nn.initializers.glorot_uniform()(bias, (48, 24)),
            nn.initializers.normal()(embedding, (40, 24)),
            nn.initializers.orthogonal()(projection, (40, 24)),
        )

    lowered = jax.jit(draw).lower(jax.random.key(0))
    defaults = {"xla_backend_optimization_level": 3, EMITTERS: True}
    if not version("jaxlib").startswith("0.10."):
        del defaults[EMITTERS]
    quickly = {name: QUICK[name] for name in defaults}
    quick, full = (lowered.compile(options)(jax.random.key(0)) for options in (quickly, defaults))
    jax.tree.map(np.testing.assert_array_equal, quick, full)


# Prints the optimized programs of a convolution with its gradients, of a matrix product, and of sums.
PROGRAMS = """
import re
import jax, jax.numpy as jnp
from jax import lax

def convolution(x, kernel):
    f = lambda x, kernel: (lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) ** 2).sum()
    return jax.value_and_grad(f, (0, 1))(x, kernel)

def programs(jit):
    x, kernel, matrix = jnp.ones((16, 32, 32, 3)), jnp.ones((3, 3, 3, 32)), jnp.ones((512, 512))
    cases = [(convolution, x, kernel), (jnp.dot, matrix, matrix), (lambda x: (x**2).sum((1, 2)), x)]
    for f, *operands in cases:
        text = jit(f).lower(*operands).compile().as_text()
        yield re.sub(r"metadata={.*?}|^(HloModule|File|Function|Stack|\\d).*$", "", text, flags=re.MULTILINE).split()
"""


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the flags are for a CPU")
def test_programs_are_those_of_the_flags_that_the_options_stand_for():
    """XLA's flag removes one fusion from its defaults, and an option can only list those that remain."""
    flags = {f"--{DETERMINISM}=true", f"--{CONVOLUTION}=-individual_convolution"}
    flags.update(os.environ.get("XLA_FLAGS", "").split())
    if SCHEDULER in compiler_options():
        flags.add(f"--{SCHEDULER}=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED")
    script = PROGRAMS + "print(list(programs(jax.jit)))"
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    printed = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True)
    here = {"__name__": "programs"}
    exec(PROGRAMS, here)
    ours, plain = ([*here["programs"](way)] for way in (jit, jax.jit))
    assert str(ours) == printed.strip()
    assert ours != plain


# --- Inside other programs ------------------------------------------------------------------------------------------


def auto_mesh():
    return jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))


def sharded(f):
    return jax.shard_map(f, mesh=auto_mesh(), in_specs=PartitionSpec("i"), out_specs=PartitionSpec("i"))


CUBE, SLOPE = np.arange(1, 5) ** 3, 3 * np.arange(1, 5) ** 2
# Where x³ is called, what that must return, and whether it is compiled there as a program of its own.
PLACES = {
    "eager": (lambda f: f(X), CUBE, True),
    "vmap": (lambda f: jax.vmap(f)(X), CUBE, True),
    "vmap without a batched argument": (lambda f: jax.vmap(lambda x: x * 0 + f(2.0))(X), [8] * 4, True),
    "jvp": (lambda f: jax.jvp(f, (X,), (X / X,))[1], SLOPE, True),
    "jit": (lambda f: jax.jit(f)(X), CUBE, False),
    "jit of a constant": (lambda f: jax.jit(lambda: f(X))(), CUBE, False),
    "scan": (lambda f: lax.scan(lambda carry, x: (carry, f(x)), 0, X)[1], CUBE, False),
    "vmap in jit": (lambda f: jax.jit(jax.vmap(f))(X), CUBE, False),
    "jit in vmap": (lambda f: jax.vmap(jax.jit(f))(X), CUBE, False),
    "shard_map": (lambda f: sharded(f)(X), CUBE, False),
    "shard_map in jit": (lambda f: jax.jit(sharded(f))(X), CUBE, False),
    "checkpoint": (lambda f: jax.checkpoint(f)(X), CUBE, False),
    "linearize": (lambda f: jax.linearize(f, X)[1](X / X), SLOPE, None),
    # As a program of its own since jax 0.12.
    "grad": (lambda f: jax.grad(lambda x: f(x).sum())(X), SLOPE, None),
    "grad of vmap": (lambda f: jax.grad(lambda x: jax.vmap(f)(x).sum())(X), SLOPE, None),
    "vmap of grad": (lambda f: jax.vmap(jax.grad(f))(X), SLOPE, None),
    "hessian": (lambda f: jax.hessian(f)(2.0), 12, None),
    "reverse over forward": (lambda f: jax.grad(lambda x: jax.jvp(f, (x,), (1.0,))[1])(2.0), 12, None),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_function_works_inside_every_transformation(place, monkeypatch):
    call, expected, own = PLACES[place]
    compiler._top_level.cache_clear()  # As if this were the first call.
    np.testing.assert_allclose(call(jit(lambda x: x**3)), expected, rtol=1e-6)
    if own is None:
        return
    monkeypatch.setattr(compiler, "compiler_options", lambda **how: {"xla_unknown": True})
    monkeypatch.setattr(compiler, "_identity", compiler._identity.__wrapped__)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_unknown") if own else nullcontext():
        call(jit(lambda x: x**3))


def test_a_function_has_the_shapes_and_the_trace_of_jax_jit():
    f = jit(lambda x: x**3)
    assert jax.eval_shape(f, X) == jax.ShapeDtypeStruct((4,), jnp.float32)
    assert str(jax.make_jaxpr(f)(X)) == str(jax.make_jaxpr(jax.jit(lambda x: x**3))(X))


def test_a_trace_is_used_by_the_call_after_it():
    traces = []

    @jit(static_argnames=("power",), donate_argnames=("x",))
    def f(x, *, power):
        """Returns a power."""
        traces.append(power)
        return x**power

    traced = f.trace(X, power=3)
    assert traced.out_info == jax.ShapeDtypeStruct((4,), jnp.float32)
    for power in (3, 3, 2):
        x = X + 0
        np.testing.assert_allclose(f(x, power=power), np.arange(1, 5) ** power)
        assert x.is_deleted()
    assert traces == [3, 2]
    assert f._cache_size() == 2
    assert re.search("tf.aliasing_output|jax.buffer_donor", f.lower(X, power=3).as_text())
    assert (f.__name__, f.__doc__) == ("f", "Returns a power.")


def test_keys_are_not_used_twice_under_the_checker():
    draw = jit(jax.random.normal)
    keys = jax.random.split(jax.random.key(0), 4)
    expected = [float(jax.random.normal(key)) for key in keys]
    with jax.debug_key_reuse(True):
        np.testing.assert_allclose(jax.vmap(draw)(keys), expected, rtol=1e-6)
        np.testing.assert_allclose(draw(jax.random.split(jax.random.key(0), 4)[0]), expected[0], rtol=1e-6)


def test_a_function_is_one_for_jax():
    f = jit(lambda x, scale: scale * x, static_argnames=("scale",))
    doubled = jax.jit(partial(f, scale=2), compiler_options=compiler_options())
    np.testing.assert_array_equal(doubled(X), 2 * np.arange(1, 5))
    named = jax.jit(f, static_argnames=("scale",))
    np.testing.assert_array_equal(named(X, scale=3), 3 * np.arange(1, 5))
