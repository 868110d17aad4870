"""Sets that this package does not fetch: tfds itself prepares them, with TensorFlow, except for ImageNet."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from cnnjax.data import imagenet
from cnnjax.data.folders import check_free, describe, publish, unknown_set
from cnnjax.errors import UserError


def check_preparable(name: str, data_dir: Path) -> None:
    """Checks that tfds knows a set that is not prepared, and that it can be prepared.

    Raises:
      UserError: it is not known, or needs TensorFlow or files that are not there.
    """
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)  # Listing the community sets needs the network.
    if name.split("/", 1)[0] not in known:
        raise unknown_set(name, data_dir, known)
    if name == imagenet.NAME:
        imagenet.check_archives(data_dir)
    elif importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"`dataset` {name!r} is not prepared in {data_dir}, and only TensorFlow can prepare it. Either run "
            f"`pip install tensorflow` and repeat the command, or copy a directory that was prepared elsewhere to "
            f"{data_dir / name}. {describe(name, data_dir)}"
        )


def prepare_other(name: str, data_dir: Path, stage: Path, say: Callable[[str], None]) -> Path:
    """Prepares a set in `stage`, by tfds unless it is ImageNet, and moves it to `data_dir`.

    Returns:
      The folder of the prepared version. It may lie deeper than `name`: below the name of the default config.

    Raises:
      UserError: it could not be prepared.
    """
    import tensorflow_datasets as tfds

    if name == imagenet.NAME:
        return publish(imagenet.write_imagenet(data_dir, stage, say), stage, data_dir)

    try:
        target = Path(tfds.builder(name, data_dir=data_dir).data_dir)
        if (target / "dataset_info.json").exists():
            return target
        check_free(target)
        say(f"tfds is preparing {name} in {data_dir}")
        builder = tfds.builder(name, data_dir=stage)
        builder.download_and_prepare(file_format="array_record", download_dir=data_dir / "downloads")
        return publish(Path(builder.data_dir), stage, data_dir)
    except UserError:
        raise
    except Exception as error:  # tfds raises many types: no network, files to download manually, a full disk.
        raise UserError(f"tfds could not prepare {name!r} in {data_dir}: {error}") from error
