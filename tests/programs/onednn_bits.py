"""Prints digests of two convolutions, a batch normalization and their gradients, computed on a number of cores.

    python onednn_bits.py CORES WAY ...

A line for each way: here; fork and spawn, in a child process; threads, in eight threads at the same time.
"""

import hashlib
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def digest(_=0):
    import jax
    import jax.numpy as jnp

    from cnnjax.layers.conv import conv2d
    from cnnjax.layers.norm import batch_norm_gelu

    rng = np.random.default_rng(0)
    g = jnp.asarray(rng.normal(size=(61, 9, 8, 32)), jnp.bfloat16)
    bias = jnp.asarray(rng.normal(size=32), jnp.float32)
    # With AMX, the gradients of their kernels are computed by oneDNN and by kernel_grad_amx.c.
    images = [jnp.asarray(rng.normal(size=(61, 9, 8, channels)), jnp.bfloat16) for channels in (24, 40)]
    kernels = [jnp.asarray(rng.normal(size=(3, 3, channels, 32)), jnp.float32) for channels in (24, 40)]

    @jax.jit
    def f(images, kernels, bias, g):
        results = []
        for image, kernel in zip(images, kernels, strict=True):
            y, pullback = jax.vjp(lambda *x: conv2d(*x, ((1, 1), (1, 1)), True), image, kernel, bias)
            results += [y, *pullback(g)]
        z, pullback_of_norm = jax.vjp(lambda *x: batch_norm_gelu(*x)[0], g, bias)
        return *results, z, *pullback_of_norm(g)

    def digests(results):
        return tuple(hashlib.sha256(np.asarray(x.astype(jnp.float32))).hexdigest()[:8] for x in results)

    (found,) = {digests(f(images, kernels, bias, g)) for _ in range(4)}
    return found


def main():
    cores, *ways = sys.argv[1:]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])  # XLA starts a thread per core.
    for way in ways:
        if way == "threads":  # After "here", which imports, lazily: not by several threads at a time.
            with ThreadPoolExecutor(8) as threads:
                found = list(threads.map(digest, range(8)))
            assert all(x == found[0] for x in found)
            print(*found[0])
        elif way == "here":
            print(*digest())
        else:
            from cnnjax.onednn.library import kernels

            assert kernels().version  # Loaded in the parent.
            with multiprocessing.get_context(way).Pool(1) as pool:
                print(*pool.apply(digest))


if __name__ == "__main__":
    main()
