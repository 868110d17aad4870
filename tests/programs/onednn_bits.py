"""Prints digests of a convolution, a batch normalization and their gradients, computed on a number of cores.

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
    image, g = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((61, 9, 8, 40), (61, 9, 8, 32)))
    kernel, bias = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 3, 40, 32), (32,)))

    @jax.jit
    def f(image, kernel, bias, g):
        y, pullback = jax.vjp(lambda *x: conv2d(*x, ((1, 1), (1, 1)), True), image, kernel, bias)
        z, pullback_of_norm = jax.vjp(lambda *x: batch_norm_gelu(*x)[0], g, bias)
        return y, *pullback(g), z, *pullback_of_norm(g)

    def digests(results):
        return tuple(hashlib.sha256(np.asarray(x.astype(jnp.float32))).hexdigest()[:8] for x in results)

    (found,) = {digests(f(image, kernel, bias, g)) for _ in range(4)}
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
