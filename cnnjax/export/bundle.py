"""Writes the files of an export, reads each back, and compares it with the live network."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from safetensors.numpy import load_file, save

from cnnjax.data.folders import staging
from cnnjax.data.tta import TTA
from cnnjax.errors import UserError, check, check_name
from cnnjax.export.card import Checked, Live, model_card, public_config, weights_license
from cnnjax.export.onnx import is_installed, read_onnx, to_onnx, widen, without_pools
from cnnjax.export.predictor import PredictFn, any_batch, make_predictor, read_stablehlo, to_stablehlo
from cnnjax.files import check_local, is_key, raw_keys, tree_sha256, write_file, write_json, write_sums
from cnnjax.process.console import track
from cnnjax.runs.inference import batch_size_of
from cnnjax.runs.run import Run
from cnnjax.state import TrainState, eval_params

FORMATS = {"safetensors": "model.safetensors", "stablehlo": "predictor.stablehlo", "onnx": "model.onnx"}
NUM_IMAGES = 1000

# The largest accepted differences of probabilities. Different kernels add the terms of a sum in different orders, which
# changes float32 in its last digits. A bfloat16 value, or a product on an accelerator, then rounds to its neighbor, at
# a relative distance of 2**-8; over 16 layers, independent errors add up to four times as much. The difference of two
# logits of 8 moves by 2**-3, and a probability by at most a quarter of that. Without any rounding, all values differ,
# not only those near the middle between their neighbors: again four times as much.
FLOAT32, ROUNDED, NOT_ROUNDED = 1e-4, 2.0**-5, 2.0**-3


class ExportError(UserError):
    """A file that was read back does not predict what the network predicts."""


def export_run(
    run: Run,
    folder: str | os.PathLike[str],
    *,
    formats: Iterable[str] | None = None,
    tta: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = print,
) -> list[Checked]:
    """Exports the network of a finished run, and compares each file with it on up to 1,000 test images.

    The folder gets the files of `formats`, labels.json, a model card (README.md) and SHA256SUMS: all of them, or none
    if a file differs or cannot be written.

    Example:
      >>> export_run(load_run("runs/mnist_mlp-seed0"), "exported")

    Args:
      run: the run.
      folder: absent or empty.
      formats: "safetensors" (parameters and statistics), "stablehlo" (the predictor for JAX on cpu, cuda and tpu) and
        "onnx" (the predictor in float32); None: all, except "onnx" if it is not installed or cannot express the
        network.
      tta: the test-time augmentation of the predictors: "none", "flip" or "flip_translate"; None: that of the run. For
        "uncertain" this is "flip_translate": the prediction for an image must not depend on others.
      data_dir: the tfds directory; tfds's default if None.
      say: receives a line per file.

    Returns:
      The comparisons.

    Raises:
      ExportError: a file predicts something else than the network.
      UserError: the run is not finished, its data are missing, `folder` is not empty, or a format is impossible.
    """
    check("run", "a Run, such as `load_run(run_dir)`", isinstance(run, Run), type(run).__name__)
    folder = Path(os.path.expanduser(folder))
    check_local("folder", folder)
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise _not_empty(folder)
    names = (formats,) if isinstance(formats, str) else tuple(FORMATS if formats is None else formats)
    check("formats", "at least one format", bool(names), "none")
    for name in names:
        check_name("formats", name, FORMATS)
    if "onnx" in names and not is_installed():
        install = "Install them: pip install 'cnnjax[onnx]'"
        if formats is not None:
            raise UserError(f"`formats` may contain onnx only if jax2onnx and onnxruntime are installed. {install}")
        names = tuple(name for name in names if name != "onnx")
        say(f"{FORMATS['onnx']} is not written, because jax2onnx and onnxruntime are not installed. {install}")
    run.finished_result()
    tta = _tta_of(run, tta, say)
    examples = run.load_data("test", data_dir=data_dir)
    # Evenly spaced, because the images may be in the order of their classes.
    index = np.linspace(0, len(examples.image) - 1, min(len(examples.image), NUM_IMAGES)).round().astype(int)
    images, label = examples.image[index], examples.label[index]
    live, checks = Live(tta, images, label, run.predict(images, tta=tta)), []
    target = folder.resolve()
    with staging(target.name, target.parent, locked=False) as stage:
        new = stage / target.name
        new.mkdir()
        for checked in _write_files(run, live, new, names, say, must=formats is not None):
            say(str(checked))
            if not checked.difference <= checked.tolerance:  # It may be nan.
                raise ExportError(
                    f"Nothing was exported: {checked.file} must predict what the network predicts, to within "
                    f"{checked.tolerance:.1e}, got a difference of {checked.difference:.1e} from {checked.reference}."
                )
            checks.append(checked)
        write_json(new / "labels.json", list(run.facts.class_names))
        files = [path.name for path in new.iterdir()]
        write_file(new / "README.md", model_card(run, files, checks, live))
        write_sums(new, [*files, "README.md"])
        try:
            new.rename(target)
        except OSError:
            if not os.path.lexists(target):
                raise
            raise _not_empty(folder) from None  # By now.
    return checks


def _not_empty(folder: Path) -> UserError:
    got = "which is not empty" if folder.is_dir() else "a link to nothing" if folder.is_symlink() else "a file"
    return UserError(f"`folder` must be a new or empty folder, got {folder}, {got}. Choose another one.")


def _tta_of(run: Run, tta: str | None, say: Callable[[str], None]) -> str:
    if tta is None and run.config.tta == "uncertain":
        say("The test score of the run is with tta uncertain; the export uses flip_translate, for every image.")
        return "flip_translate"
    tta = run.config.tta if tta is None else tta
    check_name("tta", tta, [name for name in TTA if name != "uncertain"])
    return tta


def _write_files(
    run: Run, live: Live, folder: Path, names: Sequence[str], say: Callable[[str], None], *, must: bool
) -> Iterator[Checked]:
    """Writes the files one by one, and yields the comparison of each with the network.

    Args:
      must: whether ONNX is an error, not a line for `say`, if it is impossible.
    """
    image, metadata, predict = any_batch(run), _metadata(run, live.tta), make_predictor(run, live.tta)
    wide, is_narrow = widen(predict, image)
    exact = FLOAT32 if jax.default_backend() == "cpu" else ROUNDED
    expected = live.probabilities
    if "safetensors" in names:
        path = folder / FORMATS["safetensors"]
        write_file(path, _tensors(run, metadata))
        restored = _with_tensors(run, path)
        if tree_sha256(_variables(restored)) != tree_sha256(_variables(run)):
            raise ExportError(f"Nothing was exported: {path.name} must hold the arrays of the network, got others.")
        yield _compare(path, "the network", 0.0, restored.predict(live.image, tta=live.tta), expected)
    if "stablehlo" in names:
        path = folder / FORMATS["stablehlo"]
        write_file(path, to_stablehlo(without_pools(predict, image) if is_narrow else predict, image))
        predicted = _in_batches(read_stablehlo(path.read_bytes()), live.image, path.name)
        yield _compare(path, "the network", ROUNDED if is_narrow else exact, predicted, expected)
    if "onnx" in names:
        path = folder / FORMATS["onnx"]
        try:
            write_file(path, to_onnx(wide, image, metadata))
            predicted = _in_batches(read_onnx(path.read_bytes()), live.image, path.name)
        except UserError as error:
            if must:
                raise
            path.unlink(missing_ok=True)
            return say(f"{path.name} is not written. {error}")
        if is_narrow:
            in_jax = read_stablehlo(to_stablehlo(wide, image, platforms=None))
            in_float32 = _in_batches(in_jax, live.image, "the network in float32")
            yield _compare(path, "the network in float32", exact, predicted, in_float32)
        yield _compare(path, "the network", NOT_ROUNDED if is_narrow else exact, predicted, expected)


def _compare(
    path: Path, reference: str, tolerance: float, found: Float[np.ndarray, "N K"], expected: Float[np.ndarray, "N K"]
) -> Checked:
    difference, changed = float(np.abs(found - expected).max()), int((found.argmax(1) != expected.argmax(1)).sum())
    return Checked(path.name, reference, tolerance, difference, changed, len(expected))


def _in_batches(predict: PredictFn, images: UInt8[np.ndarray, "N H W C"], name: str) -> Float[np.ndarray, "N K"]:
    size = batch_size_of(images.shape[1:])
    starts = range(0, len(images), size)
    parts = [np.asarray(predict(images[i : i + size])) for i in track(starts, f"checking {name}", total=len(starts))]
    return np.concatenate(parts)


def _metadata(run: Run, tta: str) -> dict[str, str]:
    """Returns what describes the network and its images, as strings: JSON, except for single words."""
    facts, config = run.facts, public_config(run)
    values = {
        "architecture": type(run.config.model).__name__,
        "model": config["model"],
        "class_names": facts.class_names,
        "image_shape": facts.image_shape,
        "mean": facts.mean,
        "std": facts.std,
        "resize": facts.resize,
        "interpolation": facts.interpolation,
        "tta": tta,
        "dataset": config["dataset"],
        "cnnjax": version("cnnjax"),
        "params_sha256": tree_sha256(eval_params(run.state)),  # As in result.json, except for averages.
        "weights_sha256": facts.weights_sha256,
        "weights_license": weights_license(run),
    }
    known = {name: value for name, value in values.items() if value is not None}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in known.items()}


# --- safetensors ----------------------------------------------------------------------------------------------------


def _variables(run: Run) -> dict[str, Any]:
    return {"params": eval_params(run.state), **run.state.model_state}


def _tensors(run: Run, metadata: dict[str, str]) -> bytes:
    """Returns the variables of a network as a safetensors file, each under its path, such as "params/Dense_0/kernel".

    Raises:
      UserError: two paths have the same name, or a dtype is unknown to safetensors.
    """
    named = jax.tree.leaves_with_path(jax.device_get(raw_keys(_variables(run))))
    # safetensors writes the memory of an array, so it must be in C's order.
    tensors = {_name(path): np.asarray(leaf, order="C") for path, leaf in named}
    if len(tensors) < len(named):
        raise UserError("`formats` must be without safetensors for a network in which two arrays have the same path.")
    try:
        return save(tensors, metadata)
    except Exception as error:  # Raised by its Rust part.
        raise UserError(f"`formats` must be without safetensors for this network, got {error}.") from error


def _with_tensors(run: Run, path: Path) -> Run:
    """Returns the run with the variables of a safetensors file."""
    tensors, variables = load_file(path), _variables(run)

    def read(path: Any, leaf: Any) -> Any:
        found = jax.numpy.asarray(tensors[_name(path)])
        return jax.random.wrap_key_data(found, impl=jax.random.key_impl(leaf)) if is_key(leaf) else found

    variables = jax.tree.map_with_path(read, variables)
    state = TrainState(run.state.step, variables.pop("params"), variables, ())
    return replace(run, step=None, _trained=(state, [], []))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
