"""Sets that only tfds itself can prepare, with TensorFlow."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from cnnjax.data.folders import check_free, describe, publish, unknown_set
from cnnjax.errors import UserError


def check_tensorflow(name: str, data_dir: Path) -> None:
    """Checks that tfds knows a set that is not prepared, and could prepare it.

    Raises:
      UserError: it does not, or needs TensorFlow.
    """
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)  # Listing the community sets needs the network.
    if name.split("/", 1)[0] not in known:
        raise unknown_set(name, data_dir, known)
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"`dataset` {name!r} is not prepared in {data_dir}, and only TensorFlow can prepare it. Either run "
            f"`pip install tensorflow` and repeat the command, or copy a directory that was prepared elsewhere to "
            f"{data_dir / name}. {describe(name, data_dir)}"
        )


def prepare_with_tensorflow(name: str, data_dir: Path, stage: Path, say: Callable[[str], None]) -> Path:
    """Lets tfds prepare a set in `stage`, and moves it to `data_dir`.

    Returns:
      The folder of the prepared version. It may lie deeper than `name`: below the name of the default config.

    Raises:
      UserError: tfds could not prepare it.
    """
    import tensorflow_datasets as tfds

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
