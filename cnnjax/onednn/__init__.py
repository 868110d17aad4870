"""Calls oneDNN, Intel's library of neural network kernels, by `jax.ffi`: faster than XLA's kernels (BENCHMARKS.md).

`library` finds, compiles and loads it; `calls` has the operations; `partition` divides them among devices. Unlike the
layers, `library` has side effects: the first use compiles kernels.c, because jaxlib's header must match.
"""
