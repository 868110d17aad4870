"""The content of the report on one run."""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import flax.linen as nn
import numpy as np
from jaxtyping import Float
from scipy.special import softmax

from cnnjax.class_scores import DIGITS, NUM_BINS, calibrate, is_uneven, top_confusions
from cnnjax.config import word
from cnnjax.data.stored import Examples
from cnnjax.errors import UserError
from cnnjax.files import flatten, show
from cnnjax.process.console import track
from cnnjax.process.tables import show_score
from cnnjax.report import charts, figures, images, words
from cnnjax.report.activations import FeatureMap, feature_maps, first_filters
from cnnjax.report.analysis import Shown, judge_fit, most_confident
from cnnjax.report.commands import command_for, resume_command
from cnnjax.runs.inspection import read_info
from cnnjax.runs.manifest import read_manifest
from cnnjax.runs.records import read_record
from cnnjax.runs.run import Run
from cnnjax.runs.statistics import wilson_interval
from cnnjax.summary import layer_table

CHUNK = 1024  # Images between two steps of the progress bar; a multiple of the batch sizes of `Run.predict`.
NUM_MAPS = 60  # Operations whose maps are shown.
NUM_MISTAKES = 12
PER_CLASS = 5  # Thumbnails of each kind.
NUM_CLASSES = 20  # With thumbnails; of more, those with the lowest recall.
NUM_CONFUSIONS = 10
TABLE_CLASSES = 300
# The entries of the page that a run may lack.
OPTIONAL = ("time", "calibration", "layers", "num_params", "filters", "maps", "pixelated", "over_fitted")
Say = Callable[[str], None]


class Scored(NamedTuple):
    """The test images, and the probabilities of their classes."""

    examples: Examples
    probabilities: Float[np.ndarray, "N K"]


def score(run: Run, data_dir: Path | None) -> Scored:
    """Returns the test images of a run with their probabilities, with the test-time augmentation of the run.

    Raises:
      UserError: the images are gone or changed, or the run has no checkpoint.
    """
    examples = run.load_data(data_dir=data_dir)
    if run.test_logits is not None:
        return Scored(examples, softmax(run.test_logits.astype(np.float32), axis=1))
    starts = range(0, len(examples.label), CHUNK)
    chunks = track(starts, "scoring the test images", len(starts))
    parts = [run.predict(examples.image[i : i + CHUNK], tta=run.config.tta) for i in chunks]
    return Scored(examples, np.concatenate(parts))


def run_content(
    run: Run, data_dir: Path | None, experiment: str | None, warn: Say
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what the page of a run shows, and its charts for files, {name: chart}.

    Args:
      data_dir: the tfds directory; tfds's default if None.
      experiment: see `command_for`.
      warn: receives what the page lacks, one line each.
    """
    manifest, record, info = read_manifest(run.run_dir), read_record(run.run_dir), read_info(run.run_dir)
    content: dict[str, Any] = dict.fromkeys(OPTIONAL) | {
        "title": run.config.run_name,
        "name": run.run_dir.resolve().name,
        "network": word(type(run.config.model)) if isinstance(run.config.model, nn.Module) else "own functions",
        "dataset": run.config.dataset_word,
        "result": run.result,
        "seed": run.config.seed,
        "tta": run.config.tta,
        "notes": [],
        "reproduce": command_for(run, "reproduce", data_dir, experiment) if run.result else None,
        "resume": None if run.result or info.state == "running" else resume_command(run),
        "sessions": [_session(session) for session in manifest["sessions"]],
        "config": _rows(record.config),
        "data": _rows(asdict(record.data)),
        "environment": _rows({k: v for k, v in manifest["sessions"][-1].items() if k != "command"}),
    }
    files: dict[str, Any] = {}

    def lack(line: str) -> None:
        content["notes"].append(line)
        warn(line)

    content |= _training(run, files)
    scored = None
    if run.result is None:
        epochs = f"{len(info.rows)} of {info.config['num_epochs']} epochs"
        content["notes"].append(f"This run is not finished ({info.state}, {epochs}), so it has no test score yet.")
    else:
        content |= _scores(run, files)
        try:
            scored = score(run, data_dir)
        except UserError as error:
            lack(f"The report lacks calibration and example images: {error}")
        else:
            content |= _examples(run, scored, files)
    try:
        content |= _network(run, scored, files)
    except UserError as error:
        lack(f"The report lacks the layers of the network: {error}")
    return content, files


def _session(session: Mapping[str, Any]) -> dict[str, str]:
    commit = session.get("commit") or session.get("package_commit") or "unknown"
    changed = f", with changes ({session['diff']})" if session.get("diff") else ""
    return {
        "command": shlex.join(session["command"]),
        "commit": f"{show(commit)}{changed}",
        "device": session.get("device", ""),
        "started": session["started"],
        "state": session["state"],
    }


def _rows(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns nested values as rows of a table."""
    texts = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in flatten(tree).items()}
    return [(name, "none" if text == "null" else text or "none") for name, text in texts.items()]


def _training(run: Run, files: dict[str, Any]) -> dict[str, Any]:
    """Returns learning curves, times and speed."""
    history = run.history
    if "epoch" not in history:
        return {"curves": [], "fit": [], "seconds": None, "speed": None}
    fit = judge_fit(history, run.facts.num_train_examples, run.facts.num_validation_examples)
    found = figures.learning_curves(history, fit)
    drawn = [figure.draw(380) for figure in found]
    files["learning_curves"] = alt.concat(*drawn, columns=2).resolve_scale(color="independent")
    seconds, speed = history.get("seconds", np.array([np.nan])), history.get("images_per_second", np.array([np.nan]))
    return {
        "curves": found,
        "fit": words.explain_fit(fit, history, run.config),
        "over_fitted": fit.over_fitted,
        "seconds": None if np.isnan(seconds).all() else words.duration(float(np.nanmax(seconds))),
        "speed": None if np.isnan(speed).all() else float(np.nanmean(speed)),
    }


def _scores(run: Run, files: dict[str, Any]) -> dict[str, Any]:
    """Returns the headline, and the scores of the classes, from result.json."""
    result = run.finished_result()
    classes, found = result["classes"], figures.confusion(result)
    shown = sorted(classes, key=lambda row: 2.0 if row["recall"] is None else row["recall"])[:TABLE_CLASSES]
    shown = [row for row in classes if row in shown] if len(classes) > TABLE_CLASSES else classes
    matrix, names = result["confusion_matrix"], [row["name"] for row in classes]
    pairs = top_confusions(matrix, NUM_CONFUSIONS) if matrix else []
    if found is not None:
        files["confusion"] = found[0].draw(min(max(40 * len(found[0].rows), 160), 700))
    return {
        "interval": wilson_interval(result["test_accuracy"], result["num_test_examples"]),
        "own": {name: show_score(value) for name, value in result.get("test_metrics", {}).items()},
        "uneven": is_uneven([row["count"] for row in classes]),
        "best_by": {"balanced_accuracy": "balanced accuracy"}.get(run.config.best_by, run.config.best_by),
        "time": words.duration(result["training_seconds"]),
        "classes": shown,
        "num_classes": len(classes),
        "confusion": found and found[0],
        "confusion_left_out": found[1] if found else "",
        "confusions": [(names[x.label], names[x.predicted], x.num_examples, classes[x.label]["count"]) for x in pairs],
    }


def _examples(run: Run, scored: Scored, files: dict[str, Any]) -> dict[str, Any]:
    """Returns calibration, mistakes and certain answers."""
    (pictures, label), probabilities = scored
    predicted = probabilities.argmax(axis=1)
    found = calibrate(probabilities.max(axis=1), predicted == label)
    diagrams = figures.calibration(found)
    files["calibration"] = alt.vconcat(*(figure.draw(420) for figure in diagrams))
    mistakes, classes = most_confident(probabilities, label, PER_CLASS)
    result = run.finished_result()
    names = run.facts.class_names
    by_recall = sorted(classes, key=lambda k: result["classes"][k]["recall"] or 0.0)
    shown = sorted(by_recall[:NUM_CLASSES])

    def card(x: Shown) -> dict[str, Any]:
        right = x.label == x.predicted
        alternative = f"{names[x.label]}, predicted as {'such' if right else names[x.predicted]}"
        return {
            "uri": images.thumbnail(pictures[x.example]),
            "alt": f"Test image {x.example}: {alternative}, confidence {x.confidence:.1%}",
            "label": names[x.label],
            "predicted": names[x.predicted],
            "confidence": f"{x.confidence:.1%}",
        }

    gallery = [card(x) for x in mistakes[:NUM_MISTAKES]]
    rows = [
        {
            "name": names[k],
            "mistakes": [card(x) for x in classes[k].mistakes],
            "certain": [card(x) for x in classes[k].certain],
        }
        for k in shown
    ]
    if gallery:
        cells = [(x["uri"], f"{x['label']}, not {x['predicted']}") for x in gallery]
        files["mistakes"] = charts.pictures(cells, 6, images.THUMBNAIL, images.THUMBNAIL)
    certain = [(row["certain"][0]["uri"], row["name"]) for row in rows if row["certain"]]
    if certain:
        files["certain"] = charts.pictures(certain, 10, images.THUMBNAIL, images.THUMBNAIL)
    accuracy = float((predicted == label).mean())
    recomputed = "" if round(accuracy, 4) == round(result["test_accuracy"], 4) else f"{accuracy:.2%}"
    return {
        "calibration": found,
        "num_bins": NUM_BINS,
        "diagrams": diagrams,
        "calibration_words": words.explain_calibration(found, run.config),
        "recomputed": recomputed,
        "gallery": gallery,
        "num_mistakes": len(mistakes),
        "examples": rows,
        "examples_left_out": len(classes) - len(rows),
        "pixelated": max(run.facts.image_shape[:2]) <= images.THUMBNAIL,
    }


def _network(run: Run, scored: Scored | None, files: dict[str, Any]) -> dict[str, Any]:
    """Returns layers, filters and feature maps."""
    layers = layer_table(run.config.model, run.facts.image_shape)
    content: dict[str, Any] = {
        "layers": layers,
        "num_params": sum(layer.num_params for layer in layers),
        "flops": sum(layer.flops for layer in layers),
    }
    kernel = first_filters(run)
    if kernel is not None:
        content["filters"] = images.filter_pictures(kernel)
        content["num_filters"], content["filter_shape"] = kernel.shape[-1], kernel.shape[:3]
        files["filters"] = charts.pictures([(uri, "") for uri in content["filters"]], 12, 40, 40)
    if scored is not None:
        image, label = scored.examples.image[0], int(scored.examples.label[0])
        every = feature_maps(run, image)
        kept = np.linspace(0, len(every) - 1, min(len(every), NUM_MAPS)).round().astype(int)
        maps = [every[i] for i in kept]
        content["num_maps"] = len(every)
        first = {layer.operation: layer.name for layer in reversed(maps)}  # Each is explained once.
        content["input"] = {"uri": images.thumbnail(image), "label": run.facts.class_names[label]}
        content["maps"] = [_map_row(layer, layer.name == first[layer.operation]) for layer in maps]
        top = np.argsort(-scored.probabilities[0].round(DIGITS), kind="stable")[:3]
        content["answer"] = [(run.facts.class_names[k], float(scored.probabilities[0, k])) for k in top]
        cells = [(content["input"]["uri"], "input"), *((x["uri"], x["name"]) for x in content["maps"])]
        files["feature_maps"] = charts.pictures(cells, 2, 360, 90)  # Two rows of eight maps.
    return content


def _map_row(layer: FeatureMap, explained: bool) -> dict[str, Any]:
    return {
        "name": layer.name,
        "operation": layer.operation,
        "shape": "×".join(map(str, layer.shape)),
        "uri": images.maps_picture(layer.maps),
        "shown": layer.maps.shape[-1],
        "left_out": layer.maps.shape[-1] < layer.shape[-1],
        "is_vector": len(layer.shape) == 1,
        "words": words.explain_operation(layer.operation) if explained else "",
    }
