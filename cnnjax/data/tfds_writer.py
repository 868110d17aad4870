"""Writes a named set in TensorFlow Datasets' own on-disk format, without TensorFlow.

The stock builders need TensorFlow (its file system and its PNG encoder). A builder of the same name, version, features
and integer keys, fed with PNG bytes, writes what `tfds.data_source(name)` reads like any other, in the same order.
"""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from cnnjax.data.sources import NamedSet, RawSet


def write_tfds(named: NamedSet, raw: RawSet, data_dir: Path, say: Callable[[str], None]) -> Path:
    """Writes `raw` as the prepared tfds set `named` below `data_dir`.

    Returns:
      The folder of the prepared version, `data_dir/name/version`.
    """
    stock = tfds.builder_cls(named.name)
    say(f"writing {named.name} in the format of TensorFlow Datasets below {data_dir}")

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = named.name
        VERSION = tfds.core.Version(named.version)
        pkg_dir_path = stock.pkg_dir_path

        def _info(self) -> tfds.core.DatasetInfo:
            info: Any = stock._info(self)  # The stock description, features and citation; nothing is downloaded.
            for feature, names in raw.label_names.items():
                info.features[feature].names = list(names)
            return info

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(split) for split in raw.splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            features: Any = self.info.features
            images, labels = raw.splits[split]
            for key, image in enumerate(images):
                example: dict[str, Any] = {feature: int(label[key]) for feature, label in labels.items()}
                if "id" in features:
                    example["id"] = f"{split}_{key:05d}"
                yield key, {**example, "image": _png(image)}

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder = Builder(data_dir=data_dir)
    with contextlib.redirect_stdout(io.StringIO()):  # tfds tells there of a download that does not happen.
        builder.download_and_prepare(
            file_format="array_record",
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    return Path(builder.data_dir)


def _png(image: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).save(file, "PNG", compress_level=1)
    file.seek(0)
    return file
