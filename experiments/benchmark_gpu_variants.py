"""What the ladder of benchmark_gpu.py compares: a recipe with one thing done differently, each in a process of its own.

A variant is flags of XLA, or a change made before anything is compiled: of the configuration, or of a function of the
package, for which another one stands in that computes the same in another way (or nearly: the name says so).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from cnnjax import Batch, Config
from cnnjax import evaluate as epoch
from cnnjax.data import batches
from cnnjax.layers import conv, norm
from cnnjax.layers import modules as layers
from cnnjax.models import models
from cnnjax.optim import optimizer as optim

MUON, TUTORIAL = "cifar10_airbench94_muon", "cifar10_tutorial"
ANY_KERNELS = "--xla_gpu_deterministic_ops=false"
GRAPHS = "--xla_gpu_enable_command_buffer=+CONVOLUTION"


class Variant(NamedTuple):
    """What differs from the recipe as it is."""

    flags: str = ""
    change: Callable[[Config], Config] = lambda config: config
    recipe: str = MUON
    one_program: bool = False  # The whole run, instead of each epoch.


def fields(**values: Any) -> Callable[[Config], Config]:
    """Changes the configuration; a dict changes one of its parts."""

    def change(config: Config) -> Config:
        parts = {k: replace(getattr(config, k), **v) if isinstance(v, dict) else v for k, v in values.items()}
        return replace(config, **parts)

    return change


def instead(module: Any, name: str, function: Any) -> Callable[[Config], Config]:
    """Puts a function in the place of another."""
    assert hasattr(module, name), name

    def change(config: Config) -> Config:
        setattr(module, name, function)
        return config

    return change


def all_of(*changes: Callable[[Config], Config]) -> Callable[[Config], Config]:
    """Makes several changes."""

    def change(config: Config) -> Config:
        for one in changes:
            config = one(config)
        return config

    return change


def plain_norm_gelu(x, bias, residual=None):
    """Lets JAX differentiate, which keeps more arrays."""
    wide = x.astype(jnp.float32)
    mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    y = norm._norm_gelu(x, mean, lax.rsqrt(var + norm.EPSILON), bias, residual)
    return y, lax.stop_gradient(mean), lax.stop_gradient(var)


def norm_gelu_in_sums_of_16_bits(x, bias, residual=None):
    """Takes the statistics without float32."""
    mean = x.mean((0, 1, 2), dtype=x.dtype)
    var = jnp.maximum((x * x).mean((0, 1, 2), dtype=x.dtype) - mean**2, 0)
    scale = lax.rsqrt(var.astype(jnp.float32) + norm.EPSILON)
    y = norm._norm_gelu(x, mean.astype(jnp.float32), scale, bias, residual)
    return y, lax.stop_gradient(mean.astype(jnp.float32)), lax.stop_gradient(var.astype(jnp.float32))


class PoolAfterTheNorm(models.SpeedNet):
    """`SpeedNet` of depth 2 with a pool after the first norm of a group instead of before it."""

    @nn.compact
    def __call__(self, image, *, train):
        """Returns logits."""
        x = models.gelu(models.Whiten(name="whiten")(jnp.asarray(image, self.dtype)))
        for width in self.widths:
            x = models.max_pool_2x2(models.NormGelu()(models.SpeedConv(width, even=True)(x), train=train))
            x = models.NormGelu()(models.SpeedConv(width)(x), train=train)
        head = self.param("head", nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), (x.shape[-1], 10))
        return x.max(axis=(1, 2)).astype(jnp.float32) @ head / 9


def pool_fwd_by_comparison(x):
    """Keeps the pool's input and result instead of an index."""
    y = layers.max_pool_2x2.__wrapped__(x)
    return y, (x, y)


def convolutions_as_they_are(image, kernel, *, padding):
    """Leaves the whitening's patches and the number of channels to cuDNN."""
    return conv.convolution_by_xla(image, kernel, padding=padding)


def each_kernel_alone(*operands, cpu, default):
    """Takes the CPU's branch: one matrix at a time, in float32."""
    return cpu(*operands)


def batch_by_slices(pixels, plan, augment):
    """Cuts a slice out of each padded image instead of gathering its pixels."""
    t = augment.translate
    if t == 0:
        return batches.make_batch(pixels, plan, augment)
    padded = jnp.pad(pixels.image, ((0, 0), (t, t), (t, t), (0, 0)), "reflect")
    size = (1, *pixels.image.shape[1:])

    def cut(example, shift, mirrored):  # Mirrored afterwards, so moved the other way here.
        return lax.dynamic_slice(padded, (example, t - shift[0], t + jnp.where(mirrored, 1, -1) * shift[1], 0), size)[0]

    image = jax.vmap(cut)(plan.example, plan.shift, plan.mirrored)
    image = jnp.where(plan.mirrored[:, None, None, None], image[:, :, ::-1], image)
    return Batch(batches.standardize(image, pixels.standardization), pixels.label[plan.example], plan.mask)


class Unrolled:
    """Stands in for `jax.lax` in the epoch: a scan of 5 steps a turn."""

    scan = staticmethod(partial(lax.scan, unroll=5))


class AloneLax:
    """Stands in for `jax.lax` in the optimizer."""

    platform_dependent = staticmethod(each_kernel_alone)


SHORT = fields(num_epochs=3)
VARIANTS = {
    "as it is": Variant(),
    "any kernels": Variant(ANY_KERNELS),
    "any kernels, channels as they are": Variant(
        ANY_KERNELS,
        all_of(
            instead(conv, "_fill", lambda x, axis: x),
            instead(conv, "convolution_on_accelerators", convolutions_as_they_are),
        ),
    ),
    "the other flag for determinism": Variant(f"{ANY_KERNELS} --xla_gpu_exclude_nondeterministic_ops=true"),
    "no autotuning, any kernels": Variant(f"{ANY_KERNELS} --xla_gpu_autotune_level=0"),
    "graphs with convolutions": Variant(GRAPHS),
    "graphs with convolutions and loops": Variant(f"{GRAPHS},+WHILE"),
    "whole run as one program, with every gradient": Variant(one_program=True),
    "unroll 5": Variant(change=instead(epoch, "lax", Unrolled)),
    "channels first": Variant("--xla_gpu_force_conv_nchw=true"),
    "float16": Variant(change=fields(model={"dtype": "float16"})),
    "statistics in 16 bits": Variant(change=instead(norm, "batch_norm_gelu", norm_gelu_in_sums_of_16_bits)),
    "norm and GELU by JAX": Variant(change=instead(norm, "batch_norm_gelu", plain_norm_gelu)),
    "pool after the norm": Variant(change=instead(models, "SpeedNet", PoolAfterTheNorm)),
    "pool by comparison": Variant(
        change=lambda config: layers.max_pool_2x2.defvjp(pool_fwd_by_comparison, layers._max_pool_bwd) or config
    ),
    "every output before a pool": Variant(
        change=instead(
            models,
            "SpeedConv",
            lambda width, even=False: models.Conv(width, use_bias=False, kernel_init=models.identity_init),
        )
    ),
    "Muon of each kernel alone": Variant(change=instead(optim, "lax", AloneLax)),
    "whitening bias trained throughout": Variant(change=fields(optim={"whiten_epochs": 0})),
    "augmentation by slices": Variant(change=instead(epoch, "make_batch", batch_by_slices)),
    "scored by six views of every image": Variant(change=fields(views="shifted")),
    "tutorial, 3 epochs": Variant("", SHORT, TUTORIAL),
    "tutorial, 3 epochs, any kernels": Variant(ANY_KERNELS, SHORT, TUTORIAL),
    "tutorial, 3 epochs, graphs": Variant(f"{GRAPHS},+WHILE", SHORT, TUTORIAL),
}
