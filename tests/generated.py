"""A small generated data set, and helpers of several tests."""

import numpy as np

from cnnjax import Report
from cnnjax.cli.main import main
from cnnjax.data.sources import RawSet, RawSplit


def make_raw(shape, num_train, num_test, num_classes=10, label_names=None):
    """Returns noisy copies of one random pattern per class: uint8 images that a network learns in seconds."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 128, (num_classes, *shape))  # Dark, as MNIST is.

    def split(count):
        label = np.arange(count) % num_classes
        image = np.clip(patterns[label] + rng.normal(0, 40, (count, *shape)), 0, 255).astype(np.uint8)
        return RawSplit(image, {"label": label.astype(np.uint8)})

    return RawSet({"train": split(num_train), "test": split(num_test)}, label_names or {})


class Lines(Report):
    """A report that keeps what it is told."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def status(*arguments):
    """Runs a command; returns its exit code."""
    try:
        main([*map(str, arguments)])
    except SystemExit as stopped:
        return stopped.code
    return 0
