"""Calls oneDNN, Intel's library of neural network kernels, by `jax.ffi`: XLA's own kernels are slower on x86-64 CPUs.

`library` finds, compiles and loads what is needed; `calls` has the operations.
"""
