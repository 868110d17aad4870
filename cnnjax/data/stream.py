"""Images that stay on disk: they are read in batches, in any order, by processes or threads of Grain."""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from cnnjax.data.batches import Standardization, statistics_of_sums
from cnnjax.data.order import order_of_epoch
from cnnjax.data.records import Records
from cnnjax.errors import UserError
from cnnjax.process.settings import num_cores
from cnnjax.process.signals import SIGNALS, ignore_signals

AHEAD = 2  # Batches on the device, or of a worker, that wait for their turn.
FEW = 5000  # Images. Reading them in threads takes less time than starting worker processes (4 to 5 s).


# Returns the positions in a `StreamedImages` of batch `step`. Pickled: each worker process computes it for itself.
Order = Callable[[int], np.ndarray]


class Streamed(NamedTuple):
    """Images that stay on disk, and their labels."""

    image: "StreamedImages"
    label: Int[np.ndarray, " N"]


class TrainingOrder:
    """The order of `epoch_plan`, of which a process needs some rows of each batch.

    Args:
      seed: of the run.
      num_examples: of the training set.
      batch_size: of the global batches.
      rows: int [B], which positions of each batch to return.
      balanced_label: see `epoch_plan`.
    """

    def __init__(
        self,
        seed: int,
        num_examples: int,
        batch_size: int,
        rows: Int[np.ndarray, " B"],
        balanced_label: Int[np.ndarray, " N"] | None = None,
    ):
        self._arguments = seed, num_examples, balanced_label
        self._batch_size, self._rows = batch_size, rows
        self._orders: dict[int, Any] = {}

    def __call__(self, step: int) -> Int[np.ndarray, " B"]:
        """Returns the examples of the rows of batch `step`; the first batch of an epoch takes longer."""
        seed, num_examples, balanced_label = self._arguments
        epoch, index = divmod(step, -(-num_examples // self._batch_size))
        if (order := self._orders.get(epoch)) is None:
            order = order_of_epoch(seed, epoch, num_examples, balanced_label).astype(np.int32)
            # Threads share this, and some may still read the previous epoch.
            self._orders = {epoch: order, epoch - 1: self._orders.get(epoch - 1)}
        return order[(index * self._batch_size + self._rows) % num_examples]


class PlainOrder(NamedTuple):
    """The order of `plain_plan`; after the last batch the first one follows again."""

    num_examples: int
    batch_size: int
    rows: Int[np.ndarray, " B"]

    def __call__(self, step: int) -> Int[np.ndarray, " B"]:
        """Returns the examples of the rows of batch `step`."""
        index = step % -(-self.num_examples // self.batch_size)
        return (index * self.batch_size + self.rows) % self.num_examples


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """The images of a split, or of some of its examples, in the shape that a network gets. They stay on disk.

    Attributes:
      records: the split.
      index: int [N], which records these are.
      sums: int [R 2 C], of all records of the split: the sums over the pixels, and over their squares.
    """

    records: Records
    index: Int[np.ndarray, " N"]
    sums: Int[np.ndarray, "R 2 C"]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""
        return (len(self.index), *self.records.image_shape)

    @property
    def dtype(self) -> np.dtype[np.uint8]:
        """The shape of the pixels."""
        return np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Int[np.ndarray, " M"] | slice) -> "StreamedImages":
        return replace(self, index=self.index[index])

    def statistics(self) -> Standardization:
        """Returns the same bits as `pixel_statistics` of these images."""
        height, width, _ = self.records.image_shape
        return statistics_of_sums(self.sums[self.index].sum(axis=0), len(self) * height * width)

    def read(self) -> UInt8[np.ndarray, "N H W C"]:
        """Returns the images in memory."""
        result, size = np.empty(self.shape, np.uint8), self.records.chunk
        with self.batches(PlainOrder(len(self), size, np.arange(size))) as batches:
            for i in range(0, len(self), size):
                result[i : i + size] = next(batches)["image"][: len(self) - i]
        return result

    @property
    def stored(self) -> Iterator[UInt8[np.ndarray, "H2 W2 C2"]]:
        """Each image as it is stored, before it is brought to the shape that a network gets."""
        for i in range(0, len(self), size := self.records.chunk):
            yield from (record.image for record in self.records.read(self.index[i : i + size]))

    def batches(
        self,
        order: Order,
        start: int = 0,
        num_workers: int = 0,
        transform: Callable[[Any], Any] = lambda element: element,
    ) -> AbstractContextManager[Iterator[Any]]:
        """Opens batches {"image": uint8 [B H W C], "label": int32 [B]}, without end, from batch `start` on.

        Args:
          order: says which images each batch consists of.
          num_workers, transform: see `read_ahead`.

        Raises:
          UserError: while reading: a record is damaged.
        """
        return read_ahead(_Batches(self.records, self.index, order), start, num_workers, transform)


def default_workers(num_images: int) -> int:
    """Returns the number of processes that read `num_images` images again and again, or 0: threads do."""
    return 0 if num_images < FEW else max(1, num_cores() - 1)


# --- Grain ----------------------------------------------------------------------------------------------------------


@runtime_checkable
class Source(Protocol):
    """Elements that Grain's workers compute in any order. It is pickled for them."""

    nbytes: int  # The size of an element.

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class _Batches:
    """Element i is batch i. It never ends, because training may be extended."""

    def __init__(self, records: Records, index: Int[np.ndarray, " N"], order: Order):
        self._records, self._index, self._order = records, index, order
        self.nbytes = len(order(0)) * int(np.prod(records.image_shape))

    def __len__(self) -> int:
        return 2**48

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        records, examples = self._records, self._index[self._order(int(index))]
        image, label = np.empty((len(examples), *records.image_shape), np.uint8), np.empty(len(examples), np.int32)
        for i, (k, record) in enumerate(zip(examples, records.read(examples), strict=True)):
            records.check_shape(record.image, int(k))
            image[i], label[i] = records.fit(record.image), record.label
        return {"image": image, "label": label}

    def __repr__(self) -> str:  # Grain shows it in its own messages.
        return f"batches of {self._records.split}"


@contextmanager
def read_ahead(
    source: Source, start: int, num_workers: int, transform: Callable[[Any], Any] = lambda element: element
) -> Iterator[Iterator[Any]]:
    """Opens the elements of a source from `start` on, which other processes compute ahead of time.

    The processes ignore the signals that stop this one, and end when it ends, however it does.

    Args:
      num_workers: the number of processes; 0: threads of this process.
      transform: applied to each element by a thread that is `AHEAD` of the caller.

    Yields:
      The iterator. It raises what `source` raises.
    """
    import grain
    from absl import flags
    from grain.experimental import ThreadPrefetchDatasetIterator

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads them, and only `absl.app` parses them.
    num_workers = min(num_workers, max(len(source) - start, 1))
    num_workers = num_workers if _shared_memory_suffices(source.nbytes * (2 * num_workers + AHEAD + 2)) else 0
    read = grain.ReadOptions(1, 1) if num_workers else grain.ReadOptions(num_cores(), num_cores() + 1)
    dataset = grain.MapDataset.source(source)[start:].to_iter_dataset(read)
    options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=1)
    _leave_out_main()
    with _without_signals():
        elements = iter(dataset.mp_prefetch(options, worker_init_fn=_start_worker).map(transform))
        ahead = ThreadPrefetchDatasetIterator(elements, AHEAD)  # Makes the processes, which the next line starts.
        elements.start_prefetch()
        ahead.start_prefetch()
    with closing(ahead), closing(_explained(ahead)) as explained:
        yield explained


def _explained(elements: Iterator[Any]) -> Generator[Any, None, None]:
    try:
        yield from elements
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        raise UserError(
            f"The processes that read images must stay alive, got: {error} A negative exit code is the number of a "
            "signal; -9 often means that memory ran out. Resume the run, or lower `batch_size`."
        ) from error


def _shared_memory_suffices(size: int) -> bool:
    """Returns whether batches of `size` bytes fit where Linux keeps shared memory: containers often have 64 MB."""
    shared = Path("/dev/shm")
    return not shared.exists() or shutil.disk_usage(shared).free > size


@contextmanager
def _without_signals() -> Iterator[None]:
    """Blocks signals in the threads and processes that are started inside the context."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # It would unblock them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@cache
def _leave_out_main() -> None:
    """Makes Grain's processes not import the user's program, which may lack `if __name__ == "__main__"`."""
    from multiprocessing import spawn

    prepare = spawn.get_preparation_data

    def get_preparation_data(name: str) -> Any:
        data = prepare(name)
        if name.startswith("grain-"):
            data = {key: value for key, value in data.items() if not key.startswith("init_main")}
        return data

    spawn.get_preparation_data = get_preparation_data


def _start_worker(index: int, count: int) -> None:
    """Runs first in each worker process."""
    from absl import logging

    ignore_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.set_verbosity(logging.ERROR)  # tfds recommends OpenCV.


def _end_with_parent() -> None:
    import multiprocessing

    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
