"""The devices of a run: the batch is shared among them, the state is on each."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


class Placement(NamedTuple):
    """Where the arrays of a run lie."""

    batch: NamedSharding  # Its examples, divided among the devices.
    plan: NamedSharding  # The same, of many batches.
    state: NamedSharding  # The same on each.

    @property
    def num_devices(self) -> int:
        """The number of devices that share a batch."""
        return self.batch.mesh.size

    @property
    def devices(self) -> list[Any]:
        """The devices that share a batch."""
        return sorted(self.batch.device_set, key=lambda device: device.id)


def place(batch_size: int, devices: Sequence[Any] | None = None) -> Placement:
    """Shares a batch among as many devices as divide it evenly.

    The draws of a step are of the whole batch: order, flips and dropout masks are the same on any number of devices.
    Sums are made in another order, so parameters agree to rounding.

    Args:
      batch_size: examples.
      devices: all devices of the process when None.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    num_devices = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    mesh = Mesh(devices[:num_devices], ("data",), axis_types=(AxisType.Auto,))
    specs = PartitionSpec("data"), PartitionSpec(None, "data"), PartitionSpec()
    return Placement(*(NamedSharding(mesh, spec) for spec in specs))
