"""Kernels of oneDNN, which jaxlib's CPU backend carries on x86-64, called from JAX by their names.

XLA calls them for nothing by itself, yet they are its fastest convolutions on a CPU, and its only ones that use the
bfloat16 matrix units of recent processors (see experiments/BENCHMARKS.md). A call is XLA's `custom-call` with the
messages of xla/service/cpu/onednn_config.proto as its configuration. That interface is not documented, so it is used in
the versions of jaxlib alone in which the tests have compared it with XLA's own kernels: the package admits no others.

XLA cannot write such a program to a file: where jax keeps compiled programs (`jax_compilation_cache_dir`), the layers
use XLA's own kernels, as they do on other processors, in float16, and where $CNNJAX_ONEDNN is 0. On a processor that
knows no bfloat16 its operands are widened to float32. XLA cannot divide such a call among devices: those of one CPU
that share a batch each compute all of it.
"""

import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

AVAILABLE = sys.platform == "linux" and platform.machine() == "x86_64" and os.environ.get("CNNJAX_ONEDNN", "1") != "0"
_CPUINFO = Path("/proc/cpuinfo")
HAS_AVX512 = _CPUINFO.exists() and "avx512f" in _CPUINFO.read_text()
HAS_BFLOAT16 = _CPUINFO.exists() and "_bf16" in _CPUINFO.read_text()  # avx512_bf16 or amx_bf16

Padding = tuple[tuple[int, int], tuple[int, int]]  # (low, high) of the height and of the width.


def in_use(dtype: DTypeLike = jnp.float32) -> bool:
    """Returns whether the layers use these kernels on a CPU, for operands of `dtype`."""
    cached = jax.config.values["jax_compilation_cache_dir"] is not None
    return AVAILABLE and not cached and dtype in (jnp.float32, jnp.bfloat16)


def on_cpu(fast: Callable[..., Array], plain: Callable[..., Array], *operands: Array) -> Array:
    """Computes by `fast` where the program is lowered for a CPU that has it, by `plain` elsewhere."""
    if not in_use(operands[0].dtype):
        return plain(*operands)
    return lax.platform_dependent(*operands, cpu=fast, default=plain)


def convolution(
    image: Float[Array, "B H W C"],
    kernel: Float[Array, "I J C K"],
    bias: Float[Array, " K"] | None = None,
    *,
    padding: Padding,
    relu: bool = False,
    dtype: DTypeLike | None = None,
) -> Float[Array, "B H2 W2 K"]:
    """Returns the cross-correlation of stride 1, plus `bias`, its negative values set to 0 where `relu` is true.

    Args:
      image, kernel, bias: of one dtype, float32 or bfloat16; sums are in float32.
      padding: zeros around the image.
      dtype: of the result; the image's when None.
    """
    size = [n + sum(pads) - taps + 1 for n, pads, taps in zip(image.shape[1:3], padding, kernel.shape[:2], strict=True)]
    data = {"data": {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}}
    config = {
        "dims": 4,
        "input": data,
        "kernel": {"filter": {"input_feature_dim": 2, "output_feature_dim": 3, "spatial_dims": [0, 1]}},
        "output": data,
        "window": {
            "pad_left": [low for low, _ in padding],
            "pad_right": [high for _, high in padding],
            "strides": [1, 1],
            "window_dilations": [1, 1],
        },
        "fusions": {"ops": ["BIAS"] * (bias is not None) + ["RELU"] * relu},
        "feature_groups": 1,
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
    """Returns a · b, each transposed first where asked for.

    Args:
      a, b: matrices or, with AVX-512, as many of them each; of one dtype, float32 or bfloat16; sums are in float32.
      dtype: of the result; that of `a` when None.

    Raises:
      ValueError: several matrices, without AVX-512: oneDNN's routine for them would wait for itself without end.
    """
    if a.ndim > 2 and not HAS_AVX512:
        raise ValueError(f"`a` must be one matrix on a processor without AVX-512, got the shape {a.shape}.")
    shape = (*a.shape[:-2], a.shape[-1 if transpose_a else -2], b.shape[-2 if transpose_b else -1])
    config = {"transpose_a": transpose_a, "transpose_b": transpose_b}
    return _call("matmul", {"onednn_matmul_config": config}, jax.ShapeDtypeStruct(shape, dtype or a.dtype), a, b)


def _call(name: str, config: dict[str, Any], result: jax.ShapeDtypeStruct, *operands: Array) -> Any:
    if operands[0].dtype == jnp.bfloat16 and not HAS_BFLOAT16:
        wide = jax.ShapeDtypeStruct(result.shape, jnp.float32)
        return _call(name, config, wide, *(x.astype(jnp.float32) for x in operands)).astype(result.dtype)
    call = jax.ffi.ffi_call(
        f"__onednn${name}",
        result,
        vmap_method="sequential",
        custom_call_api_version=2,  # Not the typed interface of today: XLA's own messages.
        legacy_backend_config=json.dumps(config),
    )
    return call(*operands)
