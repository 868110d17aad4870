"""Streams images with worker processes: in batches, in training, or to measure the memory. Has no guard of main.

streamed.py batches DATA_DIR
streamed.py train DATA_DIR RUN_DIR
streamed.py memory DATA_DIR COUNT
"""

import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

from cnnjax import MLP, Config, Report, load_dataset, train_and_evaluate
from cnnjax.cli.main import main
from cnnjax.data import feed
from cnnjax.data.stream import PlainOrder

feed.default_workers = lambda num_images: 2
part, data_dir, *rest = sys.argv[1:]


def resident():
    """Returns the MiB of this process and of those that it has started. A shared page counts once."""
    total, todo, seen = 0, [os.getpid()], set()
    while todo:
        pid = todo.pop()
        seen.add(pid)
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                number, parent = int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid and number not in seen:
                todo.append(number)
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            pass
    return total / 1024


if part == "batches":
    examples, memory = load_dataset("generated", data_dir, lambda line: None, stream=True).open("train"), None
    memory = load_dataset("generated", data_dir, lambda line: None, stream=False).load("train")
    order = PlainOrder(430, 100, np.arange(100))
    with examples.image.batches(order, 3, num_workers=2) as batches:
        for step in range(3, 12):
            batch = next(batches)
            np.testing.assert_array_equal(batch["image"], memory.image[order(step)])
            np.testing.assert_array_equal(batch["label"], memory.label[order(step)])
    print("equal")
elif part == "train":
    sys.argv = ["cnnjax"]
    options = ["--dataset", "generated", "--data-dir", data_dir, "--run-dir", rest[0], "--model", "mlp"]
    options += ["--num-epochs", "100000", "--batch-size", "50", "--stream", "--no-report"]
    main(["train", *options])
elif part == "write":
    from cnnjax.data.named import NAMED_SETS
    from cnnjax.data.sources import RawSet, RawSplit
    from cnnjax.data.tfds_format import write_tfds

    count = int(rest[0])
    image = np.broadcast_to(np.arange(96, dtype=np.uint8)[:, None], (count, 96, 96, 3))
    label = {"label": np.arange(count) % 10}
    raw = RawSet({"train": RawSplit(image, label), "test": RawSplit(image[:100], {"label": np.arange(100) % 10})}, {})
    write_tfds(NAMED_SETS["cifar10"], raw, Path(data_dir), say=lambda line: None)
    (Path(data_dir) / "cifar10").rename(Path(data_dir) / "photos96")
else:
    peak = [0.0]

    def watch():
        while True:
            peak[0] = max(peak[0], resident())
            time.sleep(0.5)

    threading.Thread(target=watch, daemon=True).start()
    config = Config(dataset="photos96", model=MLP(), num_epochs=1, batch_size=64, validation_fraction=0)
    options = {"run_dir": Path(data_dir) / "run", "data_dir": data_dir, "stream": True}
    train_and_evaluate(config, report=Report(quiet=True), **options)
    print(peak[0])
