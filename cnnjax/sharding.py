"""How devices share a run: each batch is divided among them, and the state is copied or divided, too (FSDP)."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from cnnjax.errors import UserError, check
from cnnjax.memory import num_bytes

AXES = ("data", "model")
# Numbers in an array. Smaller arrays are copied: dividing them saves little, and each all-gather takes its time.
MIN_DIVIDED = 2**14


class Placement(NamedTuple):
    """Where the arrays of a run are: on a mesh with the axes "data" and "model", whose devices share each batch.

    Devices that differ in "data" hold copies of the state. Those that differ in "model" hold parts of its large arrays
    (fully sharded data parallelism, Zhao et al. 2023).
    """

    mesh: Mesh

    @property
    def batch_sharding(self) -> NamedSharding:
        """Divides the examples of a batch among all devices."""
        return NamedSharding(self.mesh, PartitionSpec(AXES))

    @property
    def plan_sharding(self) -> NamedSharding:
        """Divides the examples of several batches: the second axis."""
        return NamedSharding(self.mesh, PartitionSpec(None, AXES))

    @property
    def replicated(self) -> NamedSharding:
        """Copies an array to all devices."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def divides_state(self) -> bool:
        """Whether large arrays of the state are divided."""
        return self.mesh.shape["model"] > 1

    @property
    def state_mesh(self) -> str | None:
        """The mesh if it divides the state, see `parse_mesh`."""
        return str(self) if self.divides_state else None

    @property
    def devices(self) -> list[Any]:
        """The devices that share a batch."""
        return self.mesh.devices.flatten().tolist()

    @property
    def device(self) -> Any:
        """The first of these devices that belongs to this process."""
        return self.mesh.local_devices[0]

    @property
    def num_devices(self) -> int:
        """The number of devices that share a batch."""
        return self.mesh.size

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.mesh.shape.items() if size > 1) or "data=1"

    def of_state(self, state: PyTree) -> PyTree:
        """Returns the sharding of each array of a state, by a rule on shapes alone.

        Divides the largest dimension that is a multiple of the size of "model" (the first one if several are equal: its
        parts are contiguous). Copies arrays without such a dimension, or with fewer than `MIN_DIVIDED` numbers.
        """
        return jax.tree.map(lambda leaf: NamedSharding(self.mesh, self._spec(leaf.shape)), state)

    def bytes_per_device(self, state: PyTree) -> int:
        """Returns the bytes of a state, or of its shapes, that each device holds."""
        shardings = self.of_state(state)
        shards = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(s.shard_shape(leaf.shape), leaf.dtype), state, shardings
        )
        return num_bytes(shards)

    def _spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        parts = self.mesh.shape["model"]
        dims = [dim for dim, size in enumerate(shape) if size % parts == 0]
        if parts == 1 or not dims or math.prod(shape) < MIN_DIVIDED:
            return PartitionSpec()
        dim = max(dims, key=lambda dim: shape[dim])
        return PartitionSpec(*[None] * dim, "model")

    def gather(self, params: PyTree) -> PyTree:
        """Returns parameters of which each device has all. Their gradients are divided like the state.

        The transpose of a plain constraint would give all devices all gradients: twice the communication, and an array
        of the size of each parameter.
        """

        @jax.custom_vjp
        def gather_leaf(leaf: jax.Array) -> jax.Array:
            return lax.with_sharding_constraint(leaf, self.replicated)

        def divide(_: None, grad: jax.Array) -> tuple[jax.Array]:
            return (lax.with_sharding_constraint(grad, self.of_state(grad)),)

        gather_leaf.defvjp(lambda leaf: (gather_leaf(leaf), None), divide)
        return jax.tree.map(gather_leaf, params)

    def local_rows(self, batch_size: int) -> np.ndarray:
        """Returns which examples of each batch the devices of this process hold, in order."""
        parts = self.batch_sharding.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))


def place(batch_size: int, devices: Sequence[Any] | None = None, mesh: str | None = None) -> Placement:
    """Divides a batch among devices.

    Random numbers are drawn for the whole batch, so order, flips and dropout masks do not depend on the number of
    devices. The order of summation does, so parameters agree only to rounding.

    Args:
      batch_size: the number of examples.
      devices: by default, those of all processes.
      mesh: the sizes of the axes, see `parse_mesh`; None: the largest number of devices that divides `batch_size`.

    Raises:
      UserError: the mesh does not divide the batch, does not fit the devices, or leaves out some of several processes.
    """
    devices = list(jax.devices() if devices is None else devices)
    largest = max((n for n in range(1, len(devices) + 1) if batch_size % n == 0), default=1)
    sizes = (largest, 1) if mesh is None else parse_mesh(mesh)
    num_devices, named = math.prod(sizes), f"{mesh} on {len(devices)} device{'s' if len(devices) > 1 else ''}"
    check("mesh", "at most as large as the number of devices", num_devices <= len(devices), named)
    if batch_size % num_devices:
        raise UserError(f"`batch_size` must be a multiple of the {num_devices} devices of the mesh, got {batch_size}.")
    if len({d.process_index for d in devices}) > 1 and num_devices < len(devices):
        name, rule, got = "batch_size", f"a multiple of the {len(devices)}", batch_size
        if mesh:
            name, rule, got = "mesh", f"all {len(devices)}", mesh
        raise UserError(f"`{name}` must be {rule} devices of several processes, which share each batch, got {got}.")
    return Placement(Mesh(np.array(devices[:num_devices]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 2))


def parse_mesh(text: str) -> tuple[int, int]:
    """Returns the sizes of the axes "data" and "model" in "data=4,model=2"; an axis that is not named has the size 1.

    Raises:
      UserError: it has another form.
    """
    given = text if isinstance(text, str) else ""
    named = dict(re.findall(r"(data|model)=([1-9]\d{0,5})", given))
    valid = sorted(given.split(",")) == sorted(f"{axis}={size}" for axis, size in named.items()) and named
    check("mesh", "sizes of the axes data and model, such as data=8 or data=4,model=2", bool(valid), repr(text))
    return int(named.get("data", 1)), int(named.get("model", 1))


def put(tree: PyTree, sharding: PyTree) -> PyTree:
    """Returns arrays on devices. If these belong to several processes, each process passes the same arrays.

    Args:
      sharding: of all arrays, or a tree with one for each.
    """
    if all(s.is_fully_addressable for s in jax.tree.leaves(sharding)):
        return jax.device_put(tree, sharding)

    def put_leaf(leaf: Any, sharding: Any) -> jax.Array:
        if getattr(leaf, "sharding", None) == sharding:
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put_leaf(jax.random.key_data(leaf), sharding))
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    if isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: put_leaf(leaf, sharding), tree)
    return jax.tree.map(put_leaf, tree, sharding)


def fetch(tree: PyTree) -> PyTree:
    """Returns whole arrays on the host, and waits for the devices.

    If processes share the arrays, all of them must call it.
    """

    def fetch_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetch_leaf, tree)


def move(tree: PyTree, device: Any) -> PyTree:
    """Returns whole arrays on one device of this process. If processes share the arrays, all of them must call it."""

    def move_leaf(leaf: jax.Array) -> jax.Array:
        if leaf.is_fully_addressable:
            return jax.device_put(leaf, device)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(move_leaf(jax.random.key_data(leaf)))
        return jax.device_put(fetch(leaf), device)

    return jax.tree.map(move_leaf, tree)
