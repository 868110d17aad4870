"""A run on uneven classes, of which every score is known: nine of ten images are of class 0, half of them dark."""

import json
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import Config, Optimizer, UserError, load_run, train_and_evaluate
from cnnjax.cli.experiment import Experiment
from cnnjax.cli.train_command import parse_train
from cnnjax.runs.inspection import diff, reproduce


class Threshold(nn.Module):
    """Predicts class 1 for images that are brighter than a threshold, in standard deviations above the mean."""

    @nn.compact
    def __call__(self, image):
        threshold = self.param("threshold", nn.initializers.constant(4.5), ())
        above = image.mean((1, 2, 3)) - threshold
        return jnp.stack([-above, above], axis=1)


@dataclass(frozen=True, kw_only=True)
class Sink(Optimizer):
    """Lowers each parameter by 2.3 per epoch of three steps, whatever the gradient is."""

    def transform(self, learning_rate: Any) -> optax.GradientTransformation:
        return optax.stateless(lambda updates, params: jax.tree.map(lambda x: jnp.full_like(x, -2.3 / 3), updates))


def make_split(size):
    """Returns 90% of class 0, half of them dark and half medium, and 10% of class 1, bright."""
    brightness = np.tile([100, 120] * 9 + [140, 140], size // 20)
    return np.tile(brightness[:, None, None].astype(np.uint8), (1, 4, 4)), (brightness == 140).astype(np.int64)


def nearness(logits, label):
    """Returns how near the threshold is to the mean brightness, which is 0; the logits are its distances."""
    scores = {"nearness": -abs(logits[:, 1].mean()), "above": np.float32((logits[:, 1] > 0).mean())}
    logits[:], label[:] = 0, 0  # They are copies.
    return scores


def undefined(logits, label):
    """Returns nan in the run, in which three kinds of images have two logits each, but not for random logits."""
    return {"undefined": 1.0 if len(np.unique(logits)) > 6 else np.nan}


def config(best_by, metrics=None):
    splits = (*make_split(80), *make_split(40))
    options: Any = {"validation_fraction": 0.25, "model": Threshold(), "optim": Sink(), "best_by": best_by}
    return Config(dataset=splits, num_epochs=5, batch_size=20, metrics=metrics, **options)


def column(run, name):
    return [json.loads(line)[name] for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("best_by", "best", "kept"),
    [
        ("accuracy", [1, 1, 1, 1, 1], [1, 2, 4, 5]),
        ("balanced_accuracy", [1, 2, 2, 2, 2], [2, 4, 5]),
        ("loss", [1, 1, 1, 1, 1], [1, 2, 4, 5]),
        ("nearness", [1, 2, 2, 2, 2], [1, 2, 4, 5]),
        ("above", [1, 2, 3, 4, 5], [4, 5]),
    ],
)
def test_the_best_epoch_and_the_kept_checkpoints_follow_best_by(best_by, best, kept, tmp_path):
    seen = []

    def on_epoch(row, state):
        seen.append((row["epoch"], row["best_epoch"], row[f"validation_{best_by}"]))

    run = train_and_evaluate(config(best_by, nearness), run_dir=tmp_path / "run", on_epoch=on_epoch)
    # After epoch 1 all are class 0, after epoch 2 the medium ones are class 1, and from epoch 3 on all are.
    assert column(run, "validation_accuracy") == pytest.approx([0.9, 0.55, 0.1, 0.1, 0.1], abs=0.06)
    assert column(run, "validation_balanced_accuracy") == pytest.approx([0.5, 0.75, 0.5, 0.5, 0.5], abs=0.06)
    # The threshold falls by 2.3 per epoch.
    brightness = np.array([2.3 * epoch - 4.5 for epoch in range(1, 6)])
    assert column(run, "validation_nearness") == pytest.approx((-abs(brightness)).tolist(), abs=0.15)
    assert column(run, "validation_above") == pytest.approx([0.0, 0.55, 1, 1, 1], abs=0.06)
    assert seen == [*zip(range(1, 6), best, column(run, f"validation_{best_by}"), strict=True)]
    last_best = best[-1]
    assert sorted(int(path.name) // 3 for path in (run.run_dir / "checkpoints").iterdir()) == kept
    result = run.finished_result()
    assert result["best_epoch"] == last_best
    for name in ("accuracy", "balanced_accuracy", "loss"):
        assert result[f"best_validation_{name}"] == column(run, f"validation_{name}")[last_best - 1]
    for name in ("nearness", "above"):
        assert result["best_validation_metrics"][name] == column(run, f"validation_{name}")[last_best - 1]
    assert result["test_metrics"]["above"] == pytest.approx({1: 0, 2: 0.55, 5: 1}[last_best])
    assert result["sha256"]["best_params"] == column(run, "params_sha256")[last_best - 1]
    scores = load_run(run.run_dir, run.config).evaluate("validation")
    assert scores.balanced_accuracy == result["best_validation_balanced_accuracy"]
    assert scores.metrics == result["best_validation_metrics"]


def test_a_score_that_selects_the_best_epoch_must_be_finite(tmp_path):
    seen = []
    message = (
        r"^`metrics` must return a finite undefined, by which the best checkpoint is selected, got nan "
        r"after epoch 1\. Correct the function, and resume the run: resume=True\.$"
    )
    with pytest.raises(UserError, match=message):
        train_and_evaluate(
            config("undefined", undefined), run_dir=tmp_path / "run", on_epoch=lambda row, state: seen.append(row)
        )
    assert not seen
    run = train_and_evaluate(config("loss", undefined), run_dir=tmp_path / "other")
    assert np.isnan(column(run, "validation_undefined")).all() and len(column(run, "epoch")) == 5
    assert np.isnan(run.history["validation_undefined"]).all()
    assert not diff(run.run_dir, run.run_dir)["outcome"]  # Nan is the same as nan.
    again = load_run(run.run_dir, run.config).finished_result()
    assert np.isnan(again["test_metrics"]["undefined"]) and np.isnan(again["best_validation_metrics"]["undefined"])


def of_each_class(logits, label):
    """Returns a score for each class that occurs."""
    return {f"recall_{k}": np.mean(logits.argmax(1)[label == k] == k) for k in np.unique(label)}


def test_scores_may_depend_on_the_classes_that_occur(tmp_path, capsys):
    """The validation split lacks class 0, the test split has both."""
    (image, label), test = make_split(60), make_split(40)
    options: Any = {"model": Threshold(), "optim": Sink(), "metrics": of_each_class, "best_by": "recall_1"}
    options |= {"num_epochs": 2, "batch_size": 20}
    splits = (image, label, image[label == 1], label[label == 1], *test)
    jax.devices()
    runs, experiment = tmp_path / "runs", Experiment(Config(dataset=splits, **options), {})
    parse_train(experiment, ["--seeds", "0:2", "--run-dir", str(runs), "--no-report"])()
    lines = capsys.readouterr().out.splitlines()
    assert "2 seeds, 0:2: test_recall_0 0.5000, the same for all 2 seeds, so that its noise is unknown" in lines[-2]
    assert "2 seeds, 0:2: test_recall_1 1.0000, the same" in lines[-1]
    result = load_run(runs / "seed0", experiment.config).finished_result()
    assert result["best_validation_metrics"] == {"recall_1": 1.0}
    assert result["test_metrics"] == {"recall_0": 0.5, "recall_1": 1.0}
    assert ", recall_0 0.5000, recall_1 1.0000) on all 40 test images" in lines[-5]
    assert "(validation accuracy 100.00%, balanced accuracy 100.00%, recall_1 1.0000)" in lines[-5]


FAILS = []


def fails_on_the_test_images(logits, label):
    if FAILS and len(label) == 40:
        raise LookupError("in the test")
    return {"one": 1.0}


def test_a_function_that_fails_later_can_be_corrected(tmp_path, monkeypatch):
    monkeypatch.setattr("test_best_epoch.FAILS", [True])
    failing = config("one", fails_on_the_test_images)
    with pytest.raises(UserError, match=r"test\. Correct the function, and resume the run, from step 15 on: r"):
        train_and_evaluate(failing, run_dir=tmp_path / "run")
    monkeypatch.setattr("test_best_epoch.FAILS", [])
    assert train_and_evaluate(failing, run_dir=tmp_path / "run", resume=True).finished_result()["best_epoch"] == 5


CALLS = []


def counts_its_calls(logits, label):
    CALLS.append(1)
    return {"calls": len(CALLS)}


def rises_at_first(logits, label):
    """Returns a score that rises in the calls that follow, up to the end of a run, and then falls."""
    CALLS.append(1)
    return {"score": len(CALLS) if len(CALLS) < 26 else -len(CALLS)}


def test_a_reproduction_names_a_function_that_returns_other_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("test_best_epoch.CALLS", [])
    run = train_and_evaluate(config("accuracy", counts_its_calls), run_dir=tmp_path / "run")
    found = reproduce(run.run_dir, run.config, into=tmp_path / "again")
    assert not found.same and found.first_epoch is None and not found.environment
    # One call before the first step, one for each epoch, and one for the test images.
    assert found.moved["metrics"] == "calls 2.0 there, 9.0 here in epoch 1, with the same parameters"
    only_test = replace(run.config, validation_fraction=0.0)
    run = train_and_evaluate(only_test, run_dir=tmp_path / "without")
    found = reproduce(run.run_dir, only_test, into=tmp_path / "without again")
    assert run.finished_result()["best_validation_metrics"] == {} and not found.same
    assert found.moved == {"metrics": "test_calls 16.0 there, 18.0 here in the result, with the same parameters"}
    # A score that falls in one of the two runs only: it ends earlier.
    falls = replace(run.config, validation_fraction=0.25, metrics=rises_at_first, best_by="score", patience=1)
    assert train_and_evaluate(falls, run_dir=tmp_path / "longer").finished_result()["stopped_epoch"] is None
    found = reproduce(tmp_path / "longer", falls, into=tmp_path / "shorter")
    assert not found.same and found.moved["epochs"] == "5 there, 2 here"


def test_a_run_stops_without_a_better_score_and_an_equal_one_is_no_gain(tmp_path, capsys):
    jax.devices()
    experiment = Experiment(replace(config("accuracy"), num_epochs=9), {})  # Accuracies 0.9, 0.55, 0.1, 0.1, ...
    parse_train(experiment, ["--patience", "3", "--run-dir", str(tmp_path / "accuracy"), "--no-report"])()
    out = capsys.readouterr().out
    assert "epoch 1 of 9 (validation accuracy 90.00%, balanced accuracy 50.00%, stopped after epoch 4)" in out
    above = replace(experiment.config, metrics=nearness, best_by="above", patience=2)  # 0, 0.55, 1, 1, 1, ...

    def interrupt(step, metrics):
        if step == 10:
            raise KeyboardInterrupt

    whole = train_and_evaluate(above, run_dir=tmp_path / "whole").finished_result()
    assert (whole["stopped_epoch"], whole["best_epoch"]) == (5, 5)  # The latest of the equal ones is the best.
    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(above, run_dir=tmp_path / "parts", on_step=interrupt, checkpoint_seconds=0.0)
    parts = train_and_evaluate(above, run_dir=tmp_path / "parts", resume=True).finished_result()
    assert parts["sha256"] == whole["sha256"] and parts["stopped_epoch"] == 5
    assert reproduce(tmp_path / "whole", above, into=tmp_path / "again").same
    # Trained longer, it ends as if it had been from the start.
    longer = replace(above, num_epochs=12)
    assert train_and_evaluate(longer, run_dir=tmp_path / "parts", resume=True).finished_result() == {
        **parts,
        "num_epochs": 12,
    }
    short = train_and_evaluate(replace(above, num_epochs=5), run_dir=tmp_path / "short").finished_result()
    assert short["stopped_epoch"] is None and short["sha256"] == whole["sha256"]
    (tmp_path / "short" / "result.json").unlink()  # As if it had been killed before.
    again = train_and_evaluate(replace(above, num_epochs=5), run_dir=tmp_path / "short", resume=True)
    assert again.finished_result()["stopped_epoch"] is None
    once = train_and_evaluate(longer, run_dir=tmp_path / "short", resume=True).finished_result()
    assert (once["stopped_epoch"], once["sha256"]) == (5, whole["sha256"])
    with pytest.raises(UserError, match="`patience` must be None without validation: set `validation_fraction`, got 2"):
        replace(above, validation_fraction=0.0)
    with pytest.raises(UserError, match="`patience` must be at least 1, got 0"):
        replace(above, patience=0)


def test_an_interrupted_run_has_the_scores_of_each_class(tmp_path):
    def interrupt(step, metrics):
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(config("balanced_accuracy"), run_dir=tmp_path, on_step=interrupt, checkpoint_seconds=0.0)
    run = train_and_evaluate(config("balanced_accuracy"), run_dir=tmp_path, resume=True)
    result = run.finished_result()
    assert result["confusion_matrix"] == [[18, 18], [0, 4]]
    assert result["classes"] == [
        {"name": "0", "count": 36, "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3)},
        {"name": "1", "count": 4, "precision": 4 / 22, "recall": 1.0, "f1": pytest.approx(8 / 26)},
    ]
    assert result["test_accuracy"] == 0.55
    assert result["test_balanced_accuracy"] == result["test_macro_recall"] == 0.75
    assert result["test_macro_precision"] == pytest.approx((1 + 4 / 22) / 2)
    assert result["test_macro_f1"] == pytest.approx((2 / 3 + 8 / 26) / 2)
    assert "[18, 18]" in (tmp_path / "result.json").read_text()  # On one line.


def test_seeds_end_with_the_balanced_accuracy_and_have_no_tables(tmp_path, capsys):
    jax.devices()  # `--seeds` would otherwise make each core of this process a device.
    experiment, where = Experiment(config("balanced_accuracy"), {}), ["--run-dir", str(tmp_path / "runs")]
    parse_train(experiment, ["--seeds", "0:2", *where])()
    lines = capsys.readouterr().out.splitlines()
    sentences = [line for line in lines if "Test accuracy 55.00%, balanced accuracy 75.00%" in line]
    assert len(sentences) == 2 and not any(line.startswith(("class ", "0  ")) for line in lines)
    assert lines[-2].startswith("2 seeds, 0:2: test_accuracy 55.00%, the same for all 2 seeds")
    assert lines[-1].startswith("2 seeds, 0:2: test_balanced_accuracy 75.00%, the same for all 2 seeds")
    parse_train(experiment, ["--seeds", "0:1", *where, "--resume"])()
    assert "1 seed, 0:1: test_accuracy 55.00% (one seed)" in capsys.readouterr().out
