"""Prepares the generated set as fashion_mnist, from "a mirror", and prints its digest or the error.

Usage: prepare.py DATA_DIR [SIZE]. Prints "halfway" in the middle of the training split, and then waits for a line of
standard input. With SIZE, DATA_DIR becomes a file system of this size, and the files that remain there are printed.
"""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from generated import make_raw

from cnnjax import UserError
from cnnjax.data import datasets, prepared
from cnnjax.data.named import NAMED_SETS
from cnnjax.data.stored import digest


class Images(np.ndarray):
    """Images of which every second half is late."""

    def __iter__(self):
        yield from self[: len(self) // 2].view(np.ndarray)
        say("halfway")
        sys.stdin.readline()
        yield from self[len(self) // 2 :].view(np.ndarray)


def fetch(named, downloads, say):
    downloads.mkdir(parents=True, exist_ok=True)
    raw = make_raw((28, 28, 1), *((1000, 500) if sys.argv[2:] else (430, 170)))
    train = raw.splits["train"]
    return raw._replace(splits=raw.splits | {"train": train._replace(image=train.image.view(Images))}), "a mirror"


say = functools.partial(print, file=sys.stdout, flush=True)  # Even if the stream is redirected.
data_dir = Path(sys.argv[1])
NAMED_SETS["fashion_mnist"] = dataclasses.replace(NAMED_SETS["fashion_mnist"], sha256={})
prepared.fetch = fetch
if size := sys.argv[2:]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size[0]}", "tmpfs", data_dir], check=True)
try:
    dataset = datasets.load_dataset("fashion_mnist", data_dir, say)
    say(digest(dataset.load("train")) == dataset.sha256["train"], dataset.source, sep=", ")
except UserError as error:
    say(error)
if size:
    say("left:", *(path.relative_to(data_dir) for path in data_dir.rglob("*") if path.is_file()))
