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
from cnnjax.sharding import Placement, put


class StreamedSet(NamedTuple):
    """A data set whose images stay on disk, with its standardization; takes the place of `Pixels`."""

    image: StreamedImages
    label: Int[np.ndarray, " N"]
    standardization: Standardization

    def spec(self, batch_size: int, placement: Placement) -> StreamedPixels:
        """Returns the shapes of a batch."""

        def shape_of(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        image = shape_of((batch_size, *self.image.shape[1:]), np.uint8, placement.batch_sharding)
        label = shape_of((batch_size,), np.int32, placement.batch_sharding)
        mean, std = (shape_of(x.shape, x.dtype, placement.replicated) for x in self.standardization)
        return StreamedPixels(image, label, Standardization(mean, std))

    def training_batches(
        self,
        seed: int,
        first: int,
        batch_size: int,
        balanced_label: Int[np.ndarray, " N"] | None,
        placement: Placement,
        *,
        num_workers: int | None = None,
    ) -> AbstractContextManager[Iterator[StreamedPixels]]:
        """Opens the batches of `epoch_plan` from step `first` on, without end.

        Args:
          placement: says where the batches are put.
          num_workers: the number of processes that read; None: see `default_workers`.
        """
        rows, num_images = placement.local_rows(batch_size), len(self.image)
        order = TrainingOrder(seed, num_images, batch_size, rows, balanced_label)
        num_workers = default_workers(num_images) if num_workers is None else num_workers
        return self._batches(order, first, batch_size, num_workers, placement)

    def plain_batches(self, batch_size: int, placement: Placement) -> AbstractContextManager[Iterator[StreamedPixels]]:
        """Opens the batches of `plain_plan`, again and again.

        Threads read them: processes would have to start for each evaluation, or wait in memory for the next one.
        """
        order = PlainOrder(len(self.image), batch_size, placement.local_rows(batch_size))
        return self._batches(order, 0, batch_size, 0, placement)

    def _batches(self, order: Order, first: int, batch_size: int, num_workers: int, placement: Placement) -> Any:
        standardization = put(self.standardization, placement.replicated)
        put_rows = row_putter(placement, batch_size)

        def put_batch(batch: dict[str, np.ndarray]) -> StreamedPixels:
            return StreamedPixels(put_rows(batch["image"]), put_rows(batch["label"]), standardization)

        return self.image.batches(order, first, num_workers, put_batch)


def pixels_of(examples: Examples | Streamed, standardization: Standardization) -> Pixels | StreamedSet:
    """Returns examples, on the host or on disk, with the standardization of the training images."""
    if isinstance(examples, Examples):
        return Pixels(*examples, standardization)
    return StreamedSet(*examples, standardization)


def row_putter(placement: Placement, batch_size: int) -> Callable[[np.ndarray], jax.Array]:
    """Returns a function that makes a global array of the rows of this process, see `Placement.local_rows`."""
    sharding = placement.batch_sharding

    def put(rows: np.ndarray) -> jax.Array:
        # A copy: on a CPU jax may use the memory of an array as it is, and these belong to Grain.
        return jax.make_array_from_process_local_data(sharding, np.array(rows), (batch_size, *rows.shape[1:]))

    return put
