"""Calls the oneDNN kernels that are part of jaxlib's CPU backend on x86-64 Linux.

XLA does not select these kernels, although they are its fastest convolutions on a CPU and the only ones that use the
bfloat16 matrix units of recent processors (see BENCHMARKS.md). A call is an XLA `custom-call` configured by
the messages of xla/service/cpu/onednn_config.proto. This interface is undocumented, so the package only admits versions
of jaxlib for which the tests compare these kernels with NumPy.

Limits: XLA cannot serialize a program with such a call, so the layers use XLA's own kernels if jax is configured to
cache compiled programs (`jax_compilation_cache_dir`). They also do so on other platforms, in float16, and if
$CNNJAX_ONEDNN is 0, and in `plain_operations`. On a processor without bfloat16 instructions, operands are widened to
float32. XLA cannot partition such a call: simulated devices of one CPU that share a batch each compute all of it.
"""

import json
import os
import platform
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cnnjax.layers.derivatives import in_plain_operations, without_derivative

Padding = tuple[tuple[int, int], tuple[int, int]]  # (low, high) of the height and the width.


@cache  # The processor does not change.
def processor_flags() -> str:
    """Returns the line of /proc/cpuinfo with the processor's instruction sets, or "" if there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def has_avx512() -> bool:
    """Returns whether the processor has AVX-512."""
    return "avx512f" in processor_flags()


def has_bfloat16() -> bool:
    """Returns whether the processor has bfloat16 instructions: avx512_bf16 or amx_bf16."""
    return "_bf16" in processor_flags()


def available() -> bool:
    """Returns whether jaxlib has these kernels on this platform and $CNNJAX_ONEDNN, read at trace time, is not 0."""
    x86_linux = sys.platform == "linux" and platform.machine() == "x86_64"
    return x86_linux and os.environ.get("CNNJAX_ONEDNN", "1") != "0"


def in_use(dtype: DTypeLike = jnp.float32) -> bool:
    """Returns whether the layers use these kernels on a CPU for operands of `dtype`."""
    cached = jax.config.values["jax_compilation_cache_dir"] is not None
    return available() and not cached and not in_plain_operations() and dtype in (jnp.float32, jnp.bfloat16)


def on_cpu(fast: Callable[..., Array], plain: Callable[..., Array], *operands: Array) -> Array:
    """Computes `fast` if these kernels are in use and the program is lowered for a CPU, and `plain` otherwise."""
    if not in_use(operands[0].dtype):
        return plain(*operands)
    return lax.platform_dependent(*operands, cpu=fast, default=plain)


def convolution(
    image: Float[Array, "B H W C"],
    kernel: Float[Array, "I J C2 K"],
    bias: Float[Array, " K"] | None = None,
    *,
    padding: Padding,
    stride: int = 1,
    groups: int = 1,
    relu: bool = False,
    dtype: DTypeLike | None = None,
) -> Float[Array, "B H2 W2 K"]:
    """Returns the cross-correlation plus `bias`, followed by a ReLU if `relu` is true.

    Args:
      image, kernel, bias: operands of one dtype, float32 or bfloat16; sums are accumulated in float32.
      padding: zeros around the image.
      groups: see `feature_group_count` of `jax.lax.conv_general_dilated`.
      dtype: dtype of the result; by default that of the operands.
    """
    sides = zip(image.shape[1:3], padding, kernel.shape[:2], strict=True)
    size = [(n + sum(pad) - k) // stride + 1 for n, pad, k in sides]
    pads = {"pad_left": [low for low, _ in padding], "pad_right": [high for _, high in padding]}
    data = {"data": {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}}
    config = {
        "dims": 4,
        "input": data,
        "kernel": {"filter": {"input_feature_dim": 2, "output_feature_dim": 3, "spatial_dims": [0, 1]}},
        "output": data,
        "window": {**pads, "strides": [stride, stride], "window_dilations": [1, 1]},
        "fusions": {"ops": ["BIAS"] * (bias is not None) + ["RELU"] * relu},
        "feature_groups": groups,
    }
    result = jax.ShapeDtypeStruct((image.shape[0], *size, kernel.shape[3]), dtype or image.dtype)
    operands = (image, kernel) if bias is None else (image, kernel, bias)
    return _call("convolution", {"onednn_conv_config": config}, result, *operands)


def matmul(
    a: Float[Array, "*S _ _"],
    b: Float[Array, "*S _ _"],
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*S _ _"]:
    """Returns a · b, with each operand optionally transposed first.

    Args:
      a, b: matrices or, with AVX-512, stacks of matrices, of one dtype, float32 or bfloat16; sums are accumulated in
        float32.
      dtype: dtype of the result; by default that of the operands.

    Raises:
      ValueError: `a` is a stack and the processor has no AVX-512: oneDNN's routine for it would deadlock.
    """
    if a.ndim > 2 and not has_avx512():
        raise ValueError(f"`a` must be one matrix on a processor without AVX-512, got the shape {a.shape}.")
    shape = (*a.shape[:-2], a.shape[-1 if transpose_a else -2], b.shape[-2 if transpose_b else -1])
    config = {"transpose_a": transpose_a, "transpose_b": transpose_b}
    return _call("matmul", {"onednn_matmul_config": config}, jax.ShapeDtypeStruct(shape, dtype or a.dtype), a, b)


def _call(name: str, config: dict[str, Any], result: jax.ShapeDtypeStruct, *operands: Array) -> Any:
    if operands[0].dtype == jnp.bfloat16 and not has_bfloat16():
        wide = jax.ShapeDtypeStruct(result.shape, jnp.float32)
        return _call(name, config, wide, *(x.astype(jnp.float32) for x in operands)).astype(result.dtype)
    call = jax.ffi.ffi_call(
        f"__onednn${name}",
        result,
        vmap_method="sequential",
        custom_call_api_version=2,  # The untyped interface, configured by XLA's own messages.
        legacy_backend_config=json.dumps(config),
    )
    return without_derivative(call)(*operands)
