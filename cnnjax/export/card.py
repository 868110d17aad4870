"""The model card: a README.md with the front matter of the Hugging Face hub."""

import json
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer, UInt8

from cnnjax.class_scores import calibrate, is_uneven, top_confusions
from cnnjax.data.image_files import MODES
from cnnjax.data.weights import weights_of
from cnnjax.process.tables import accuracies, printable, scores_suffix
from cnnjax.runs.codec import encode
from cnnjax.runs.run import Run
from cnnjax.runs.statistics import wilson_interval

FEW = 100  # Test images of a class: the 95% interval of its recall has a width of about 20 points or more.


class Checked(NamedTuple):
    """The comparison of a file that was read back with the network.

    Attributes:
      file: its name.
      reference: what it was compared with, in words.
      tolerance: the largest difference of a probability that is accepted.
      difference: the largest difference that was found.
      num_changed: the number of images whose most probable class differs.
      num_images: the number of images.
    """

    file: str
    reference: str
    tolerance: float
    difference: float
    num_changed: int
    num_images: int

    def __str__(self) -> str:
        return (
            f"{self.file}: largest difference {self.difference:.1e} from {self.reference} (tolerance "
            f"{self.tolerance:.1e}), another class for {self.num_changed:,} of {self.num_images:,} images"
        )


class Live(NamedTuple):
    """The predictions of the network for test images, with the test-time augmentation `tta`."""

    tta: str
    image: UInt8[np.ndarray, "N H W C"]
    label: Integer[np.ndarray, " N"]
    probabilities: Float[np.ndarray, "N K"]


def public_config(run: Run) -> dict[str, Any]:
    """Returns the configuration as JSON, without the paths of this machine."""
    encoded: dict[str, Any] = {**encode(run.config), "dataset": run.config.dataset_word}
    weights = weights_of(run.config.model)
    if weights is not None and not weights.startswith("hf:"):
        encoded["model"] = {**encoded["model"], "weights": PurePath(weights).name}
    return encoded


def weights_license(run: Run) -> str | None:
    """Returns the license of the pretrained weights of a run in words, or None if there are none or it is unknown."""
    model = run.config.model
    published = getattr(model, "imagenet", None) if weights_of(model) == "imagenet" else None
    return published.license if published is not None else None


def model_card(run: Run, files: Sequence[str], checks: Sequence[Checked], live: Live) -> str:
    """Returns the card in Markdown.

    Args:
      run: finished.
      files: the names of the exported files.
      checks: of these files.
      live: what they were compared with.
    """
    sections = {
        "Use": _use(run, files, live.tta),
        "Data": _data(run),
        "Training": _training(run),
        "Results": _results(run, live),
        "Limits": _limits(run),
        "Verification": _verification(checks),
        "License": _license(run),
    }
    title = f"# {type(run.config.model).__name__} on {run.config.dataset_word}"
    body = "\n\n".join(f"## {name}\n\n" + "\n".join(lines) for name, lines in sections.items())
    return "\n".join(_front_matter(run)) + f"\n\n{title}\n\n{body}\n"


def _front_matter(run: Run) -> Iterator[str]:
    """Yields YAML, in which each value is JSON. Source: huggingface.co/docs/hub/model-cards."""
    result, dataset = run.finished_result(), run.config.dataset_word
    metrics = {"accuracy": result["test_accuracy"], "balanced_accuracy": result["test_balanced_accuracy"]}
    metrics |= {name: value for name, value in result.get("test_metrics", {}).items() if math.isfinite(value)}
    measured = [{"type": name, "value": round(value, 4)} for name, value in metrics.items()]
    task, name = {"type": "image-classification"}, type(run.config.model).__name__
    scores = {"task": task, "dataset": {"name": dataset, "type": dataset, "split": "test"}, "metrics": measured}
    content: dict[str, Any] = {"library_name": "cnnjax", "pipeline_tag": "image-classification"}
    content |= {"tags": ["jax", "flax", "cnnjax"], "metrics": ["accuracy"]}
    if (license_name := weights_license(run)) is not None:
        content["license"] = license_name.lower()
    content["model-index"] = [{"name": name, "results": [scores]}]
    yield from ("---", *(f"{key}: {json.dumps(value)}" for key, value in content.items()), "---")


def _use(run: Run, files: Sequence[str], tta: str) -> Iterator[str]:
    (height, width, channels), k = run.facts.image_shape, len(run.facts.class_names)
    views = "" if tta == "none" else f" and averages the views of the test-time augmentation {tta!r}"
    yield _text(
        f"A predictor takes images as uint8 [B {height} {width} {channels}], with values from 0 to 255 and any batch "
        f"size B, and returns the probabilities of the {k} classes of labels.json, float32 [B {k}]. It standardizes "
        f"the images itself{views}. From an image file without transparency:"
    )
    yield from _code(_image_lines(run, f"(1, {height}, {width}, {channels})"))
    if "predictor.stablehlo" in files:
        yield "With JAX on a CPU, an NVIDIA GPU or a TPU (`pip install jax flatbuffers pillow`):"
        yield from _code(
            [
                "from pathlib import Path",
                "import jax",
                "from jax import export",
                'predictor = export.deserialize(bytearray(Path("predictor.stablehlo").read_bytes()))',
                "probabilities = jax.jit(predictor.call)(images)",
            ]
        )
        yield _text(
            f"It was written by jax {version('jax')}. JAX guarantees that versions released within six months can read "
            "it; later versions may not. The other files have no such limit."
        )
        yield ""
    if "model.onnx" in files:
        yield "With ONNX Runtime, in float32 (`pip install onnxruntime pillow`):"
        yield from _code(
            [
                "import onnxruntime",
                'session = onnxruntime.InferenceSession("model.onnx")',
                '(probabilities,) = session.run(["probabilities"], {"image": images})',
            ]
        )
    if {"predictor.stablehlo", "model.onnx"} & {*files}:
        yield "The most probable class of the image, and its probability:"
        yield from _code(
            [
                "import json",
                'labels = json.load(open("labels.json", encoding="utf-8"))',
                "print(labels[int(probabilities[0].argmax())], float(probabilities[0].max()))",
            ]
        )
    if "model.safetensors" in files:
        yield _text(
            "The parameters and statistics, by their paths in the variables of the network, and as metadata the "
            "architecture and the preprocessing (`pip install safetensors`):"
        )
        yield from _code(
            [
                "from safetensors import safe_open",
                'with safe_open("model.safetensors", "numpy") as file:',
                "    metadata = file.metadata()",
                "    tensors = {name: file.get_tensor(name) for name in file.keys()}",
            ]
        )
    yield "`sha256sum -c SHA256SUMS` checks the files."


def _image_lines(run: Run, shape: str) -> list[str]:
    height, width, channels = run.facts.image_shape
    if channels not in MODES:
        return ["import numpy as np", f"images = np.zeros({shape}, np.uint8)  # Your pixels."]
    size, method = f"({width}, {height})", f"Image.Resampling.{run.facts.interpolation.upper()}"
    resized = {"crop": "ImageOps.fit(image, ", "pad": "ImageOps.pad(image, ", "stretch": "image.resize("}
    return [
        "import numpy as np",
        "from PIL import Image, ImageOps",
        'image = ImageOps.exif_transpose(Image.open("image.png"))',
        'if image.mode.startswith("I;16"):  # Pillow would clip 16-bit gray.',
        "    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))",
        f'image = image.convert("{MODES[channels]}")',
        f"image = {resized[run.facts.resize]}{size}, {method})",
        f"images = np.asarray(image).reshape{shape}",
    ]


def _data(run: Run) -> Iterator[str]:
    facts, (height, width, channels) = run.facts, run.facts.image_shape
    counts = {
        "training": facts.num_train_examples,
        "validation": facts.num_validation_examples,
        "test": run.finished_result()["num_test_examples"],
    }
    parts = [f"{count:,} {name} images" for name, count in counts.items() if count]
    color = {1: "gray", 3: "color", 4: "color with alpha"}.get(channels, f"{channels} channels")
    yield _text(
        f"`{run.config.dataset_word}`, version {facts.version}: {height}×{width} pixels, {color}; "
        f"{', '.join(parts)}. SHA-256 of the pixels and labels:"
    )
    yield ""
    yield from (f"- {split}: `{sha256}`" for split, sha256 in facts.sha256.items())


def _training(run: Run) -> Iterator[str]:
    result, config = run.finished_result(), public_config(run)
    start = ""
    if weights_of(run.config.model) is not None:
        start = (
            f" Training started from the pretrained weights `{config['model']['weights']}`, SHA-256 "
            f"`{run.facts.weights_sha256}`."
        )
    num_epochs = result["stopped_epoch"] or result["num_epochs"]
    yield _text(
        f"{result['num_params']:,} parameters, trained for {num_epochs} epoch{'s' if num_epochs > 1 else ''} in "
        f"{result['training_seconds']:.0f} s on {result['device']}, with cnnjax {version('cnnjax')}. The exported "
        f"parameters are from epoch {result['best_epoch']}.{start} The configuration:"
    )
    yield from ("", "```json", json.dumps(config, indent=2, ensure_ascii=False), "```")


def _results(run: Run, live: Live) -> Iterator[str]:
    result, names = run.finished_result(), ("precision", "recall", "f1")
    low, high = wilson_interval(result["test_accuracy"], result["num_test_examples"])
    scores = accuracies(result["test_accuracy"], result["test_balanced_accuracy"], True)
    own = _cell(scores_suffix(result.get("test_metrics", {})))
    yield _text(
        f"Test {scores}, loss {result['test_loss']:z.4f}{own}, {_with_tta(run.config.tta)}. The 95% "
        f"interval of the accuracy, from the number of test images, is {low:.2%} to {high:.2%}."
    )
    yield from ("", "| class | test images | precision | recall | F1 |", "| --- | ---: | ---: | ---: | ---: |")
    for row in result["classes"]:
        shares = ("–" if row[name] is None else f"{row[name]:.2%}" for name in names)
        yield f"| {_cell(row['name'])} | {row['count']:,} | {' | '.join(shares)} |"
    calibration = calibrate(live.probabilities.max(1), live.probabilities.argmax(1) == live.label)
    yield ""
    yield _text(
        f"The exported predictors, {_with_tta(live.tta)}, on {len(live.label):,} of the test "
        f"images: accuracy {calibration.mean_accuracy:.2%}, mean probability of the predicted class "
        f"{calibration.mean_confidence:.2%}, expected calibration error {calibration.error:.2%} (that of a "
        f"perfectly calibrated predictor would be about {calibration.by_chance:.2%} on this many images)."
    )


def _limits(run: Run) -> Iterator[str]:
    result, names = run.finished_result(), run.facts.class_names
    counts, (height, width, _) = [row["count"] for row in result["classes"]], run.facts.image_shape
    limits = [
        f"The network always names one of its {len(names)} classes, even for an image of something else. A high "
        "probability does not show that the image belongs to a class.",
        "The scores hold for images from the source of the test set. Images from another camera, another place or "
        "another preparation were not tested.",
        f"It sees {height}×{width} pixels. It cannot know what such a small image does not show.",
    ]
    if is_uneven(counts):
        limits.append("The classes are uneven: the accuracy says little about the rare ones, their recall does.")
    if few := [_cell(row["name"]) for row in result["classes"] if row["count"] < FEW]:
        more = f" and {len(few) - 10} more" if len(few) > 10 else ""
        limits.append(
            f"The scores of classes with fewer than {FEW} test images are uncertain: {', '.join(few[:10])}{more}."
        )
    for label, predicted, number in top_confusions(result["confusion_matrix"] or [[0]], 3):
        classified = f"{'is' if number == 1 else 'are'} classified as {_cell(names[predicted])}"
        limits.append(f"{number:,} of {counts[label]:,} test images of {_cell(names[label])} {classified}.")
    for limit in limits:
        yield _text(f"- {limit}", "  ")


def _verification(checks: Iterable[Checked]) -> Iterator[str]:
    yield "Each file was read back and compared with the network, on real test images:"
    yield ""
    yield "| file | compared with | images | largest difference of a probability | tolerance | other class |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for check in checks:
        yield (
            f"| {check.file} | {check.reference} | {check.num_images:,} | {check.difference:.1e} | "
            f"{check.tolerance:.1e} | {check.num_changed:,} |"
        )


def _license(run: Run) -> Iterator[str]:
    if (license_name := weights_license(run)) is not None:
        yield f"The pretrained weights that training started from are under {license_name}."
    elif weights_of(run.config.model) is not None:
        yield "The license of the pretrained weights that training started from is not recorded: look it up."
    else:
        yield _text(
            "Not stated. Choose a license before you publish this network, check the terms of the data, and add "
            "`license:` to the front matter."
        )


def _with_tta(tta: str) -> str:
    return "without test-time augmentation" if tta == "none" else f"with the test-time augmentation {tta!r}"


def _text(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _code(lines: Sequence[str]) -> Iterator[str]:
    yield from ("", "```python", *lines, "```", "")


def _cell(name: str) -> str:
    """Returns a name as text in Markdown, without entities and formulas."""
    return re.sub(r"([\\`*_{}\[\]<>|~&$])", r"\\\1", printable(name))
