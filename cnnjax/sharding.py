"""Data parallelism: each batch is divided among the devices, and each device holds a copy of the state."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


class Placement(NamedTuple):
    """The shardings of a run's arrays."""

    batch_sharding: NamedSharding  # Divides the examples among the devices.
    plan_sharding: NamedSharding  # The same for several batches: divides the second axis.
    state_sharding: NamedSharding  # Replicated.

    @property
    def num_devices(self) -> int:
        """The number of devices that share a batch."""
        return self.batch_sharding.mesh.size

    @property
    def devices(self) -> list[Any]:
        """The devices that share a batch."""
        return sorted(self.batch_sharding.device_set, key=lambda device: device.id)


def place(batch_size: int, devices: Sequence[Any] | None = None) -> Placement:
    """Divides a batch among the largest number of devices that divides `batch_size`.

    Random numbers are drawn for the whole batch, so order, flips and dropout masks do not depend on the number of
    devices. The order of summation does, so parameters agree only to rounding.

    Args:
      batch_size: the number of examples.
      devices: by default, all local devices.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    num_devices = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    mesh = Mesh(devices[:num_devices], ("data",), axis_types=(AxisType.Auto,))
    specs = PartitionSpec("data"), PartitionSpec(None, "data"), PartitionSpec()
    return Placement(*(NamedSharding(mesh, spec) for spec in specs))
