"""The compiler flags that a version of jaxlib needs."""

import os
from importlib.metadata import version

# jaxlib 0.10's default CPU convolutions are slow (see experiments/BENCHMARKS.md), and some are wrong (jax issues 39103,
# 39257 and 40412). Without this fusion it takes the older, right ones.
CONVOLUTION_FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def set_flags() -> None:
    """Adds the flag to XLA_FLAGS, unless it is there. Must run before jax makes its first array."""
    flags = os.environ.get("XLA_FLAGS", "")
    # XLA ends the process on a flag that it does not know: only for versions that were tried.
    if version("jaxlib").startswith("0.10.") and CONVOLUTION_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {CONVOLUTION_FLAG}=-individual_convolution".strip()
