"""The memory that there is, that training needs at least, and the message if it is too little.

The need is a lower bound, known from shapes alone; the exact one is known only after compilation.
"""

import math
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from cnnjax.errors import UserError, for_reader, option
from cnnjax.jaxprs import programs_in

# Their results are written to memory. XLA may fuse anything else.
_WRITTEN = ("dot_general", "conv_general_dilated", "ffi_call")


def num_bytes(tree: PyTree) -> int:
    """Returns the bytes of all arrays, or shapes of arrays, of a tree. The sum may exceed 64 bits."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def largest_result(jaxpr: Any) -> int:
    """Returns a lower bound on the bytes of the largest matrix product or convolution in a program.

    A value counts at most two bytes, because XLA may fuse a cast.
    """
    largest = 0
    for equation in jaxpr.eqns:
        largest = max([largest, *map(largest_result, programs_in(equation))])
        if equation.primitive.name in _WRITTEN:
            largest = max(largest, *(_bytes_written(equation, x.aval) for x in equation.outvars))
    return largest


def _bytes_written(equation: Any, result: Any) -> int:
    shape = result.shape
    if equation.primitive.name == "dot_general":
        (axes, _), (batch_axes, _) = equation.params["dimension_numbers"]
        if math.prod(equation.invars[0].aval.shape[axis] for axis in axes) == 1:
            return 0  # XLA may fuse an outer product.
        shape = shape[len(batch_axes) :]  # And it may turn a sum over a batch of products into one product.
    return math.prod(shape) * min(result.dtype.itemsize, 2)


def device_memory(device: Any) -> int | None:
    """Returns the bytes of memory that this process may use on a device of jax, or None if they are unknown."""
    if device.platform == "cpu":
        return host_memory()
    with suppress(RuntimeError):  # Not every backend knows.
        return (device.memory_stats() or {}).get("bytes_limit")
    return None


def host_memory() -> int | None:
    """Returns the bytes of memory that this process may use, or None if they are unknown; does not start jax.

    The least of the machine's memory, the limits of its control groups, and `ulimit -v`.
    """
    limits = [resource.getrlimit(resource.RLIMIT_AS)[0]]
    with suppress(OSError, ValueError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            root, name = Path("/sys/fs/cgroup"), "memory.max"  # Version 2.
            if controllers:
                root, name = root / "memory", "memory.limit_in_bytes"
            if controllers == "" or "memory" in controllers.split(","):
                # In a container `group` may be a path of the host, of which only the root is visible.
                limits += [_read_int(root / folder / name) for folder in (group[1:], *Path(group[1:]).parents)]
    return min((limit for limit in limits if limit > 0), default=None)


def _read_int(path: Path) -> int:
    with suppress(OSError, ValueError):  # "max": no limit.
        return int(path.read_text())
    return -1


def gib(size: int) -> str:
    """Formats a number of bytes in GiB."""
    return f"{size / 2**30:,.1f} GiB"


@contextmanager
def explain_out_of_memory(except_for: Callable[[], BaseException | None] = lambda: None) -> Iterator[None]:
    """Turns an out-of-memory error of Python, NumPy or XLA into a `UserError`, and keeps it as the cause.

    Args:
      except_for: returns an error that stays as it is.

    Raises:
      UserError: there is too little memory.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if error is except_for() or (not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error)):
            raise
        detail = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        fewer = for_reader(" or, with --seeds, fewer cores", "")
        raise UserError(
            f"The run must fit into memory, got: {detail}. Lower `batch_size` or the size of the network, stream the "
            f"images ({option('stream')}), or use a smaller data set{fewer}."
        ) from error
