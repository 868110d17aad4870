import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import research

from cnnjax import (
    Adam,
    Batch,
    UserError,
    export_run,
    init_state,
    load_run,
    predict_files,
    softmax_cross_entropy,
    train_step,
    write_report,
)
from cnnjax.files import tree_sha256
from cnnjax.runs.inference import outputs_of
from cnnjax.runs.run import Run
from cnnjax.state import eval_params

# Its best epoch is not the last, its seed is not 0, the test split has two views, and there are batch statistics.
CONFIG: Any = research.CONFIG
IMAGES = CONFIG.dataset[2]  # [37 6 5 3]


@pytest.fixture(scope="module")
def run(research_run):
    """The run of research.py, loaded from its directory."""
    return load_run(str(research_run.run_dir), CONFIG)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- What a run knows -----------------------------------------------------------------------------------------------


def test_a_loaded_run_is_the_one_that_was_trained(research_run, run):
    result = json.loads((research_run.run_dir / "result.json").read_text())
    assert research_run.result == run.result == result
    assert (run.test_accuracy, run.test_loss) == (result["test_accuracy"], result["test_loss"])
    assert (run.config, run.facts, run.run_dir) == (research_run.config, research_run.facts, research_run.run_dir)
    assert run.config == CONFIG
    assert_equal(research_run.state, run.state)
    assert_equal(research_run.history, run.history)
    outcome = f"net on arrays in memory, seed 3, test accuracy {result['test_accuracy']:.2%} after 3 epochs"
    assert repr(run) == f"Run({run.run_dir}: {outcome})"


def test_the_history_is_that_of_the_files(run):
    rows = [{**row, **timing} for row, timing in zip(*map(read_lines, files(run)), strict=True)]
    for row in rows:
        del row["params_sha256"]
    assert {name: values.tolist() for name, values in run.history.items()} == {
        name: [row[name] for row in rows] for name in rows[0]
    }
    assert {"epoch", "train_loss", "train_grad_norm", "validation_accuracy", "seconds"} < run.history.keys()
    assert (run.history["epoch"].dtype, run.history["train_loss"].dtype) == (np.int64, np.float64)


def files(run):
    return run.run_dir / "metrics.jsonl", run.run_dir / "timing.jsonl"


def test_an_unfinished_run_has_a_history_and_no_score(run, tmp_path):
    run_dir = Path(shutil.copytree(run.run_dir, tmp_path / "run"))
    (run_dir / "result.json").unlink()
    (run_dir / "timing.jsonl").write_text("".join((run_dir / "timing.jsonl").read_text().splitlines(True)[:2]))
    (run_dir / "SHA256SUMS").unlink()  # As after a kill.
    unfinished = load_run(run_dir, CONFIG)
    assert unfinished.result is None
    assert repr(unfinished) == f"Run({run_dir}: net on arrays in memory, seed 3, not finished)"
    with pytest.raises(UserError, match=r"`run_dir` must be finished to have a test score, .* the run: resume=True"):
        _ = unfinished.test_accuracy
    assert_equal(unfinished.state, run.state)
    history = unfinished.history
    assert history["train_loss"].tolist() == run.history["train_loss"].tolist()
    assert history["epoch"].tolist() == [1, 2, 3] and np.isnan(history["seconds"]).tolist() == [False, False, True]


def test_a_run_before_its_first_epoch_is_loaded(seeds, tmp_path):
    shutil.copy(seeds.folder / "seed0" / "config.json", tmp_path)
    run = load_run(tmp_path)
    assert run.history == {}
    with pytest.raises(
        UserError,
        match=r"`run_dir` must have the checkpoint of the end of an epoch, got .* without it\. Resume it: resume",
    ):
        _ = run.state


def test_no_run(tmp_path):
    with pytest.raises(UserError, match=rf"`run_dir` must be the directory of a run, .*, got {tmp_path}"):
        load_run(tmp_path)


def test_a_run_of_another_version(run_dir):
    manifest = json.loads((run_dir / "manifest.json").read_text())
    (run_dir / "manifest.json").write_text(json.dumps({**manifest, "format": 3}))
    (run_dir / "config.json").write_text("{}")  # Its keys may be others.
    with pytest.raises(UserError, match=r"must be of format 5, got 3: another version of cnnjax wrote it"):
        load_run(run_dir)


def test_a_built_in_run_is_loaded_without_its_configuration(seeds, prepared_dir):
    run = load_run(seeds.folder / "seed1")
    assert run.config == replace(seeds.config, seed=1)
    scores = run.evaluate(data_dir=str(prepared_dir))
    assert (scores.loss, scores.accuracy) == (seeds.results[1]["test_loss"], seeds.results[1]["test_accuracy"])


def test_the_configuration_provides_the_classes_and_the_values_are_those_of_the_run(run):
    assert load_run(run.run_dir, replace(CONFIG, batch_size=99)).config == CONFIG
    with pytest.raises(UserError, match=r"`model` of this run is Net, .* Pass a `config` that has it"):
        load_run(run.run_dir)


# --- The checkpoint -------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_restored_and_not_the_latest(run):
    rows = read_lines(run.run_dir / "metrics.jsonl")
    assert run.result["best_epoch"] < len(rows)
    assert run.state.step == rows[run.result["best_epoch"] - 1]["step"]
    assert tree_sha256(run.state.params) == run.result["sha256"]["best_params"] != run.result["sha256"]["params"]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(run.state))


def test_another_checkpoint_is_restored_by_its_step(run):
    last = load_run(run.run_dir, CONFIG, step=18)
    assert last.state.step == 18
    assert tree_sha256(last.state.params) == run.result["sha256"]["params"]
    with pytest.raises(UserError, match=r"`step` must be that of a checkpoint in .* \(\[6, 12, 18\]\), got 7\."):
        load_run(run.run_dir, CONFIG, step=7)


def test_loading_does_not_touch_the_run(run, tmp_path):
    run_dir = Path(shutil.copytree(run.run_dir, tmp_path / "run"))
    (run_dir / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()  # Perhaps of a training that is still saving.
    before = sorted(run_dir.rglob("*"))
    _ = load_run(run_dir, CONFIG).state
    assert sorted(run_dir.rglob("*")) == before


def test_only_the_best_checkpoint_of_a_finished_run_is_used(seeds, run_dir):
    rows = read_lines(run_dir / "metrics.jsonl")
    best = rows[seeds.results[0]["best_epoch"] - 1]["step"]
    expected = load_run(run_dir).state.params
    (other,) = {13, 26} - {best}
    (run_dir / "checkpoints" / str(other) / "progress.json").write_text("{")
    assert_equal(load_run(run_dir).state.params, expected)
    shutil.rmtree(run_dir / "checkpoints" / str(best))
    message = rf"`run_dir` must have the checkpoint of step {best}, its best, got .* Train it again: cnnjax reproduce"
    with pytest.raises(UserError, match=message):
        _ = load_run(run_dir).state


def test_the_checkpoint_of_another_run_is_not_used(seeds, run_dir):
    shutil.rmtree(run_dir / "checkpoints")
    shutil.copytree(seeds.folder / "seed1" / "checkpoints", run_dir / "checkpoints")
    with pytest.raises(
        UserError, match=r"`run_dir` must have the (parameters that result\.json names|checkpoint of step)"
    ):
        _ = load_run(run_dir).state


@pytest.mark.parametrize(
    ("old", "new"), [('"seed": 0', '"seed": 1'), ('"std": [ ', '"std": [ 1'), ("Trouser", "Trouses")]
)
def test_a_plausible_change_of_the_configuration_is_noticed(old, new, run_dir):
    path = run_dir / "config.json"
    assert old in " ".join(path.read_text().split())
    path.write_text(" ".join(path.read_text().split()).replace(old, new))
    with pytest.raises(
        UserError,
        match=r"config\.json must match its checksum in SHA256SUMS, got other bytes: one of the two is damaged",
    ):
        load_run(run_dir)


def test_a_damaged_latest_checkpoint_of_an_unfinished_run_is_not_passed_over(run_dir):
    (run_dir / "result.json").unlink()
    _ = load_run(run_dir).state
    (run_dir / "checkpoints" / "26" / "progress.json").write_text("{")
    with pytest.raises(UserError, match=r"checkpoints/26 is damaged\. Resume the run, which uses an earlier one"):
        _ = load_run(run_dir).state


# --- The network ----------------------------------------------------------------------------------------------------


def by_numpy(run, image):
    """Returns what the layers of research.Net compute in inference mode: {name: output}."""
    params, stats = jax.device_get((run.state.params, run.state.model_state["batch_stats"]["BatchNorm_0"]))
    x = ((image - np.array(run.facts.mean)) / run.facts.std).reshape(len(image), 6 * 5 * 3)
    dense = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    norm = (dense - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    norm = norm * params["BatchNorm_0"]["scale"] + params["BatchNorm_0"]["bias"]
    logits = np.maximum(norm, 0) @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return {"Dense_0": dense, "BatchNorm_0": norm, "Dense_1": logits, "probability": probability}


@pytest.mark.parametrize("count", [0, 1, 37, 300])
def test_probabilities_and_features_are_those_of_the_network(run, count):
    """In inference mode: with the running statistics, of standardized pixels."""
    images = np.resize(IMAGES, (count, *IMAGES.shape[1:]))
    expected = by_numpy(run, images)
    got = run.predict(images)
    assert (got.shape, got.dtype) == ((count, 4), np.float32)
    np.testing.assert_allclose(got, expected["probability"], atol=1e-5)
    np.testing.assert_allclose(run.logits(images), expected["Dense_1"], rtol=1e-4, atol=1e-4)
    for layer in ("Dense_0", "BatchNorm_0", "Dense_1"):
        np.testing.assert_allclose(run.features(images, layer), expected[layer], rtol=1e-4, atol=1e-4)


def test_test_time_augmentation_is_the_mean_of_the_logits_of_the_views(run):
    views = [np.log(run.predict(images)) for images in (IMAGES, IMAGES[:, :, ::-1])]
    expected = np.exp(np.mean(views, axis=0))
    np.testing.assert_allclose(
        run.predict(IMAGES, tta="flip"), expected / expected.sum(axis=1, keepdims=True), atol=1e-5
    )
    with pytest.raises(UserError, match=r"`tta` must be a known name, got .mirror.*flip_translate"):
        run.predict(IMAGES, tta="mirror")


def test_padding_gets_no_extra_views(run, monkeypatch):
    expected = run.predict(IMAGES[:8], tta="flip_translate")
    # The quarter with extra views is as large as the images.
    monkeypatch.setattr("cnnjax.runs.inference.BATCH_SIZE", 32)
    np.testing.assert_allclose(run.predict(IMAGES[:8], tta="uncertain"), expected, atol=1e-5)


def test_any_number_of_images_is_one_program(run):
    run.predict(IMAGES)
    before = outputs_of._cache_size()
    for count in (0, 1, 5, 37):
        run.predict(IMAGES[:count])
    run.predict(jnp.asarray(IMAGES))
    assert outputs_of._cache_size() == before


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (IMAGES / 255, r"float64 \[37, 6, 5, 3\]\."),
        (IMAGES.astype(np.int64), r"int64 \[37, 6, 5, 3\]\."),
        (IMAGES[0], r"uint8 \[6, 5, 3\]\. For one image: images\[None\]\."),
        (IMAGES[..., :1], r"uint8 \[37, 6, 5, 1\]\."),
        (IMAGES[:, :5], r"uint8 \[37, 5, 5, 3\]\."),
        (np.uint8(3), r"uint8 \[\]\."),
    ],
    ids=["float", "int", "one image", "gray", "height", "scalar"],
)
def test_images_of_another_kind(images, got, run):
    with pytest.raises(UserError, match=rf"`images` must be uint8 \[N 6 5 3\], with values .*, got {got}"):
        run.predict(images)
    with pytest.raises(UserError, match="`images` must be uint8"):
        run.features(images, "Dense_0")


def test_gray_images_may_lack_their_channel(seeds, raw_fashion_mnist):
    run, image = load_run(seeds.folder / "seed0"), raw_fashion_mnist.splits["test"].image[:3]
    np.testing.assert_array_equal(run.predict(image[..., 0]), run.predict(image))
    with pytest.raises(
        UserError, match=r"`images` must be uint8 \[N 28 28 1\] or \[N 28 28\], .*, got uint8 \[28, 28\]"
    ):
        run.predict(image[0, ..., 0])


def test_an_unknown_layer_lists_the_others(run):
    with pytest.raises(UserError, match="must be one of Dense_0, BatchNorm_0, Dropout_0, Dense_1, got 'Conv_0'"):
        run.features(IMAGES, "Conv_0")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "twice", 2 * x)
        return nn.Dense(5)(x)


class Nested(nn.Module):
    @nn.compact
    def __call__(self, image):
        shared = nn.Dense(3, name="shared")
        x = Block(name="block")(image.reshape(image.shape[0], -1))
        return nn.Dense(4)(shared(x) + shared(x - 1))


class Passes:
    """Functions that are no Linen module."""

    def init(self, key, image):
        return {"params": {"scale": jnp.ones(4)}}

    def apply(self, variables, image, key, train):
        return image.mean((1, 2, 3))[:, None] * variables["params"]["scale"][None], {}


def untrained(run, model):
    """Returns `run` with another network."""
    state = init_state(jax.random.key(1), jnp.zeros((1, 6, 5, 3)), model=model, tx=optax.identity())
    return Run(run.run_dir, replace(CONFIG, model=model), run.facts, run.result, _trained=(state, [], []))


def test_features_of_nested_layers_and_of_sown_values(run):
    nested = untrained(run, Nested())
    x = ((IMAGES - np.array(run.facts.mean)) / run.facts.std).reshape(len(IMAGES), -1)
    dense = jax.device_get(nested.state.params["block"]["Dense_0"])
    expected = x @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(nested.features(IMAGES, "block/Dense_0"), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(nested.features(IMAGES, "block"), nested.features(IMAGES, "block/Dense_0"))
    np.testing.assert_allclose(nested.features(IMAGES, "block/twice"), 2 * x, rtol=1e-5, atol=1e-5)
    names = "block/twice, block/Dense_0, block, Dense_0"  # `shared` is called twice.
    with pytest.raises(UserError, match=f"`layer` must be one of {names}, got 'shared'"):
        nested.features(IMAGES, "shared")


def test_a_network_of_two_functions_predicts_and_has_no_layers(run):
    functions = untrained(run, Passes())
    np.testing.assert_allclose(functions.predict(IMAGES), 0.25, rtol=1e-6)
    with pytest.raises(UserError, match="`layer` must be a part of a Linen module, got a run of passes"):
        functions.features(IMAGES, "Dense_0")


def test_a_new_state_needs_an_optimizer_of_optax(run, no_type_checks):
    with pytest.raises(ValueError, match=r"`tx` must be an optax optimizer, got Adam\."):
        run.new_state(Adam())


def test_a_new_state_is_trained_on_without_changing_the_run(run):
    tx = optax.sgd(0.1, momentum=0.9)
    before = jax.device_get(run.state)
    state = run.new_state(tx)
    assert state.step == 0
    assert_equal((state.params, state.model_state), (before.params, before.model_state))
    assert_equal(state.opt_state, tx.init(before.params))
    batch = Batch(np.ones((2, 6, 5, 3), np.float32), np.array([0, 3], np.int32), np.ones(2, bool))
    state, _ = train_step(state, batch, jax.random.key(0), model=run.config.model, tx=tx)
    assert state.step == 1
    assert_equal(run.state, before)  # None of its arrays was donated.
    np.testing.assert_allclose(run.standardize(IMAGES), (IMAGES - np.array(run.facts.mean)) / run.facts.std, atol=1e-5)
    train_step(run.state, batch, jax.random.key(0), model=run.config.model, tx=CONFIG.optim.make_tx(18, 3))
    assert_equal(run.state, before)  # Restored.


def test_an_optimizer_with_weak_types_is_compiled_once(run):
    tx, state = optax.lbfgs(), run.new_state(optax.lbfgs())
    batch, traces = Batch(np.ones((2, 6, 5, 3), np.float32), np.array([0, 3], np.int32), np.ones(2, bool)), []

    def loss_fn(logits, batch):
        traces.append(1)
        return softmax_cross_entropy(logits, batch)

    state, _ = train_step(state, batch, jax.random.key(0), model=run.config.model, tx=tx, loss_fn=loss_fn)
    once = len(traces)  # The line search calls it, too.
    train_step(state, batch, jax.random.key(0), model=run.config.model, tx=tx, loss_fn=loss_fn)
    assert len(traces) == once


def test_a_schedule_free_run_uses_its_parameters_for_evaluation(run):
    model, tx = Nested(), optax.contrib.schedule_free_sgd(0.5)
    state = init_state(jax.random.key(1), jnp.zeros((1, 6, 5, 3)), model=model, tx=tx)
    pixels = ((IMAGES - np.array(run.facts.mean)) / run.facts.std).astype(np.float32)
    batch = Batch(pixels, CONFIG.dataset[3].astype(np.int32), np.ones(37, bool))
    for _ in range(3):
        state, _ = train_step(state, batch, jax.random.key(0), model=model, tx=tx)
    free = Run(run.run_dir, replace(CONFIG, model=model), run.facts, run.result, _trained=(state, [], []))
    params = optax.contrib.schedule_free_eval_params(state.opt_state, state.params)
    expected = jax.nn.softmax(model.apply({"params": params}, pixels))
    np.testing.assert_allclose(free.predict(IMAGES), expected, atol=1e-5)
    other = jax.nn.softmax(model.apply({"params": state.params}, pixels))
    assert np.abs(other - expected).max() > 1e-3
    restarted = free.new_state(tx)  # Its `params` are those of the evaluation, and so is the state of the optimizer.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eval_params(restarted), params)
    train_step(restarted, batch, jax.random.key(0), model=model, tx=tx)  # It shares no buffer that is donated twice.


# --- Scores ---------------------------------------------------------------------------------------------------------


def test_scores_equal_those_of_the_run(research_run, run):
    result, best = run.result, read_lines(run.run_dir / "metrics.jsonl")[run.result["best_epoch"] - 1]
    test, validation = (run.evaluate(split) for split in ("test", "validation"))
    assert (test.loss, test.accuracy, test.num_examples) == (
        result["test_loss"],
        result["test_accuracy"],
        result["num_test_examples"],
    )
    assert (validation.loss, validation.accuracy) == (best["validation_loss"], best["validation_accuracy"])
    for name in ("top2", "probability"):
        assert validation.metrics[name] == best[f"validation_{name}"] == result["best_validation_metrics"][name]
        assert test.metrics[name] == result["test_metrics"][name]
    logits = run.logits(run.load_data("test").image, tta="flip")
    assert CONFIG.metrics(logits, run.load_data("test").label) == pytest.approx(result["test_metrics"])
    assert validation.num_examples == 110 - 88
    assert research_run.evaluate() == test
    # Only the test split has several views, and the held-out part depends on the seed.
    plain, other = (replace(run, config=c) for c in (replace(CONFIG, tta="none"), replace(CONFIG, seed=0)))
    assert plain.evaluate("test").loss != test.loss
    assert plain.evaluate("validation") == validation
    assert other.evaluate("validation").loss != validation.loss


def test_scoring_other_data_or_a_part_that_does_not_exist(run):
    other = replace(run, facts=replace(run.facts, sha256={"train": "0", "test": "1"}))
    with pytest.raises(UserError, match=r"`dataset` must hold the 'arrays' of this run, SHA-256 {'train': '0'"):
        other.evaluate("test")
    whole = replace(run, config=replace(CONFIG, validation_fraction=0.0))
    with pytest.raises(UserError, match="`split` must be test if `validation_fraction` was 0, got validation"):
        whole.evaluate("validation")
    with pytest.raises(UserError, match="`split` must be a known name, got 'train'"):
        run.evaluate("train")


def test_a_state_is_no_run(run, tmp_path, no_type_checks):
    given = r"Runs?, such as `load_run\(run_dir\)`, got TrainState"
    with pytest.raises(UserError, match=f"`run` must be a {given}"):
        export_run(run.state, tmp_path / "made")
    with pytest.raises(UserError, match=f"`runs` must be {given}"):
        write_report([run.state], tmp_path / "made")
    with pytest.raises(UserError, match=f"`runs` must be at least one {given}"):
        next(predict_files([run.state], []))
    assert not (tmp_path / "made").exists()
    with pytest.raises(UserError, match=r"`runs` must be at least one Run, .* got none"):
        next(predict_files([], []))
