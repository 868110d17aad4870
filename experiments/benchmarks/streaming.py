"""Measures how fast streamed images reach the device, next to decoding alone with the same number of processes.

    .venv/bin/python experiments/benchmarks/streaming.py

"Decoding alone": each process reads, decodes and resizes records in the order of training, and drops them. "Streamed":
what `train_and_evaluate(stream=True)` waits for, on the device, without a network that uses it. Both have their
processes started before, and take turns. A turn begins with a pause, in which the streams read ahead as far as they
do; these batches are not timed. Threads use all cores.
"""

import argparse
import io
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import ratio, seconds, spread, table, take_turns
from images import save_photos

from cnnjax.data.records import Records
from cnnjax.data.stored import Fit
from cnnjax.data.stream import StreamedImages, TrainingOrder, default_workers

BATCH_SIZE = 64
PAUSE = 6.0  # Seconds.
opened: list[Any] = []  # Of a process that decodes alone.


def write_set(name: str, encodings: list[bytes], shape: tuple[Any, ...], encoding: str, data_dir: Path) -> Path:
    """Writes encoded images as a set in the format of tfds."""
    import tensorflow_datasets as tfds

    from cnnjax.data.tfds_format import write_examples

    def info(builder: Any) -> Any:
        image = tfds.features.Image(shape=shape, encoding_format=encoding)
        features = tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=2)})
        return tfds.core.DatasetInfo(builder=builder, features=features, supervised_keys=("image", "label"))

    def examples(_: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, content in enumerate(encodings):
            yield key, {"image": io.BytesIO(content), "label": key % 2}

    return write_examples(name, "1.0.0", info, {"train": examples}, data_dir)


def start(records: Records) -> None:
    opened.append(records)


def decode_records(index: np.ndarray) -> None:
    for record in opened[0].read(index):
        opened[0].fit(record.image)


def decode_alone(pool: ProcessPoolExecutor, order: TrainingOrder, num_batches: int) -> float:
    """Returns the seconds per `num_batches`, after a pause."""
    time.sleep(PAUSE)
    return seconds(lambda: [*pool.map(decode_records, map(order, range(num_batches)))])


def read_streamed(batches: Iterator[Any], num_batches: int, ahead: int) -> float:
    """Returns the seconds per `num_batches`, after a pause, once the first `ahead` are taken."""
    time.sleep(PAUSE)
    for _ in range(ahead):
        next(batches)
    return seconds(lambda: [next(batches).image.block_until_ready() for _ in range(num_batches)])


def stream(args: argparse.Namespace) -> str:
    import jax

    from cnnjax.data.batches import Standardization
    from cnnjax.data.feed import StreamedSet
    from cnnjax.data.tfds_format import png
    from cnnjax.sharding import place

    rows, workers, placement = [], default_workers(10**6), place(BATCH_SIZE, jax.devices()[:1])
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        photos = [path.read_bytes() for path in save_photos(folder, (500, 375), 8 if args.small else 500, noise=22.0)]
        coarse = rng.integers(0, 256, (len(photos), 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
        tiles = [png(image) for image in coarse + rng.integers(0, 16, (len(photos), 32, 32, 3), np.uint8)]
        for name, files, shape, encoding, side, count in (
            ("photo, 500×375, JPEG, to 224×224", photos, (None, None, 3), "jpeg", 224, 20),
            ("tile, 32×32, PNG", tiles, (32, 32, 3), "png", 32, 100),
        ):
            num_batches = 2 if args.small else count
            written = write_set(f"set{side}", files, shape, encoding, folder)
            fit = Fit((side, side), 3)
            records = Records(written, "train", fit if shape[0] is None else Fit(), fit)
            order = TrainingOrder(0, len(files), BATCH_SIZE, np.arange(BATCH_SIZE))
            whole = StreamedImages(records, np.arange(len(files)), np.zeros((len(files), 2, 3), np.int64))
            one = Standardization(np.zeros(3, np.float32), np.ones(3, np.float32))
            with ExitStack() as stack:
                spawn = multiprocessing.get_context("spawn")
                pool = stack.enter_context(ProcessPoolExecutor(workers, spawn, start, (records,)))
                streamed = StreamedSet(whole, np.zeros(len(files), np.int32), one)
                batches = stack.enter_context(
                    streamed.training_batches(0, 0, BATCH_SIZE, None, placement, num_workers=workers)
                )
                threads = stack.enter_context(streamed.plain_batches(BATCH_SIZE, placement))
                ahead = 0 if args.small else 2 * workers + 6
                work = {
                    "decoding alone": partial(decode_alone, pool, order, num_batches),
                    "streamed": partial(read_streamed, batches, num_batches, ahead),
                    "streamed by threads, as for evaluation": partial(read_streamed, threads, num_batches, ahead),
                }
                times = take_turns(work, args.turns)
            alone = times["decoding alone"]
            for way, values in times.items():
                speed = spread([num_batches * BATCH_SIZE / value for value in values])
                rows.append([name, way, speed, f"{ratio(alone, values):.2f}"])
    what = f"what, with {workers} processes" if workers > 1 else "what, with one process"
    return table(["records", what, "images/s", "× alone"], rows)


PARTS = {"stream": stream}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    args = harness.parse(parser, list(PARTS), list(PARTS))
    if args.small:
        args.turns = 1
    harness.write_tables(args, PARTS, "" if args.small else harness.describe("-"), "streaming ")


if __name__ == "__main__":
    main()
