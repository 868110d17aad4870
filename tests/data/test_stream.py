"""Images that stay on disk: their order, their index, their damage, and training on them."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import numpy as np
import pytest
from generated import Lines

from cnnjax import MLP, Augment, Config, SpeedNet, UserError, load_run, train_and_evaluate
from cnnjax.data import datasets, stream_index
from cnnjax.data.batches import image_sums, pixel_statistics, statistics_of_sums
from cnnjax.data.folders import prepared_folder
from cnnjax.data.order import epoch_plan, plain_plan
from cnnjax.data.records import Records
from cnnjax.data.stored import Fit
from cnnjax.data.stream import PlainOrder, StreamedImages, TrainingOrder

PROGRAM = Path(__file__).parents[1] / "programs" / "streamed.py"


@pytest.fixture
def data_dir(prepared_dir, tmp_path):
    return shutil.copytree(prepared_dir, tmp_path / "tfds")


def load(data_dir, lines=None, **options):
    say = (lambda line: None) if lines is None else lines.append
    return datasets.load_dataset("generated", data_dir, say, **options)


# --- Order and pixels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balanced", [False, True])
def test_the_order_is_that_of_the_plans_from_any_step_on(balanced):
    label = np.random.default_rng(0).integers(0, 3, 50) if balanced else None
    options = {"batch_size": 16, "augment": Augment(), "image_size": (8, 8), "balanced_label": label}
    example = np.concatenate([epoch_plan(7, epoch, 50, **options).example for epoch in range(3)])
    rows = np.array([1, 2, 11])
    order = TrainingOrder(7, 50, 16, rows, label)
    for step in (9, 0, 3, 4, 11, 7):  # An epoch has 4 steps.
        np.testing.assert_array_equal(order(step), example[step, rows])
    plain = PlainOrder(50, 16, rows)
    for step in range(8):
        np.testing.assert_array_equal(plain(step), plain_plan(50, 16).example[step % 4, rows])


def test_statistics_of_sums_are_those_of_the_pixels_bit_for_bit():
    image = np.random.default_rng(0).integers(0, 256, (70, 5, 6, 3), np.uint8)
    image[..., 2] = 9  # A deviation of 0.
    sums = image_sums(image)
    np.testing.assert_array_equal(sums[3], [image[3].sum((0, 1), int), (image[3].astype(int) ** 2).sum((0, 1))])
    for index in (np.arange(70), np.array([69, 3, 4]), np.array([8])):
        exact = pixel_statistics(image[index])
        found = statistics_of_sums(sums[index].sum(0), 30 * len(index))
        np.testing.assert_array_equal(found, exact)
    np.testing.assert_allclose(pixel_statistics(image).mean, image.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(pixel_statistics(image).std[:2], image[..., :2].std((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"image_size": (20, 24), "channels": 3, "resize": "pad"}])
def test_streamed_parts_are_those_in_memory(options, data_dir):
    memory, streamed = load(data_dir, stream=False, **options), load(data_dir, stream=True, **options)
    assert not memory.streams and streamed.streams
    facts = ("name", "source", "class_names", "num_classes", "image_shape", "sha256", "splits", "version")
    assert all(getattr(memory, name) == getattr(streamed, name) for name in facts)
    expected, found = memory.open_parts(3, 0.2), streamed.open_parts(3, 0.2)
    for x, y in zip([*expected, memory.open("test")], [*found, streamed.open("test")], strict=True):
        assert isinstance(y.image, StreamedImages) and y.image.shape == x.image.shape
        np.testing.assert_array_equal(y.label, x.label)
        np.testing.assert_array_equal(y.image.read(), x.image)
        np.testing.assert_array_equal(y.image.statistics(), pixel_statistics(x.image))
    np.testing.assert_array_equal(streamed.load("test").image, memory.load("test").image)


def test_a_test_part_of_the_training_split(data_dir):
    info = data_dir / "generated" / "3.0.1" / "dataset_info.json"
    for cache in info.parent.glob("cnnjax_*"):  # Of tests that have used the set with both splits.
        shutil.rmtree(cache)
    content = json.loads(info.read_text())
    content["splits"] = [split for split in content["splits"] if split["name"] == "train"]
    info.write_text(json.dumps(content))
    memory, streamed = load(data_dir, stream=False), load(data_dir, stream=True)
    for split in ("train", "test"):
        np.testing.assert_array_equal(streamed.open(split).image.read(), memory.load(split).image)


# --- Index ----------------------------------------------------------------------------------------------------------


def test_the_index_is_made_once_and_again_if_it_is_damaged(data_dir, monkeypatch):
    lines, passes, folder = [], [], data_dir / "generated" / "3.0.1"
    original = stream_index.index_split
    monkeypatch.setattr(stream_index, "index_split", lambda records: passes.append(records.split) or original(records))
    first = load(data_dir, lines, stream=True)
    assert lines == [
        f"reading all {count} {split} images of {folder} (once)" for split, count in (("train", 430), ("test", 170))
    ]
    assert load(data_dir, stream=True).sha256 == first.sha256 and passes == ["train", "test"]
    arrays = sorted(folder.glob("cnnjax_index*/train_*.npy"))
    assert len(arrays) == 2
    for path in arrays:
        intact = path.read_bytes()
        path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
        passes.clear()
        load(data_dir, stream=True)
        assert passes == ["train"] and path.read_bytes() == intact
    (shard,) = folder.glob("*test*array_record*")
    shard.touch()
    passes.clear()
    left = arrays[0].with_name("train_sums.npy.1.2.partial")  # Of a process that was killed.
    left.touch()
    load(data_dir, stream=True)
    assert passes == ["test"] and not left.exists()


@pytest.mark.parametrize("known", [True, False], ids=["in memory", "streamed"])
def test_other_images_than_before_are_an_error(known, data_dir):
    load(data_dir, stream=not known)
    folder = data_dir / "generated" / "3.0.1"
    (train,), (test,) = folder.glob("*train*array_record*"), folder.glob("*test*array_record*")
    info = json.loads((folder / "dataset_info.json").read_text())
    next(split for split in info["splits"] if split["name"] == "train")["shardLengths"] = ["170"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    train.write_bytes(test.read_bytes())
    with pytest.raises(UserError, match=r"The train split of 'generated' from .* is not the known one"):
        load(data_dir, stream=True)


def test_a_directory_that_cannot_be_written_is_read_at_every_start(data_dir, monkeypatch):
    def write(*arguments):
        raise OSError("read-only")

    monkeypatch.setattr(stream_index, "write_index", write)
    lines = []
    assert load(data_dir, lines, stream=True).open("test").image.read().shape == (170, 28, 28, 1)
    assert lines[-1] == "the index cannot be kept (read-only): every start will read all images once"


# --- What is refused, and what is chosen ----------------------------------------------------------------------------


def test_a_damaged_record_is_named(data_dir):
    dataset = load(data_dir, stream=True)
    folder = prepared_folder("generated", data_dir)
    (shard,) = folder.glob("*train*array_record*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    message = (
        rf"(?s)is damaged: record (\d+) of {shard.name} \(record \1 of its split 'train'\) cannot be read \(.*Move"
    )
    with pytest.raises(UserError, match=message):
        dataset.open("train").image.read()
    with pytest.raises(UserError, match=message):
        load(data_dir, stream=True)  # The index is made again.
    shard.unlink()
    with pytest.raises(
        UserError, match=rf"is damaged: its split 'train' cannot be read \(.*No such file.*{shard.name}"
    ):
        load(data_dir, stream=True)


def test_too_few_open_files_are_no_damage(data_dir):
    records = Records(prepared_folder("generated", data_dir), "train", Fit(), Fit())
    del records._source
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        assert len(records.read([0])) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for where, fix in (("", "Raise the number of files that a process may open (ulimit -n)."), (" in system", "Close")):
        message = str(records._damage(f"open() failed: Too many open files{where}; opening a", 0))
        assert f"must be readable, got open() failed: Too many open files{where}; opening a. {fix}" in message


def test_a_record_is_found_in_its_file(data_dir):
    """The index within the file differs from that within the split if there are several files."""
    records = Records(prepared_folder("generated", data_dir), "train", Fit(), Fit())
    records.shards = tuple(records.shards[0]._replace(name=name, num_records=n) for name, n in (("a", 7), ("b", 423)))
    for index, place in ((6, "record 6 of a "), (7, "record 0 of b "), (429, "record 422 of b ")):
        assert f"is damaged: {place}(record {index} of its split 'train')" in str(records._damage("torn", index))


def test_sets_that_cannot_be_streamed():
    image, label = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4) % 2
    with pytest.raises(
        UserError, match=r"`stream` must be False for arrays in memory, got True\. Leave stream=True out\."
    ):
        datasets.load_dataset((image, label, image, label), stream=True)


def test_a_set_is_streamed_if_it_takes_more_than_half_of_the_memory(data_dir, monkeypatch):
    size = 600 * 28 * 28
    jax.devices()  # Before jax has started, only the memory of the host counts.
    for memory, streams in ((2 * size, False), (2 * size - 2, True), (None, False)):
        monkeypatch.setattr("cnnjax.memory.device_memory", lambda device, memory=memory: memory)
        assert load(data_dir).streams == streams
        assert load(data_dir, stream=not streams).streams != streams


# --- Training -------------------------------------------------------------------------------------------------------

CONFIG = Config(
    dataset="generated",
    model=MLP(dense_dropout=0.1),
    num_epochs=2,
    batch_size=50,
    validation_fraction=0.2,
    augment=Augment(flip="random", translate=2, cutout=4),
)


def digests(run):
    return run.result["sha256"], (run.run_dir / "metrics.jsonl").read_bytes(), run.facts


def test_a_streamed_run_has_the_bits_of_one_in_memory(data_dir, tmp_path):
    """It may change between the two in the middle of an epoch."""
    expected = digests(train_and_evaluate(CONFIG, run_dir=tmp_path / "memory", data_dir=data_dir, stream=False))

    def stop(step, metrics):
        if step == 4:  # Of 7 per epoch.
            raise KeyError

    report = Lines()
    options = {"run_dir": tmp_path / "changing", "data_dir": data_dir, "resume": "auto"}
    with pytest.raises(KeyError):
        train_and_evaluate(CONFIG, **options, stream=False, on_step=stop, checkpoint_seconds=0.0)
    changed = train_and_evaluate(CONFIG, **options, stream=True, report=report)
    assert any(line == "resuming at step 3 of 14" for line in report.lines)
    assert digests(changed) == expected
    assert (
        digests(train_and_evaluate(CONFIG, run_dir=tmp_path / "streamed", data_dir=data_dir, stream=True)) == expected
    )
    scores = load_run(tmp_path / "streamed").evaluate("validation", data_dir=data_dir)
    assert scores.accuracy == pytest.approx(changed.result["best_validation_accuracy"])


@pytest.mark.slow
def test_plain_batches_and_networks_that_look_at_data(data_dir, tmp_path):
    model = SpeedNet(widths=(8, 8, 8))
    config = dataclasses.replace(CONFIG, model=model, augment=Augment(), num_epochs=1, sampling="balanced")
    runs = [
        train_and_evaluate(config, run_dir=tmp_path / str(stream), data_dir=data_dir, stream=stream)
        for stream in (False, True)
    ]
    assert digests(runs[0]) == digests(runs[1])


# --- Processes ------------------------------------------------------------------------------------------------------


def children(pid):
    """Returns the processes that a process has started, and those that they have started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, parent = int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found += [number, *children(number)]
    return found


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@contextmanager
def started(*arguments):
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_processes_read_the_same_images_without_the_guard_of_main(data_dir):
    """The program has no `if __name__ == "__main__"`, so a worker that imported it would read in its turn."""
    load(data_dir, stream=True)
    with started("batches", data_dir) as process:
        out, _ = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "equal\n")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_saves_and_no_process_is_left(signum, data_dir, tmp_path):
    with started("train", data_dir, tmp_path / "run") as process:
        assert any(" 2/100000 " in line for line in process.stdout)
        workers = children(process.pid)
        assert len(workers) >= 2
        # A terminal sends its signals to all of them.
        for pid in [process.pid, *workers] if signum != signal.SIGKILL else [process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)
        process.communicate(timeout=60)
    assert process.returncode == (75 if signum != signal.SIGKILL else -signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_set(tmp_path):
    """An epoch of ten times as many images takes the same memory, of the process and of its workers."""
    peaks = []
    for count in (1_000, 10_000):  # Of 96 by 96 pixels: 28 MB and 276 MB. About ten batches of 1.8 MB are in work.
        with started("write", tmp_path / str(count), count) as process:
            assert process.wait(timeout=300) == 0
        with started("memory", tmp_path / str(count)) as process:
            out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        peaks.append(float(out.split()[-1]))
    assert peaks[1] < peaks[0] + 60, peaks  # MiB
