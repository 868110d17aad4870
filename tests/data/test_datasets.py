import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import shutil
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image

from cnnjax import Config, UserError, train_and_evaluate
from cnnjax.data import prepared as data
from cnnjax.data import tfds_format
from cnnjax.data.cache import CACHE
from cnnjax.data.datasets import load_dataset
from cnnjax.data.folders import default_data_dir, prepared_folder
from cnnjax.data.image_files import decode_image, fit_image
from cnnjax.data.named import NAMED_SETS
from cnnjax.data.stored import Examples, digest
from cnnjax.data.tfds_format import write_tfds

FASHION_MNIST_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def silent(line):
    pass


load_dataset = functools.partial(load_dataset, say=silent)


def independent_digest(image, label):
    header = f"uint8[{', '.join(map(str, image.shape))}]".encode()
    return hashlib.sha256(header + image.tobytes() + b"".join(struct.pack("<i", value) for value in label)).hexdigest()


def in_record_order(split_name, split):
    """Returns the examples of a raw split in the order of tfds: by the MD5 of the split's name and the key."""
    order = sorted(range(len(split.image)), key=lambda key: hashlib.md5(f"{split_name}{key}".encode()).digest())
    return Examples(split.image[order], split.labels["label"][order].astype(np.int32))


def assert_equal(got, expected):
    assert (got.image.dtype, got.label.dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(got.image, expected.image)
    np.testing.assert_array_equal(got.label, expected.label)


def forbid(monkeypatch, *names):
    for name in names:
        monkeypatch.setattr(data, name, lambda *args, name=name: pytest.fail(f"{name} was called"))


@pytest.fixture
def data_dir(prepared_dir, tmp_path):
    """A copy of the generated set, without cached arrays, that a test may damage."""
    shutil.copytree(prepared_dir, tmp_path / "tfds", ignore=shutil.ignore_patterns(CACHE))
    return tmp_path / "tfds"


@pytest.fixture(scope="module")
def loaded_dir(prepared_dir, tmp_path_factory):
    """A copy of the generated set with cached arrays."""
    loaded_dir = tmp_path_factory.mktemp("loaded") / "tfds"
    shutil.copytree(prepared_dir, loaded_dir, ignore=shutil.ignore_patterns(CACHE))
    load_dataset("generated", loaded_dir)
    return loaded_dir


@pytest.fixture
def cached_dir(loaded_dir, tmp_path):
    """A copy of the generated set, with cached arrays, that a test may damage."""
    shutil.copytree(loaded_dir, tmp_path / "cached")
    return tmp_path / "cached"


def test_a_prepared_directory_is_loaded_by_its_folder_name(data_dir, raw_fashion_mnist):
    dataset = load_dataset("generated", data_dir)
    assert (dataset.name, dataset.version) == ("generated", "3.0.1")
    assert dataset.folder == data_dir / "generated" / "3.0.1"
    assert dataset.source == f"the prepared tfds directory {dataset.folder}"
    assert (dataset.class_names, dataset.num_classes) == (FASHION_MNIST_NAMES, 10)
    for split, raw in raw_fashion_mnist.splits.items():
        expected = in_record_order(split, raw)
        assert_equal(dataset.load(split), expected)
        assert dataset.sha256[split] == independent_digest(*expected)


def test_digest_of_literals():
    examples = Examples(np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1), np.array([7], np.int32))
    expected = hashlib.sha256(b"uint8[1, 2, 2, 1]" + b"\0\1\2\3" + b"\7\0\0\0").hexdigest()
    assert digest(examples) == expected
    # The digest depends on the shape, but not on the memory layout or the label type.
    assert digest(Examples(np.asfortranarray(examples.image), examples.label.astype(np.int64))) == expected
    assert digest(Examples(examples.image.reshape(1, 4, 1, 1), examples.label)) != expected


def test_the_second_load_reads_the_cache(data_dir, monkeypatch):
    first = load_dataset("generated", data_dir)
    train = first.load("train")
    forbid(monkeypatch, "decode", "fetch")
    second = load_dataset("generated", data_dir)
    assert second == first
    assert_equal(second.load("train"), train)


def test_the_cache_may_move(cached_dir, tmp_path, monkeypatch):
    first = load_dataset("generated", cached_dir)
    cached_dir.rename(tmp_path / "moved")
    forbid(monkeypatch, "decode")
    moved = load_dataset("generated", tmp_path / "moved")
    assert moved.folder == tmp_path / "moved" / "generated" / "3.0.1"
    assert digest(moved.load("test")) == first.sha256["test"]
    (tmp_path / "moved" / "generated").rename(tmp_path / "moved" / "mine")
    assert load_dataset("mine", tmp_path / "moved").name == "mine"


def test_the_second_of_two_threads_waits_and_reads_the_cache(data_dir):
    lines, waits = [], threading.Event()

    def say(line):
        lines.append(line)
        if line.startswith("waiting"):
            waits.set()
        else:
            assert waits.wait(60)  # The first decodes when the second waits.

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: load_dataset("generated", data_dir, say=say), range(2))
    assert first == second
    assert sorted(lines) == [
        "decoding generated 3.0.1 (once)",
        f"waiting for another process, which prepares generated in {data_dir}",
    ]
    names = {"train_image.npy", "train_label.npy", "test_image.npy", "test_label.npy", "facts.json", "SHA256SUMS"}
    assert {path.name for path in (first.folder / CACHE).iterdir()} == names


def with_header(header):
    """Replaces the header of a .npy file, version 1.0, by a text of any length."""
    return lambda content: b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def loop(path):
    path.unlink()
    path.symlink_to(path)


HEADER = b"{'descr': '|u1', 'fortran_order': False, 'shape': %s}"


@pytest.mark.parametrize("name", ["image", "label"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content[: len(content) // 2],
        lambda content: content[:9],
        lambda content: b"",
        lambda content: b"x" * len(content),
        lambda content: content.replace(b")", b"(", 1),
        with_header(HEADER % b"(1000000, 1000000, 1000000)"),
        with_header(HEADER % b"(10000000000000000000000,)"),
        with_header(HEADER % b"(-1,)"),
        with_header(HEADER.replace(b"|u1", b"|O") % b"(430,)"),
        with_header(b"(" * 9000),
        lambda content: npy(np.zeros(430)),
        lambda content: b"PK" + content,
        fifo,
        loop,
    ],
    ids=[
        *("flipped", "half", "no header", "empty", "garbage", "header", "huge", "huge size", "negative", "pickle"),
        *("nested", "float64", "zip", "FIFO", "loop"),
    ],
)
def test_damaged_arrays_are_decoded_again(damage, name, cached_dir):
    dataset = load_dataset("generated", cached_dir)
    path = dataset.folder / CACHE / f"train_{name}.npy"
    intact, train = path.read_bytes(), dataset.load("train")
    if damage in (fifo, loop):
        damage(path)
    else:
        path.write_bytes(damage(intact))
    assert_equal(load_dataset("generated", cached_dir).load("train"), train)
    assert path.read_bytes() == intact


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        *("", "{}", "[]", '{"name": "generated"}', "[" * 200_000, "\0", fifo, loop, "NaN"),
        *({"sha256": value} for value in ({}, 7, None, {"train": "0" * 64}, {"train": "0" * 64, "test": "x"})),
        {"sha256": {"train": "0" * 64, "test": "0" * 64, "validation": "0" * 64}},
        *({"class_names": value} for value in (7, [], [1], "abc", None, [["a"]], float("nan"))),
        *({"image_shape": value} for value in (None, [], [28, 28], [28, 28, 0], [28, 28, "1"], [28.5, 28, 1])),
        *({"source": 1}, {"class_names": ["a"] * 10}, {"image_shape": [28, 27, 1]}),
    ],
    ids=lambda damage: getattr(damage, "__name__", str(damage)[:40]),
)
def test_damaged_facts_are_written_again(damage, cached_dir):
    """So are those of an earlier version, which has not compared the shapes of the splits."""
    dataset = load_dataset("generated", cached_dir)
    path = dataset.folder / CACHE / "facts.json"
    intact = path.read_bytes()
    if callable(damage):
        damage(path)
    else:
        path.write_text(damage if isinstance(damage, str) else json.dumps(json.loads(intact) | damage))
    again = load_dataset("generated", cached_dir)
    assert again.stored == dataclasses.replace(dataset.stored, source=f"the prepared tfds directory {dataset.folder}")
    assert json.loads(path.read_bytes()) == json.loads(intact) | {"source": again.source}
    assert json.loads(intact)["image_shape"] == [28, 28, 1]


def test_changed_shards_are_an_error(cached_dir, raw_fashion_mnist, tmp_path):
    dataset = load_dataset("generated", cached_dir)
    train, test = raw_fashion_mnist.splits.values()
    other = raw_fashion_mnist._replace(splits={"train": train._replace(image=255 - train.image), "test": test})
    folder = write_tfds(NAMED_SETS["fashion_mnist"], other, tmp_path / "other", silent)
    shutil.rmtree(dataset.folder / CACHE)
    shutil.copytree(folder, dataset.folder, dirs_exist_ok=True)
    got = independent_digest(*in_record_order("train", other.splits["train"]))
    with pytest.raises(UserError, match=f"must be {dataset.sha256['train']}, got {got}"):
        dataset.load("train")


def test_a_set_whose_cache_cannot_be_written_is_loaded(data_dir, raw_fashion_mnist):
    folder = data_dir / "generated" / "3.0.1"
    (folder / CACHE).write_text("a file in place of the folder")
    lines = []
    dataset = load_dataset("generated", data_dir, say=lines.append)
    assert re.fullmatch(r"the decoded arrays cannot be cached .*: every start will decode generated again", lines[-1])
    assert (folder / CACHE).is_file()
    assert_equal(dataset.load("test"), in_record_order("test", raw_fashion_mnist.splits["test"]))


# --- Arrays in memory -----------------------------------------------------------------------------------------------

X, Y = np.arange(48, dtype=np.uint8).reshape(3, 4, 4, 1), np.array([2, 0, 1])


@pytest.mark.parametrize(
    "convert",
    [
        lambda image, label: (image, label),
        lambda image, label: (image[..., 0], label.astype(np.uint8)),  # [N H W]
        lambda image, label: (jnp.asarray(image), jnp.asarray(label)),
        lambda image, label: (np.asfortranarray(image), label.astype(np.int64)),
    ],
    ids=["NumPy", "grey", "JAX", "layout"],
)
def test_arrays_equal_the_prepared_set(convert, loaded_dir):
    prepared = load_dataset("generated", loaded_dir)
    train, test = prepared.load("train"), prepared.load("test")
    dataset = load_dataset((*convert(*train), *convert(*test)))
    assert (dataset.name, dataset.source) == ("arrays", "arrays in memory")
    assert (dataset.class_names, dataset.num_classes) == (tuple("0123456789"), 10)
    assert dataset.sha256 == prepared.sha256
    version = hashlib.sha256(f"{prepared.sha256['train']}{prepared.sha256['test']}".encode()).hexdigest()[:12]
    assert dataset.version == version
    assert_equal(dataset.load("train"), train)
    assert_equal(dataset.load("test"), test)


def test_a_function_that_returns_arrays_names_the_set():
    def squares():
        return X, Y, X[:1], Y[:1]

    dataset = load_dataset(squares)
    assert dataset.name == "squares"
    assert dataset.stored == dataclasses.replace(load_dataset(squares()).stored, name="squares")
    assert load_dataset(functools.partial(squares)).name == "partial"


@pytest.mark.parametrize("train, test, num_classes", [([0, 0, 0], [0, 0, 0], 2), ([0, 1, 2], [4, 0, 0], 5)])
def test_the_largest_label_of_both_splits_gives_the_number_of_classes(train, test, num_classes):
    dataset = load_dataset((X, np.array(train), X, np.array(test)))
    assert dataset.class_names == tuple(map(str, range(num_classes)))


@pytest.mark.parametrize(
    "arrays, message",
    [
        (
            (X, Y, X),
            "`dataset` must be a tuple of arrays `(x_train, y_train, x_test, y_test)` or `(x_train, y_train, "
            "x_validation, y_validation, x_test, y_test)`, got a tuple of 3.",
        ),
        (
            lambda: [X, Y, X, Y],
            "`dataset` must be a tuple of arrays `(x_train, y_train, x_test, y_test)` or `(x_train, y_train, "
            "x_validation, y_validation, x_test, y_test)`, got list.",
        ),
        ((X.tolist(), Y, X, Y), "`x_train` must be a NumPy or JAX array, got list."),
        ((X, Y, X, None), "`y_test` must be a NumPy or JAX array, got NoneType."),
        (
            (X / 255, Y, X, Y),
            "`x_train` must be images of dtype uint8, got float64 between 0 and 1. Convert it with "
            "`(255 * x_train.clip(0, 1)).round().astype(np.uint8)`.",
        ),
        (
            (X.astype(int), Y, X, Y),
            f"`x_train` must be images of dtype uint8, got int64 from {X.min()} to {X.max()}. Convert it with "
            "`x_train.astype(np.uint8)`.",
        ),
        (
            (X, Y, X.astype(np.float32), Y),
            f"`x_test` must be images of dtype uint8, got float32 from {X.min()}.0 to {X.max()}.0. Convert it with "
            "`x_test.round().astype(np.uint8)`.",
        ),
        (
            (X / 64 - 1, Y, X, Y),
            f"`x_train` must be images of dtype uint8, got float64 from {X.min() / 64 - 1} to {X.max() / 64 - 1}. Undo "
            "its standardization, or scale it, so that it is between 0 and 255, and convert it.",
        ),
        (
            (X.astype(np.uint16) * 1000, Y, X, Y),
            "`x_train` must be images of dtype uint8, got uint16 from 0 to 47000. Scale it, so that it is between 0 "
            "and 255, and convert it.",
        ),
        (
            (X * np.nan, Y, X, Y),
            "`x_train` must be images of dtype uint8, got float64 with nan or infinite values. Remove them.",
        ),
        (
            (jnp.asarray(X / 47 * 1.004, jnp.bfloat16), Y, X, Y),
            "`x_train` must be images of dtype uint8, got bfloat16 between 0 and 1. Convert it with "
            "`(255 * x_train.clip(0, 1)).round().astype(np.uint8)`.",
        ),
        (
            (X // 40, Y, X.astype(int) // 40, Y),
            "`x_test` must be images of dtype uint8, got int64 from 0 to 1. Scale it, so that it is between 0 and 255, "
            "and convert it.",
        ),
        ((X.astype(str), Y, X, Y), "`x_train` must be images of dtype uint8, got <U3."),
        ((X, Y, X[0, 0], Y), "`x_test` must be of shape [N, H, W, C] or [N, H, W], got (4, 1)."),
        ((X, Y, X[:0], Y[:0]), "`x_test` must be at least one image, got the shape (0, 4, 4, 1)."),
        (
            (X, np.eye(3), X, Y),
            "`y_train` must be of shape [N], got (3, 3). Use `y_train.argmax(-1)` for one-hot labels, "
            "`y_train.ravel()` for a column.",
        ),
        ((X, Y, X, Y / 2), "`y_test` must be integers, got float64."),
        ((X, Y[:2], X, Y), "`y_train` must be one label for each of the 3 images, got 2."),
        ((X, Y - 1, X, Y), "`y_train` must be between 0 and K - 1, K <= 1048576, got -1 to 1."),
        ((X, Y, X, Y << 20), "`y_test` must be between 0 and K - 1, K <= 1048576, got 0 to 2097152."),
        ((X, Y, X[:, 1:], Y), "`x_test` must be images of the same shape (4, 4, 1) as `x_train`, got (3, 4, 1)."),
    ],
    ids=[
        *("count", "no tuple", "no array", "None", "unit floats", "integers", "floats", "standardized"),
        *("16 bits", "infinite", "bfloat16", "binary"),
        *("text", "rank", "empty", "one-hot", "label type", "label count"),
        *("negative label", "large label", "shapes"),
    ],
)
def test_arrays_that_are_not_labeled_images_are_an_error(arrays, message):
    with pytest.raises(UserError) as error:
        load_dataset(arrays)
    assert str(error.value) == message


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_size": 64.0},
            "`image_size` must be a height and a width from 1 to 4096, or one integer for both, got",
        ),
        ({"image_size": (8, 0)}, "`image_size` must be a height and a width from 1 to 4096, or one integer for both"),
        ({"test_seed": -1}, "`test_seed` must be between 0 and 2**32 - 1, got -1."),
        ({"test_fraction": 1.0}, "`test_fraction` must be above 0 and below 1, got 1.0."),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_dataset((X, Y, X, Y), **options)
    assert load_dataset((X, Y, X, Y), image_size=np.int64(8)).image_shape == (8, 8, 1)


# --- Named sets -----------------------------------------------------------------------------------------------------


def test_a_prepared_named_set_with_other_pixels_is_an_error(data_dir, raw_fashion_mnist):
    folder = (data_dir / "generated").rename(data_dir / "fashion_mnist") / "3.0.1"
    pinned = NAMED_SETS["fashion_mnist"].sha256["train"]
    got = independent_digest(*in_record_order("train", raw_fashion_mnist.splits["train"]))
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"The train split of 'fashion_mnist' from .* is not the known one"
        ) as error:
            load_dataset("fashion_mnist", data_dir)
        assert str(folder) in str(error.value)
        assert f"must be {pinned}, got {got}" in str(error.value)
    assert (folder / "dataset_info.json").exists()  # Only the user may delete it.


@pytest.fixture
def mirror(monkeypatch, raw_fashion_mnist):
    """Serves the generated set as fashion_mnist from "a mirror"."""
    monkeypatch.setattr(data, "fetch", lambda named, downloads, say: (raw_fashion_mnist, "a mirror"))


def test_a_fetched_set_with_other_pixels_is_removed(mirror, tmp_path):
    with pytest.raises(UserError, match="The train split of 'fashion_mnist' from a mirror is not the known one"):
        load_dataset("fashion_mnist", tmp_path)
    assert prepared_folder("fashion_mnist", tmp_path) is None
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".cnnjax-fashion_mnist.lock"]


def test_a_fetched_set_is_prepared_once(mirror, tmp_path, monkeypatch, raw_fashion_mnist):
    expected = {split: in_record_order(split, raw) for split, raw in raw_fashion_mnist.splits.items()}
    pins = {split: independent_digest(*examples) for split, examples in expected.items()}
    named = dataclasses.replace(NAMED_SETS["fashion_mnist"], sha256=pins)
    monkeypatch.setitem(NAMED_SETS, "fashion_mnist", named)
    lines = []
    dataset = load_dataset("fashion_mnist", tmp_path, say=lines.append)
    assert "fashion_mnist was served by a mirror" in lines
    assert (dataset.source, dataset.sha256) == ("a mirror", pins)
    forbid(monkeypatch, "fetch", "decode")
    again = load_dataset("fashion_mnist", tmp_path)
    assert again == dataset
    assert_equal(again.load("test"), expected["test"])


def test_an_unknown_test_split_of_a_fetched_set_is_an_error(mirror, tmp_path, monkeypatch, raw_fashion_mnist):
    pins = {name: independent_digest(*in_record_order(name, raw)) for name, raw in raw_fashion_mnist.splits.items()}
    monkeypatch.setitem(NAMED_SETS, "fashion_mnist", dataclasses.replace(NAMED_SETS["fashion_mnist"], sha256=pins))
    with pytest.raises(UserError, match=r"`test_split` must be a split of fashion_mnist \(test\), got 'validation'\."):
        load_dataset("fashion_mnist", tmp_path, test_split="validation")
    forbid(monkeypatch, "fetch")
    assert load_dataset("fashion_mnist", tmp_path).sha256 == pins


def test_a_version_that_is_named_is_fetched_beside_another_one(data_dir, mirror, monkeypatch):
    (data_dir / "generated").rename(data_dir / "fashion_mnist")
    (data_dir / "fashion_mnist" / "3.0.1").rename(data_dir / "fashion_mnist" / "1.0.0")
    monkeypatch.setitem(NAMED_SETS, "fashion_mnist", dataclasses.replace(NAMED_SETS["fashion_mnist"], sha256={}))
    assert load_dataset("fashion_mnist", data_dir).version == "1.0.0"
    assert load_dataset("fashion_mnist:3.0.1", data_dir).version == "3.0.1"


def test_a_fetched_set_is_streamed_at_once(mirror, tmp_path, monkeypatch):
    monkeypatch.setitem(NAMED_SETS, "fashion_mnist", dataclasses.replace(NAMED_SETS["fashion_mnist"], sha256={}))
    assert load_dataset("fashion_mnist", tmp_path, stream=True).streams


# --- Other prepared directories -------------------------------------------------------------------------------------


def prepare_odd(data_dir, features, splits, supervised_keys=None):
    """Writes a tfds set "odd" with the given features and examples."""

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "odd"
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = Path(__file__).parent

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=supervised_keys
            )

        def _split_generators(self, dl_manager):
            return {split: iter(enumerate(examples)) for split, examples in splits.items()}

        def _generate_examples(self):
            """Is not called, because the splits contain their examples."""

    Builder(data_dir=data_dir).download_and_prepare(
        file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


def test_labels_out_of_range(tmp_path):
    """tfds marks test images whose labels are secret with -1."""
    features = {"image": IMAGE, "label": LABEL}
    examples = {split: [{"image": png(2, 2, 3), "label": label}] for split, label in (("train", 0), ("test", -1))}
    prepare_odd(tmp_path, features, examples)
    with pytest.raises(UserError, match=r"split 'test' with one of 2 classes, got labels from -1 to -1"):
        load_dataset("odd", tmp_path)


@pytest.mark.parametrize(
    "count, message",
    [
        (7, r"its split 'train' cannot be read \(430 examples in place of 7\)"),
        (10**15, r"its split 'train' cannot be read \(it holds 430 records in place of 1000000000000000\)"),
    ],
)
def test_a_description_of_another_number_of_examples_is_an_error(count, message, data_dir):
    path = data_dir / "generated" / "3.0.1" / "dataset_info.json"
    info = json.loads(path.read_text())
    next(split for split in info["splits"] if split["name"] == "train")["shardLengths"] = [str(count)]
    path.write_text(json.dumps(info))
    with pytest.raises(UserError, match=message):
        load_dataset("generated", data_dir)


def test_a_test_split_of_another_size_is_an_error(tmp_path):
    """At every start."""
    examples = {
        split: [{"image": png(*shape), "label": 0}] for split, shape in (("train", (2, 2, 3)), ("test", (2, 3, 3)))
    }
    prepare_odd(tmp_path, {"image": IMAGE, "label": LABEL}, examples)
    for _ in range(2):
        with pytest.raises(UserError, match=r"the same shape \(2, 2, 3\) as its training images, got \(2, 3, 3\)\.$"):
            load_dataset("odd", tmp_path)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("damage", ['{"name": ', "", "[" * 200_000, '{"name": NaN}', "[]", fifo, loop])
def test_a_damaged_description(damage, file, data_dir):
    folder = prepared_folder("generated", data_dir)
    if callable(damage):
        damage(folder / file)
    else:
        (folder / file).write_text(damage)
    with pytest.raises(
        UserError, match=r"(?s)generated/3.0.1 is damaged: its description cannot be read .*Move it away"
    ):
        load_dataset("generated", data_dir)


def png(*shape, dtype=np.uint8):
    file = io.BytesIO()
    Image.fromarray(np.full(shape, 7, dtype)).save(file, "PNG")
    file.seek(0)
    return file


IMAGE, LABEL = tfds.features.Image(shape=(None, None, 3)), tfds.features.ClassLabel(num_classes=2)


@pytest.mark.parametrize(
    "features, examples, message",
    [
        ({"value": np.int64}, [{"value": 1}], r"must hold images with one class label each, got .*\['value'\]"),
        (
            {"image": IMAGE, "label": np.int64},
            [{"image": png(2, 2, 3), "label": 1}],
            r"must hold images with one class label each, got .*\['(image|label)', '(image|label)'\]",
        ),
        (
            {"image": IMAGE, "label": LABEL},
            [{"image": png(2, 2, 3), "label": 0}, {"image": png(2, 3, 3), "label": 1}],
            r"must hold images of one shape, got \(2, [23], 3\) and \(2, [23], 3\) \(record 1\)",
        ),
        (
            {"image": tfds.features.Image(shape=(2, 2, 1), dtype=np.uint16), "label": LABEL},
            [{"image": png(2, 2, dtype=np.uint16), "label": 0}],
            "must hold 8-bit images, got uint16",
        ),
    ],
    ids=["no image", "no class label", "shapes", "16 bits"],
)
def test_a_set_without_labeled_8_bit_images_of_one_shape_is_an_error(features, examples, message, tmp_path):
    for example in examples:
        if "image" in example:
            example["image"].seek(0)
    prepare_odd(tmp_path, features, {"train": examples, "test": examples[:1]})
    with pytest.raises(UserError, match=f"^{tmp_path / 'odd' / '1.0.0'} {message}"):
        load_dataset("odd", tmp_path)


def make_images(count, *, seed=0, shape=(2, 2, 3)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def encoded(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    file.seek(0)
    return file


def prepare_images(data_dir, image, splits):
    """Writes a set whose splits are slices of random images, of 2 classes in turn."""
    examples = {
        split: [{"image": encoded(image[i]), "label": i % 2} for i in range(len(image))[rows]]
        for split, rows in splits.items()
    }
    prepare_odd(
        data_dir, {"image": tfds.features.Image(shape=(None, None, image[0].shape[-1])), "label": LABEL}, examples
    )


def rows_of(examples):
    return sorted(map(bytes, examples.image))


def test_without_a_test_split_a_part_of_the_training_split_is_the_test_set(tmp_path):
    image, lines = make_images(40), []
    prepare_images(tmp_path, image, {"train": slice(40)})
    dataset = load_dataset("odd", tmp_path, test_fraction=0.3, say=lines.append)
    train, test = dataset.load("train"), dataset.load("test")
    assert (np.bincount(train.label).tolist(), np.bincount(test.label).tolist()) == ([14, 14], [6, 6])
    assert sorted([*rows_of(train), *rows_of(test)]) == sorted(map(bytes, image))
    assert lines[-1].startswith(
        "odd has no test split: 30% of each class of its training images, drawn with `test_seed` 0"
    )
    assert dataset.sha256.keys() == {"train"}
    for other, same in (({"test_seed": 1}, False), ({}, True)):
        again = load_dataset("odd", tmp_path, test_fraction=0.3, **other).load("test")
        assert (rows_of(again) == rows_of(test)) == same


def test_a_split_can_be_named_as_the_test_set(tmp_path):
    image = make_images(12)
    prepare_images(
        tmp_path, image, {"train": slice(0, 6), "validation": slice(6, 8), "test": slice(8, 10), "extra": slice(10, 12)}
    )
    dataset = load_dataset("odd", tmp_path)
    assert dataset.splits == ("train", "validation", "test")
    assert (rows_of(dataset.load("validation")), rows_of(dataset.load("test"))) == (
        sorted(map(bytes, image[6:8])),
        sorted(map(bytes, image[8:10])),
    )
    for _ in range(2):  # Decoded and cached.
        dataset = load_dataset("odd", tmp_path, test_split="extra")
        assert rows_of(dataset.load("test")) == sorted(map(bytes, image[10:12]))
        assert dataset.sha256.keys() == {"train", "validation", "extra"}
    dataset = load_dataset("odd", tmp_path, test_split="validation")
    assert dataset.splits == ("train", "test")
    assert rows_of(dataset.load("test")) == sorted(map(bytes, image[6:8]))
    for name in ("valid", "train"):
        rule = rf"`test_split` must be a split of odd \(extra, test, validation\), got '{name}'"
        with pytest.raises(UserError, match=rule):
            load_dataset("odd", tmp_path, test_split=name)


def test_a_validation_split_is_not_drawn_from_the_training_images(tmp_path):
    image = make_images(12)
    prepare_images(tmp_path, image, {"train": slice(0, 8), "validation": slice(8, 10), "test": slice(10, 12)})
    dataset = load_dataset("odd", tmp_path)
    train, validation = dataset.load_parts(0, 0.25)
    assert (rows_of(train), rows_of(validation)) == (sorted(map(bytes, image[:8])), sorted(map(bytes, image[8:10])))
    train, validation = dataset.load_parts(0, 0.0)
    assert (len(train.label), len(validation.label)) == (8, 0)
    train, validation = load_dataset("odd", tmp_path, test_split="validation").load_parts(0, 0.25)
    assert (len(train.label), len(validation.label)) == (6, 2)


def test_images_of_several_sizes_are_brought_to_one(tmp_path):
    image = [make_images(1, seed=i, shape=(4 + i, 5, 4))[0] for i in range(6)]
    prepare_images(tmp_path, image, {"train": slice(0, 4), "test": slice(4, 6)})
    with pytest.raises(UserError, match=r"images of one shape, got .* Bring them to one size: image_size=SIZE\."):
        load_dataset("odd", tmp_path)
    for options in ({}, {"resize": "pad", "channels": 4}):
        shape = (8, 6, options.get("channels", 3))
        expected = {i: fit_image(Image.fromarray(image[i]), shape, options.get("resize", "crop")) for i in range(6)}
        for _ in range(2):  # Decoded and cached.
            dataset = load_dataset("odd", tmp_path, image_size=(8, 6), **options)
            assert dataset.image_shape == shape
            assert rows_of(dataset.load("train")) == sorted(bytes(expected[i]) for i in range(4))
            assert rows_of(dataset.load("test")) == sorted(bytes(expected[i]) for i in range(4, 6))


def test_large_images_are_decoded_by_threads_in_the_order_of_their_records(tmp_path, monkeypatch):
    prepare_images(tmp_path, make_images(150, shape=(64, 64, 3)), {"train": slice(0, 140), "test": slice(140, 150)})
    folder, threads = tmp_path / "odd" / "1.0.0", set()

    def decode(*arguments):
        threads.add(threading.current_thread())
        return decode_image(*arguments)

    monkeypatch.setattr(tfds_format, "decode_image", decode)
    found = tfds_format.decode(folder, "train")
    assert threading.current_thread() not in threads
    threads.clear()
    monkeypatch.setattr(tfds_format, "_LARGE", 10**9)
    assert_equal(found, tfds_format.decode(folder, "train"))
    assert threads == {threading.current_thread()}


def test_an_image_that_a_thread_cannot_decode_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_format, "_LARGE", 0)
    content = encoded(make_images(1, shape=(64, 64, 3))[0]).getvalue()
    examples = [{"image": io.BytesIO(content), "label": i % 2} for i in range(9)]
    examples[4]["image"] = io.BytesIO(content[:6000] + bytes(len(content) - 6000))
    prepare_odd(tmp_path, {"image": IMAGE, "label": LABEL}, {"train": examples, "test": examples[:1]})
    with pytest.raises(UserError, match=r"1\.0\.0 is damaged: its split 'train' cannot be read"):
        load_dataset("odd", tmp_path)


@pytest.mark.parametrize("stream", [False, True])
def test_images_of_all_modes_have_their_colors(stream, tmp_path):
    """Those that tfds would return as they are stored: numbers of a palette, bits, or inks."""
    red, black, white = (200, 40, 40), (0, 0, 0), (255, 255, 255)
    kinds = [("RGB", "PNG", red), ("P", "PNG", red), ("P", "GIF", red), ("CMYK", "JPEG", red), ("1", "PNG", white)]
    kinds += [("L", "JPEG", white), ("1", "PNG", black)]
    examples = []
    for i, (mode, kind, color) in enumerate(kinds):
        file = io.BytesIO()
        colored = Image.new("RGB", (4, 5), color)
        (colored.quantize(2) if mode == "P" else colored.convert(mode)).save(file, kind)
        examples.append({"image": io.BytesIO(file.getvalue()), "label": i % 2})
    splits = {"train": examples, "test": [{"image": png(5, 4, 3), "label": 0}]}
    prepare_odd(tmp_path, {"image": IMAGE, "label": LABEL}, splits)
    for options in ({}, {"image_size": 8}):
        image = load_dataset("odd", tmp_path, stream=stream, **options).load("train").image
        expected = sorted(color for _, _, color in kinds)
        assert np.abs(np.array(sorted(image[:, 0, 0].tolist())) - expected).max() <= 2  # JPEG rounds.
        assert (image == image[:, :1, :1]).all()


def test_gray_images_of_a_set_with_alpha_are_opaque():
    for channels, expected in ((4, (7, 7, 7, 255)), (3, (7, 7, 7)), (None, (7,))):
        image = decode_image(png(2, 2).read(), channels)
        np.testing.assert_array_equal(image, np.broadcast_to(expected, (2, 2, len(expected))))


def test_which_cached_images_are_used_does_not_depend_on_earlier_calls(tmp_path):
    """All images have one shape, but the description does not say so."""
    prepare_images(tmp_path, make_images(4), {"train": slice(4), "test": slice(1)})
    unchanged = load_dataset("odd", tmp_path)
    for _ in range(2):  # Decoded and cached.
        assert load_dataset("odd", tmp_path, image_size=8).stored.image_shape == (8, 8, 3)
        assert load_dataset("odd", tmp_path).sha256 == unchanged.sha256


def test_images_in_memory_are_brought_to_a_size_and_to_colors():
    x = make_images(3, shape=(4, 5, 1))
    dataset = load_dataset((x, np.arange(3), x[:1, ..., 0], np.zeros(1, int)), image_size=8, channels=3)
    assert (dataset.image_shape, dataset.stored.image_shape) == ((8, 8, 3), (4, 5, 1))
    expected = [fit_image(Image.fromarray(image[..., 0]), (8, 8, 3)) for image in x]
    np.testing.assert_array_equal(dataset.load("train").image, expected)
    assert dataset.sha256 == load_dataset((x, np.arange(3), x[:1], np.zeros(1, int))).sha256


def test_images_with_alpha_are_put_on_white_unless_four_channels_are_wanted(tmp_path):
    image = make_images(4, shape=(3, 3, 4))
    features = {"image": tfds.features.Image(shape=(3, 3, 4)), "label": LABEL}
    examples = [{"image": encoded(x), "label": i % 2} for i, x in enumerate(image)]
    prepare_odd(tmp_path, features, {"train": examples, "test": [{"image": encoded(image[0]), "label": 0}]})
    expected = fit_image(Image.fromarray(image[0]), (3, 3, 3))
    np.testing.assert_array_equal(load_dataset("odd", tmp_path).load("test").image[0], expected)
    np.testing.assert_array_equal(load_dataset("odd", tmp_path, channels=4).load("test").image[0], image[0])


def test_a_version_can_be_named(data_dir):
    (data_dir / "generated" / "3.0.1").rename(data_dir / "generated" / "1.2.3")
    shutil.copytree(data_dir / "generated" / "1.2.3", data_dir / "generated" / "2.0.0")
    assert load_dataset("generated", data_dir).version == "2.0.0"
    assert load_dataset("generated:1.2.3", data_dir).version == "1.2.3"
    rule = r"`dataset` must name a version that is prepared in .* \(1\.2\.3, 2\.0\.0\), got generated:1\.2\. Write gen"
    with pytest.raises(UserError, match=rule):
        load_dataset("generated:1.2", data_dir)
    with pytest.raises(
        UserError, match=r"\(none is\) or can be downloaded \(3\.0\.2\), got cifar100:9\. Write cifar100 f"
    ):
        load_dataset("cifar100:9", data_dir)


def test_a_path_that_is_also_the_name_of_a_set_is_ambiguous(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("generated").mkdir()
    with pytest.raises(UserError, match=r"must be unambiguous, got 'generated': .* Write \./generated for the path"):
        load_dataset("generated", data_dir)
    Path("fashion_mnist").mkdir()
    (data_dir / "generated").rename(data_dir / "fashion_mnist")
    lines = []
    with pytest.raises(UserError, match="is not the known one"):  # It is not the folder.
        load_dataset("fashion_mnist", data_dir, say=lines.append)
    assert lines[0] == "fashion_mnist is the data set of this name; for the folder, write ./fashion_mnist"


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (tfds.features.ClassLabel(), "must state the number of its classes"),
        (tfds.features.ClassLabel(num_classes=1), "must state the number of its classes, at least 2, got 1"),
        ({"kind": LABEL}, "must hold images with one class label each"),
    ],
    ids=["unknown number", "one class", "nested"],
)
def test_a_label_that_is_no_known_class_is_an_error(label, message, tmp_path):
    prepare_odd(
        tmp_path,
        {"image": IMAGE, "label": LABEL},
        {split: [{"image": png(2, 2, 3), "label": 0}] for split in ("train", "test")},
    )
    path = tmp_path / "odd" / "1.0.0" / "features.json"
    path.write_text(json.dumps(tfds.features.FeaturesDict({"image": IMAGE, "label": label}).to_json()))
    with pytest.raises(UserError, match=message):
        load_dataset("odd", tmp_path)


def test_training_images_of_one_class_are_an_error(tmp_path):
    features = {"image": IMAGE, "label": tfds.features.ClassLabel(names=["no", "yes"])}
    splits = {split: [{"image": png(2, 2, 3), "label": label}] for split, label in (("train", 1), ("test", 0))}
    prepare_odd(tmp_path, features, splits)
    config = Config(dataset="odd", validation_fraction=0.0)
    rule = "`dataset` must be a set with training images of at least two classes, got only 'yes'. Add images of an"
    with pytest.raises(UserError, match=rule):
        train_and_evaluate(config, run_dir=tmp_path / "run", data_dir=tmp_path)
    with pytest.raises(UserError, match="`dataset` must be a set with training images of at least two classes, got o"):
        train_and_evaluate(Config(dataset=(X, 0 * Y, X, Y)), run_dir=tmp_path / "run")


@pytest.mark.parametrize(
    "names", [["кот", "犬 🐶", "قط"], None, ["a", "a", "b"]], ids=["scripts", "none", "duplicates"]
)
def test_class_names(names, data_dir):
    features = {"image": IMAGE, "label": tfds.features.ClassLabel(num_classes=3)}
    prepare_odd(data_dir, features, {split: [{"image": png(2, 2, 3), "label": 2}] for split in ("train", "test")})
    if names:
        (data_dir / "odd" / "1.0.0" / "label.labels.txt").write_text("\n".join(names), encoding="utf-8")
    for _ in range(2):  # Decoded and cached.
        assert load_dataset("odd", data_dir).class_names == tuple(names or "012")


@pytest.mark.parametrize(
    "channels, said", [(1, []), (4, []), (5, ["squares has images of 5 channels: `cnnjax predict` "])]
)
def test_images_that_predict_cannot_read_are_announced(channels, said):
    def squares():
        return (
            np.zeros((2, 4, 4, channels), np.uint8),
            np.arange(2),
            np.zeros((1, 4, 4, channels), np.uint8),
            np.zeros(1, int),
        )

    lines = []
    assert load_dataset(squares, say=lines.append).image_shape == (4, 4, channels)
    assert [line.partition("cannot")[0] for line in lines] == said


def test_supervised_keys_name_the_features(tmp_path):
    features = {"picture": tfds.features.Image(shape=(2, 2, 3)), "kind": tfds.features.ClassLabel(names=["no", "yes"])}
    splits = {split: [{"picture": png(2, 2, 3), "kind": "yes"}] for split in ("train", "test")}
    prepare_odd(tmp_path, features, splits, supervised_keys=("picture", "kind"))
    dataset = load_dataset("odd", tmp_path)
    assert dataset.class_names == ("no", "yes")
    assert_equal(dataset.load("train"), Examples(np.full((1, 2, 2, 3), 7, np.uint8), np.array([1], np.int32)))


@pytest.fixture
def tfrecord_dir(data_dir):
    """The generated set in the TFRecord format, in two shards per split, with zeros as checksums (not read)."""
    folder = data_dir / "generated" / "3.0.1"
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        name = split["name"]
        (shard,) = folder.glob(f"*-{name}.array_record-*")
        with ArrayRecordDataSource(str(shard)) as source:
            rows = [source[i] for i in range(len(source))]
        shard.unlink()
        half = len(rows) // 2 + 1
        split["shardLengths"] = [str(half), str(len(rows) - half)]
        split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        for i, part in enumerate((rows[:half], rows[half:])):
            content = b"".join(struct.pack("<Q", len(row)) + bytes(4) + row + bytes(4) for row in part)
            (folder / f"fashion_mnist-{name}.tfrecord-0000{i}-of-00002").write_bytes(content)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return data_dir


def test_tfrecords_contain_the_same_examples(tfrecord_dir, raw_fashion_mnist):
    dataset = load_dataset("generated", tfrecord_dir)
    for split, raw in raw_fashion_mnist.splits.items():
        assert_equal(dataset.load(split), in_record_order(split, raw))


def test_tfrecords_stay_in_memory_even_if_they_need_more_than_half_of_it(tfrecord_dir, monkeypatch):
    monkeypatch.setattr("cnnjax.memory.host_memory", lambda: 1000)
    lines = []
    assert not load_dataset("generated", tfrecord_dir, say=lines.append).streams
    assert lines[0].startswith("generated needs more than half of the memory and is kept there: only sets in the")
    with pytest.raises(UserError, match=r"`stream` must be False for .*, whose format is tfrecord"):
        load_dataset("generated", tfrecord_dir, stream=True)


def test_a_missing_tfrecord_is_an_error(tfrecord_dir):
    folder = tfrecord_dir / "generated" / "3.0.1"
    (folder / "fashion_mnist-train.tfrecord-00001-of-00002").write_bytes(b"")
    with pytest.raises(UserError, match=f"^{folder} must hold 430 examples in its split 'train', got 216"):
        load_dataset("generated", tfrecord_dir)


def test_a_tfrecord_with_a_damaged_length_is_an_error(tfrecord_dir):
    path = tfrecord_dir / "generated" / "3.0.1" / "fashion_mnist-train.tfrecord-00000-of-00002"
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])
    with pytest.raises(UserError, match=r"its split 'train' cannot be read \(a record of 4611686018427387904 bytes in"):
        load_dataset("generated", tfrecord_dir)


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_a_pipe_in_place_of_a_shard_is_an_error(file_format, data_dir, request):
    if file_format == "tfrecord":
        request.getfixturevalue("tfrecord_dir")
    fifo(max((data_dir / "generated" / "3.0.1").glob(f"*-train.{file_format}-*")))
    with pytest.raises(UserError, match=r"is damaged: .*Not a regular file"):
        load_dataset("generated", data_dir)


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_a_truncated_shard_is_an_error(file_format, data_dir, request):
    if file_format == "tfrecord":
        request.getfixturevalue("tfrecord_dir")
    folder = data_dir / "generated" / "3.0.1"
    shard = max(folder.glob(f"*-train.{file_format}-*"))
    shard.write_bytes(shard.read_bytes()[:-300])
    with pytest.raises(UserError, match=f"^{folder} "):
        load_dataset("generated", data_dir)


# --- The real sets --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    return functools.cache(lambda name: load_dataset(name, default_data_dir()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, shape, per_class",
    [
        ("mnist", (28, 28, 1), [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
        ("fashion_mnist", (28, 28, 1), [6000] * 10),
        ("cifar10", (32, 32, 3), [5000] * 10),
    ],
)
def test_real_sets_have_the_known_digests(name, shape, per_class, real):
    dataset = real(name)
    train, test = dataset.load("train"), dataset.load("test")
    assert train.image.shape == (sum(per_class), *shape)
    assert test.image.shape == (10_000, *shape)
    assert np.bincount(train.label).tolist() == per_class
    assert dataset.sha256 == NAMED_SETS[name].sha256
    assert dataset.sha256["test"] == independent_digest(*test)


@pytest.mark.slow
def test_real_cifar10_has_the_known_channel_statistics(real):
    """Source: the constants with which CIFAR-10 code normalizes, in full precision."""
    image = real("cifar10").load("train").image.reshape(-1, 3)
    counts = np.stack([np.bincount(image[:, c], minlength=256) for c in range(3)])
    value = np.arange(256) / 255
    mean = counts @ value / len(image)
    deviation = np.sqrt(counts @ value**2 / len(image) - mean**2)
    np.testing.assert_allclose(mean, [0.49139968, 0.48215841, 0.44653091], atol=1e-7)
    np.testing.assert_allclose(deviation, [0.24703223, 0.24348513, 0.26158784], atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_stock_tfds_reads_the_real_sets(name, real):
    dataset = real(name)
    test = dataset.load("test")
    source = tfds.data_source(name, split="test", data_dir=default_data_dir())
    assert len(source) == 10_000
    for i in (0, 1, 4999, 9999):
        np.testing.assert_array_equal(source[i]["image"], test.image[i])
        assert source[i]["label"] == test.label[i]


def test_arrays_may_have_a_validation_split():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (30, 4, 5), np.uint8), np.arange(30) % 3
    dataset = load_dataset((x[:16], y[:16], x[16:22], y[16:22], x[22:], y[22:]))
    assert dataset.splits == ("train", "validation", "test") == (*dataset.sha256,)
    train, validation = dataset.load_parts(seed=0, validation_fraction=0.1)
    for examples, part in ((train, slice(0, 16)), (validation, slice(16, 22)), (dataset.load("test"), slice(22, 30))):
        assert np.array_equal(examples.image[..., 0], x[part]) and np.array_equal(examples.label, y[part])
    assert len(dataset.load_parts(seed=0, validation_fraction=0.0)[1].label) == 0
    with pytest.raises(
        UserError, match=r"`x_validation` must be images of the same shape \(4, 5, 1\) as `x_train`, got"
    ):
        load_dataset((x, y, x[:, :3], y, x, y))


@pytest.mark.parametrize("i", [0, 1])
def test_masked_arrays_are_refused(i):
    arrays = [np.zeros((4, 2, 2), np.uint8), np.arange(4) % 2] * 2
    arrays[i] = np.ma.masked_array(arrays[i], mask=np.ones_like(arrays[i], bool))
    with pytest.raises(UserError, match=r"`[xy]_train` must be an array without a mask, got a masked one\. Remove the"):
        load_dataset(tuple(arrays))


def test_memory_that_the_caller_may_change_is_copied_and_a_mapped_file_is_not(tmp_path):
    label = np.arange(8) % 2
    memory = np.zeros(8 * 4 * 4 * 3 + 64, np.uint8)
    aligned = memory[-memory.ctypes.data % 64 :][: 8 * 4 * 4 * 3].reshape(8, 4, 4, 3)
    locked = aligned.view()
    locked.flags.writeable = False
    for image in (aligned, locked, jax.device_put(aligned), aligned[..., 0]):
        found = load_dataset((image, label, image, label)).load("test").image
        aligned[:] = 7
        assert not found.any()
        aligned[:] = 0
    np.save(tmp_path / "images.npy", aligned)
    image = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert np.shares_memory(load_dataset((image, label, image, label)).load("train").image, image)
