"""Weights and images that NumPy computes from their names and shapes, the same for PyTorch and for cnnjax."""

import zlib

import numpy as np


def noise(name, shape):
    """Returns float32 values between -1 and 1 that the name determines, in every version of NumPy."""
    return np.random.RandomState(zlib.crc32(name.encode())).uniform(-1, 1, shape).astype(np.float32)


def weights(name, shape):
    """Returns the weights of PyTorch's tensor `name`: activations neither vanish nor grow."""
    x = noise(name, shape)
    if len(shape) > 1:
        return x * np.float32(np.sqrt(6 / np.prod(shape[1:])))
    if name.endswith("running_var"):
        return 1 + x / 3
    return x / 5 if name.endswith(("running_mean", "bias")) else np.float32(0.6) + x / 3
