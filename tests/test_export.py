import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.numpy import save

from cnnjax import (
    CNN,
    Config,
    EfficientNetLite0,
    Run,
    SpeedNet,
    UserError,
    init_state,
)
from cnnjax.cli.experiment import load_experiment
from cnnjax.cli.main import main
from cnnjax.data.image_files import read_image
from cnnjax.export import bundle
from cnnjax.export.bundle import ExportError, export_run
from cnnjax.export.card import _cell
from cnnjax.export.onnx import widen, without_pools
from cnnjax.export.predictor import any_batch, make_predictor, read_stablehlo, to_stablehlo
from cnnjax.files import check_sums, tree_sha256
from cnnjax.optim.transforms import AverageState
from cnnjax.runs.schema import DataFacts
from cnnjax.state import TrainState

PROGRAMS = Path(__file__).parent / "programs"
RESEARCH = PROGRAMS / "research.py"  # A user's Linen module, data and optimizer; tta is "flip".
CONFIG = load_experiment(str(RESEARCH)).config
IMAGES = CONFIG.dataset[2]  # [37 6 5 3]


@pytest.fixture(scope="module")
def run(research_run):
    return research_run


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "new" / "folder"
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "is_installed", lambda: False)
        checks = export_run(run, folder, say=lines.append)
    assert lines[0].startswith("model.onnx is not written, because jax2onnx and onnxruntime are not installed.")
    assert lines[1:] == [str(checked) for checked in checks]
    return folder, checks


def load_card(folder, tmp_path, python=sys.executable, **environment):
    """Returns what the code of a model card computes in a process without cnnjax, for one image and for three."""
    Image.fromarray(IMAGES[0]).save(folder / "image.png")
    np.save(folder / "images.npy", IMAGES[:3])
    command = [python, str(PROGRAMS / "load_card.py"), str(tmp_path / "out.npz")]
    variables = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        command,
        check=False,
        cwd=folder,
        env={**variables, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )
    for name in ("image.png", "images.npy"):
        (folder / name).unlink()
    assert done.returncode == 0, done.stderr
    return dict(np.load(tmp_path / "out.npz"))


def predict_by_numpy(tensors, metadata, images):
    """Returns the probabilities of the network of research.py, computed from the safetensors file alone."""
    mean, std = (np.array(json.loads(metadata[name])) for name in ("mean", "std"))

    def logits(image):
        x = ((image - mean) / std).reshape(len(image), -1)
        x = x @ tensors["params/Dense_0/kernel"] + tensors["params/Dense_0/bias"]
        mean_, var = (tensors[f"batch_stats/BatchNorm_0/{name}"] for name in ("mean", "var"))
        x = (x - mean_) / np.sqrt(var + 1e-5)
        x = x * tensors["params/BatchNorm_0/scale"] + tensors["params/BatchNorm_0/bias"]
        return np.maximum(x, 0) @ tensors["params/Dense_1/kernel"] + tensors["params/Dense_1/bias"]

    z = logits(images) if metadata["tta"] == "none" else (logits(images) + logits(images[:, :, ::-1])) / 2
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


def custom_calls(content):
    module = str(jax.export.deserialize(bytearray(content)).mlir_module())
    return {*re.findall(r"custom_call @\"?([^\s\"(]+)", module)}


# --- Files that other programs load ---------------------------------------------------------------------------------


def test_the_card_loads_each_file_without_cnnjax_on_another_processor(exported, run, tmp_path):
    folder, checks = exported
    found = load_card(folder, tmp_path, XLA_FLAGS="--xla_cpu_max_isa=AVX2")
    tensors = {name.removeprefix("tensors/"): value for name, value in found.items() if name.startswith("tensors/")}
    metadata = dict(found["metadata"].tolist())
    expected = predict_by_numpy(tensors, metadata, IMAGES[:3])
    np.testing.assert_allclose(found["stablehlo"], expected[:1], atol=1e-6)
    np.testing.assert_allclose(found["stablehlo_batch"], expected, atol=1e-6)
    np.testing.assert_allclose(run.predict(IMAGES[:3], tta="flip"), expected, atol=1e-6)
    assert (metadata["architecture"], json.loads(metadata["image_shape"])) == ("Net", [6, 5, 3])
    assert json.loads(metadata["class_names"]) == json.loads((folder / "labels.json").read_text())
    assert metadata["params_sha256"] == run.result["sha256"]["best_params"]
    assert [(c.file, c.tolerance, c.num_images) for c in checks] == [
        ("model.safetensors", 0.0, 37),
        ("predictor.stablehlo", 1e-4, 37),
    ]
    assert checks[0].difference == 0 and 0 < checks[1].difference < 1e-6 and checks[1].num_changed == 0


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF"])
def test_the_card_reads_16_bit_gray_as_predict_does(kind, exported, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 2**16, (9, 7), np.uint16)
    dtype = ">u2" if kind == "big-endian TIFF" else "<u2"
    Image.fromarray(pixels.astype(dtype)).save("image.png", kind.split()[-1])
    with Image.open("image.png") as image:
        assert image.mode == ("I;16B" if dtype == ">u2" else "I;16")
    names = {}
    exec(re.findall(r"```python\n(.*?)```", (exported[0] / "README.md").read_text(), re.DOTALL)[0], names)
    facts = run.facts
    expected = read_image(Path("image.png"), facts.image_shape, facts.resize, facts.interpolation)
    np.testing.assert_array_equal(names["images"], expected[None])


def test_names_of_classes_are_text_in_the_card():
    name = "R&D &lt; <b> *a*_b_ `c` [d](e) \\g $x$"
    assert unescape(MarkdownIt().renderInline(_cell(name))) == name
    assert _cell("$x$ | ~a~") == r"\$x\$ \| \~a\~"  # Of extensions.


def test_the_digest_is_that_of_the_exported_average(run):
    average = jax.tree.map(lambda p: p + 1, run.state.params)
    state = run.state._replace(opt_state=AverageState(run.state.step, average, ()))
    averaged = replace(run, step=None, _trained=(state, [], []))
    assert bundle._metadata(averaged, "none")["params_sha256"] == tree_sha256(average)


def test_the_folder_has_checksums_and_a_card_with_the_scores_and_no_path(exported, run):
    folder, _ = exported
    names = ["README.md", "labels.json", "model.safetensors", "predictor.stablehlo"]
    assert check_sums(folder) == dict.fromkeys(names, "ok")
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]  # The staging folder is gone.
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["pipeline_tag"], front["library_name"], "license" in front) == (
        "image-classification",
        "cnnjax",
        False,
    )
    (scores,) = front["model-index"][0]["results"]
    assert scores["metrics"][0] == {"type": "accuracy", "value": round(run.result["test_accuracy"], 4)}
    row = run.result["classes"][2]
    shares = " | ".join(f"{row[name]:.2%}" for name in ("precision", "recall", "f1"))
    assert f"\n| 2 | {row['count']} | {shares} |\n" in card
    parts = f"{run.facts.num_train_examples} training images, {run.facts.num_validation_examples} validation images"
    assert f" pixels, color; {parts}, 37 test images. SHA-256 of" in " ".join(card.split())
    here = str(Path(__file__).parents[1]).encode()
    assert not [path.name for path in folder.iterdir() if here in path.read_bytes()]


@pytest.fixture(scope="module")
def python():
    """Returns a Python with another version of jax."""
    python = os.environ.get("CNNJAX_OTHER_PYTHON")
    if python is None:
        pytest.skip("CNNJAX_OTHER_PYTHON names no Python with another version of jax")
    version = subprocess.run(
        [python, "-c", "import jax; print(jax.__version__)"], capture_output=True, text=True, check=True
    )
    assert version.stdout.strip() not in ("", jax.__version__)
    return python


@pytest.mark.slow
def test_another_version_of_jax_reads_the_file(exported, run, tmp_path, python):
    found = load_card(exported[0], tmp_path, python)
    np.testing.assert_allclose(found["stablehlo_batch"], run.predict(IMAGES[:3], tta="flip"), atol=1e-6)


@pytest.mark.slow
def test_another_version_of_jax_computes_the_same_in_bfloat16(tmp_path, python):
    """jaxlib 0.12.0 computes nan for the max-pools of such a network."""
    run = untrained(CNN(dtype="bfloat16"))
    image = np.random.default_rng(0).integers(0, 256, (64, *run.facts.image_shape), np.uint8)
    predict = without_pools(make_predictor(run, "none"), any_batch(run))
    (tmp_path / "predictor.stablehlo").write_bytes(to_stablehlo(predict, any_batch(run)))
    np.save(tmp_path / "images.npy", image)
    program = """
import jax, numpy as np
from jax import export
predictor = export.deserialize(bytearray(open("predictor.stablehlo", "rb").read()))
np.save("out.npy", jax.jit(predictor.call)(np.load("images.npy")))
"""
    subprocess.run([python, "-c", program], cwd=tmp_path, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), run.predict(image), atol=1e-2)


# --- Programs -------------------------------------------------------------------------------------------------------


class Pools(nn.Module):
    """Pads and pools as users do."""

    @nn.compact
    def __call__(self, image):
        x = jnp.pad(nn.Conv(4, (3, 3))(image), ((0, 0), (1, 0), (0, 2), (0, 0)), constant_values=0.5)
        x = nn.max_pool(x, (3, 2), (2, 1), "SAME")[:, 1:]
        return nn.Dense(3)(nn.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1))


def untrained(model, shape=(8, 9, 3), zeros=False):
    """Returns a run of a network with its initial arrays, or with zeros."""
    facts = DataFacts(
        shape, ("a", "b", "c"), {"test": "0" * 64}, "1", "", (90.0,) * 3, (70.0,) * 3, "crop", "lanczos", None
    )
    config = Config(model=model).with_num_classes(3)

    def init(key):
        return init_state(key, jnp.zeros((1, *shape)), model=config.model, tx=optax.identity())

    if zeros:
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(init, jax.random.key(0)))
    else:
        state = init(jax.random.key(0))
    return Run(Path("run"), config, facts, None, _trained=(state, [], []))


def random_images(number, shape=(8, 9, 3)):
    return np.random.default_rng(0).integers(0, 256, (number, *shape), np.uint8)


@pytest.mark.parametrize(
    "model",
    [CNN(dtype="float16"), EfficientNetLite0(dtype="bfloat16")],
    ids=lambda model: type(model).__name__,
)
def test_programs_of_our_networks_call_nothing_that_belongs_to_one_jaxlib(model):
    run = untrained(model, (32, 32, 3), zeros=True)
    content = to_stablehlo(make_predictor(run, "flip_translate"), any_batch(run))
    assert custom_calls(content) <= {"shape_assertion"}  # JAX evaluates it when it reads the program.
    assert jax.export.deserialize(bytearray(content)).platforms == ("cpu", "cuda", "tpu")


def test_a_call_of_one_jaxlib_is_refused(run):
    def predict(image):
        return jax.ffi.ffi_call("of_one_jaxlib", jax.ShapeDtypeStruct((1, 3), jnp.float32))(image)

    with pytest.raises(UserError, match=r"`formats` must be without stablehlo .*of_one_jaxlib"):
        to_stablehlo(predict, jax.ShapeDtypeStruct((1, 8, 9, 3), jnp.uint8))


@pytest.mark.parametrize("name", ["plain_network", "nnx_network", "pools"])
def test_networks_of_users_accept_any_batch(name, quick_compilation):
    """The first two use `len(image)`, which no batch of unknown size has."""
    model = Pools() if name == "pools" else load_experiment(str(PROGRAMS / f"{name}.py")).config.model
    run, images = untrained(model), random_images(5)
    predict, image = make_predictor(run, "flip"), any_batch(run)
    wide, is_narrow = widen(predict, image)
    expected = run.predict(images, tta="flip")
    for program, size in ((predict, 1), (predict, 5), (wide, 5)):
        predictor = read_stablehlo(to_stablehlo(program, image, platforms=None))
        np.testing.assert_allclose(predictor(images[:size]), expected[:size], atol=1e-6)
    assert not is_narrow


def test_a_bfloat16_network_is_widened_to_float32(quick_compilation):
    run, images = untrained(CNN(dtype="bfloat16")), random_images(2)
    of_any_size = any_batch(run)
    wide, is_narrow = widen(make_predictor(run, "none"), of_any_size)
    (state, *_), statistics = run._trained, run.facts.standardization
    image = (images - statistics.mean) / statistics.std
    model = CNN(num_classes=3, plain=True)
    expected = jax.nn.softmax(model.apply({"params": state.params}, jnp.asarray(image, jnp.float32), train=False))
    found = read_stablehlo(to_stablehlo(wide, of_any_size, platforms=None))(images)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert is_narrow and np.abs(run.predict(images) - expected).max() > 1e-4


# --- ONNX -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_onnx_runtime_computes_what_the_network_does(run, tmp_path):
    pytest.importorskip("jax2onnx")
    checks = export_run(run, tmp_path / "new")
    assert [c.file for c in checks] == ["model.safetensors", "predictor.stablehlo", "model.onnx"]
    found = load_card(tmp_path / "new", tmp_path)
    expected = run.predict(IMAGES[:3], tta="flip")
    np.testing.assert_allclose(found["onnx"], expected[:1], atol=1e-6)
    np.testing.assert_allclose(found["onnx_batch"], expected, atol=1e-6)
    here = str(Path(__file__).parents[1]).encode()
    assert here not in (tmp_path / "new" / "model.onnx").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [CNN(), SpeedNet(widths=(8, 8, 8), dtype="bfloat16"), EfficientNetLite0(), Pools()],
    ids=lambda model: type(model).__name__,
)
def test_networks_as_onnx(model, tmp_path):
    pytest.importorskip("jax2onnx")
    from cnnjax.export.onnx import read_onnx, to_onnx

    shape = (24, 20, 3)
    run, images = untrained(model, shape), random_images(3, shape)
    if isinstance(model, SpeedNet):
        state = run._trained[0]
        image = run.standardize(random_images(40, shape))
        variables = model.init_from_data({"params": state.params, **state.model_state}, image)
        state = TrainState(state.step, variables.pop("params"), variables, ())
        run = replace(run, _trained=(state, [], []))
    image = any_batch(run)
    wide, is_narrow = widen(make_predictor(run, "flip_translate"), image)
    content = to_onnx(wide, image, {"class_names": "[]"})
    predict = read_onnx(content)
    for size in (1, 3):
        expected = run.predict(images[:size], tta="flip_translate")
        np.testing.assert_allclose(predict(images[:size]), expected, atol=0.02 if is_narrow else 1e-5)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(run.state))
    assert len(content) < 1.5 * num_bytes + 500_000  # Six views share the parameters.


# --- Errors ---------------------------------------------------------------------------------------------------------


def test_a_file_that_predicts_something_else_is_an_error_and_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def of_dark_images(predict, image):
        return to_stablehlo(lambda image: predict(image // 2), image)

    monkeypatch.setattr(bundle, "to_stablehlo", of_dark_images)
    rule = "Nothing was exported: predictor.stablehlo must predict .* to within 1.0e-04, got a difference of"
    with pytest.raises(ExportError, match=rule):
        export_run(run, tmp_path / "new", formats=["stablehlo"])
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(run.run_dir), str(tmp_path / "new"), "--experiment", str(RESEARCH)])
    assert stopped.value.code == 1
    assert re.search(rule, capsys.readouterr().err)
    monkeypatch.setattr(bundle, "save", lambda tensors, metadata: save({k: v + 1e-7 for k, v in tensors.items()}))
    with pytest.raises(ExportError, match=r"model\.safetensors must hold the arrays of the network, got others"):
        export_run(run, tmp_path / "new", formats="safetensors")
    assert not [*tmp_path.iterdir()]


def test_the_command_prints_the_comparisons(run, tmp_path, capsys):
    (tmp_path / "target").mkdir()
    (tmp_path / "empty").symlink_to(tmp_path / "target")
    options = ["--formats", "safetensors", "--tta", "none", "--experiment", str(RESEARCH)]
    main(["export", str(run.run_dir), str(tmp_path / "empty"), *options])
    first, last = capsys.readouterr().out.splitlines()
    same = "largest difference 0.0e+00 from the network (tolerance 0.0e+00), another class for 0 of 37 images"
    assert first == f"model.safetensors: {same}"
    assert last.startswith(f"The files in {tmp_path / 'empty'} predict what the network predicts.")
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_what_cannot_be_exported_has_a_message(run, tmp_path, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(UserError, match=r"`folder` must be a new or empty folder, got .*used, which is not empty."):
        export_run(run, tmp_path / "used")
    (tmp_path / "used" / "link").symlink_to("nothing")
    with pytest.raises(UserError, match="link, a link to nothing"):
        export_run(run, tmp_path / "used" / "link")
    with pytest.raises(UserError, match=r"`formats` must be a known name, got 'onx'. Did you mean onnx"):
        export_run(run, tmp_path / "new", formats=["onx"])
    with pytest.raises(UserError, match="`tta` must be a known name, got 'uncertain'"):
        export_run(run, tmp_path / "new", tta="uncertain")
    with pytest.raises(UserError, match="must be finished"):
        export_run(replace(run, result=None), tmp_path / "new", formats=["safetensors"])
    monkeypatch.setattr(bundle, "is_installed", lambda: False)
    with pytest.raises(UserError, match=r"`formats` may contain onnx only if .*pip install 'cnnjax\[onnx\]'"):
        export_run(run, tmp_path / "new", formats=["onnx"])
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_a_prediction_never_depends_on_other_images(run, tmp_path):
    facts = replace(run.facts, num_train_examples=None, num_validation_examples=None)  # Of an earlier version.
    uncertain, lines = replace(run, config=replace(run.config, tta="uncertain"), facts=facts), []
    export_run(uncertain, tmp_path / "new", formats=["safetensors"], say=lines.append)
    assert lines[0].endswith("the export uses flip_translate, for every image.")
    card = " ".join((tmp_path / "new" / "README.md").read_text().split())
    assert "The exported predictors, with the test-time augmentation 'flip_translate', on 37 of the test" in card
    assert " pixels, color; 37 test images. SHA-256 of" in card
