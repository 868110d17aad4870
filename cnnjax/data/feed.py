"""Streamed batches, put on the devices ahead of time: each process reads the rows of a batch that its devices need."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Int

from cnnjax.data.batches import Pixels, Standardization, StreamedPixels
from cnnjax.data.stored import Examples
from cnnjax.data.stream import Order, PlainOrder, Streamed, StreamedImages, TrainingOrder, default_workers


class StreamedSet(NamedTuple):
    """A data set whose images stay on disk, with its standardization; takes the place of `Pixels`."""

    image: StreamedImages
    label: Int[np.ndarray, " N"]
    standardization: Standardization

    def spec(self, batch_size: int, sharding: NamedSharding | None = None) -> StreamedPixels:
        """Returns the shapes of a batch."""
        image = jax.ShapeDtypeStruct((batch_size, *self.image.shape[1:]), np.uint8, sharding=sharding)
        return StreamedPixels(image, jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=sharding), self._spec())

    def _spec(self) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.standardization)

    def training_batches(
        self, seed: int, first: int, batch_size: int, balanced_label: Int[np.ndarray, " N"] | None, placement: Any
    ) -> AbstractContextManager[Iterator[StreamedPixels]]:
        """Opens the batches of `epoch_plan` from step `first` on, without end.

        Args:
          placement: its `batch_sharding` and `state_sharding` say where the batches and the standardization are put.
        """
        rows = local_rows(placement.batch_sharding, batch_size)
        order = TrainingOrder(seed, len(self.image), batch_size, rows, balanced_label)
        return self._batches(order, first, batch_size, default_workers(len(self.image)), placement)

    def plain_batches(self, batch_size: int, placement: Any) -> AbstractContextManager[Iterator[StreamedPixels]]:
        """Opens the batches of `plain_plan`, again and again.

        Threads read them: processes would have to start for each evaluation, or wait in memory for the next one.
        """
        order = PlainOrder(len(self.image), batch_size, local_rows(placement.batch_sharding, batch_size))
        return self._batches(order, 0, batch_size, 0, placement)

    def _batches(self, order: Order, first: int, batch_size: int, num_workers: int, placement: Any) -> Any:
        standardization = put_whole(self.standardization, placement.state_sharding)
        put_rows = row_putter(placement.batch_sharding, batch_size)

        def put(batch: dict[str, np.ndarray]) -> StreamedPixels:
            return StreamedPixels(put_rows(batch["image"]), put_rows(batch["label"]), standardization)

        return self.image.batches(order, first, num_workers, put)


def pixels_of(examples: Examples | Streamed, standardization: Standardization) -> Pixels | StreamedSet:
    """Returns examples, on the host or on disk, with the standardization of the training images."""
    return (Pixels if isinstance(examples, Examples) else StreamedSet)(*examples, standardization)


def local_rows(sharding: NamedSharding, batch_size: int) -> Int[np.ndarray, " B"]:
    """Returns the positions in a global batch that the devices of this process need, sorted."""
    parts = [index[0] for index in sharding.addressable_devices_indices_map((batch_size,)).values() if index]
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))


def row_putter(sharding: NamedSharding, batch_size: int) -> Callable[[np.ndarray], jax.Array]:
    """Returns a function that makes a global array of the rows of this process, see `local_rows`."""

    def put(rows: np.ndarray) -> jax.Array:
        # A copy: on a CPU jax may use the memory of an array as it is, and these belong to Grain.
        rows = np.array(rows)
        if sharding.is_fully_addressable:
            return jax.device_put(rows, sharding)
        return jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))

    return put


def put_whole(tree: Any, sharding: NamedSharding) -> Any:
    """Puts a tree that all processes hold on all devices of `sharding`, which replicates."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x), x.shape), tree)
