"""The description in a prepared tfds directory, read without importing tfds: every start needs it."""

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cnnjax.data.stored import Fit
from cnnjax.files import open_regular


class Description(NamedTuple):
    """What the description of a prepared tfds directory states.

    Attributes:
      counts: the number of examples of each split.
      image_shape: (H, W, C); None for each number that is not stated.
      file_format: "array_record", "tfrecord" or another one.
    """

    counts: dict[str, int]
    image_shape: tuple[int | None, ...]
    file_format: str

    def decoded_bytes(self, splits: Sequence[str], fit: Fit) -> int:
        """Returns the bytes of the images of some splits in one shape by `fit`; 0 if their size is not stated."""
        height, width, channels = [n or 0 for n in self.image_shape]
        return sum(self.counts.get(split, 0) for split in splits) * math.prod(fit.shape_of((height, width, channels)))


def read_description(folder: Path) -> Description | None:
    """Returns the description, or None if it is damaged, which is reported later, or has an old form."""
    with contextlib.suppress(Exception):
        with open_regular(folder / "dataset_info.json") as file:
            info = json.load(file)
        with open_regular(folder / "features.json") as file:
            features = json.load(file)["featuresDict"]["features"]
        counts = {split["name"]: sum(map(int, split["shardLengths"])) for split in info["splits"]}
        keys = [item["featureKey"] for item in info.get("supervisedKeys", {}).get("tuple", {}).get("items", [])]
        shape = features[keys[0] if len(keys) == 2 else "image"]["image"]["shape"]["dimensions"]
        height, width, channels = [int(n) if int(n) > 0 else None for n in shape]
        return Description(counts, (height, width, channels), info.get("fileFormat") or "tfrecord")
    return None
