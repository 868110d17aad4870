"""Uneven classes, small sets and fine-tuning, in whole runs."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import (
    SGD,
    Adam,
    Config,
    UserError,
    compiler_options,
    eval_params,
    load_run,
    softmax_cross_entropy,
    train_and_evaluate,
)
from cnnjax.data.order import balanced_order

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Body(nn.Module):
    """Two layers with dropout and batch statistics."""

    num_classes: int = 2

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.Dense(8, name="body")(image.reshape(len(image), -1))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(self.num_classes, name="head")(nn.Dropout(0.2, deterministic=not train)(nn.relu(x)))

    def depths(self):
        return ("body", "norm", "head")


class Linear(nn.Module):
    num_classes: int = 2

    @nn.compact
    def __call__(self, image):
        return nn.Dense(self.num_classes)(image.reshape(len(image), -1))


def named_labels(logits, batch):
    return softmax_cross_entropy(logits, batch), {"label": batch.label.astype(jnp.float32)}


def make_arrays(counts=(50, 10)):
    rng = np.random.default_rng(0)
    label = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    image = np.clip(rng.integers(0, 200, (len(label), 4, 4, 1)) + 40 * label[:, None, None, None], 0, 255)
    return image.astype(np.uint8), label, image[:20].astype(np.uint8), label[:20]


def make_config(**options):
    values = {"dataset": make_arrays(), "model": Body(), "num_epochs": 2, "batch_size": 16, "validation_fraction": 0.0}
    return Config(**values | options)


def test_a_small_set_gets_a_small_batch(tmp_path):
    run = train_and_evaluate(make_config(batch_size=None, model=Linear()), run_dir=tmp_path / "run")
    assert run.history["step"].tolist() == [8, 16]  # 60 images in batches of 8.
    large = make_config(batch_size=None, model=Linear(), num_epochs=1, dataset=make_arrays((900, 300)))
    assert train_and_evaluate(large, run_dir=tmp_path / "large").history["step"].tolist() == [10]
    with pytest.raises(UserError, match="`batch_size` must be between 1 and the 60 training examples, got 61"):
        train_and_evaluate(make_config(batch_size=61), run_dir=tmp_path / "other")


def test_balanced_weights_weight_the_loss_by_class(tmp_path):
    """With a learning rate that changes nothing, the training loss is the weighted mean at the initial parameters."""
    options = {"optim": SGD(learning_rate=1e-30), "model": Linear(), "num_epochs": 1}
    run = train_and_evaluate(make_config(class_weights="balanced", **options), run_dir=tmp_path / "weighted")
    image, label = make_arrays()[:2]
    log_p = np.asarray(jax.nn.log_softmax(run.config.model.apply({"params": run.state.params}, run.standardize(image))))
    nll = -log_p[np.arange(60), label]
    expected = (nll[label == 0].mean() + nll[label == 1].mean()) / 2
    np.testing.assert_allclose(run.history["train_loss"], expected, rtol=1e-5)
    plain = train_and_evaluate(make_config(**options), run_dir=tmp_path / "plain")
    np.testing.assert_allclose(plain.history["train_loss"], nll.mean(), rtol=1e-5)


def test_balanced_sampling_draws_equally_often_from_every_class(tmp_path):
    config = make_config(sampling="balanced", loss=named_labels, model=Linear())
    run = train_and_evaluate(config, run_dir=tmp_path / "run")
    np.testing.assert_array_equal(run.history["train_label"], 0.5)
    label = make_arrays()[1]
    assert np.bincount(label[balanced_order(0, 0, label)]).tolist() == [30, 30]
    with pytest.raises(UserError, match="`class_weights` must be none if `sampling` is balanced: use one of the two"):
        make_config(sampling="balanced", class_weights="balanced")


def test_a_fine_tuned_run_freezes_the_body_scores_the_average_and_is_resumed_to_the_same_bits(tmp_path):
    states = {}

    def on_epoch(row, state):
        states[row["epoch"]] = jax.device_get(state)

    def stop(row, state):
        if row["epoch"] == 2:
            raise RuntimeError("stopped")

    optim = Adam(learning_rate=1e-2, weight_decay=0.1, schedule="one_cycle", freeze_epochs=1, depth_decay=0.5, ema=0.9)
    config = make_config(optim=optim, num_epochs=3, sampling="balanced", batch_size=8)
    run = train_and_evaluate(config, run_dir=tmp_path / "run", on_epoch=on_epoch)
    # Other options, as those of `quick_compilation`, may round differently.
    init = jax.jit(partial(Body().init, train=False), compiler_options=compiler_options(runs_once=True))
    params = init(jax.random.split(jax.random.key(0), 3)[0], jnp.zeros((1, 4, 4, 1)))["params"]
    for name in ("body", "norm"):
        jax.tree.map(np.testing.assert_array_equal, states[1].params[name], params[name])
        assert np.abs(states[2].params[name]["bias"] - params[name]["bias"]).max() > 0
    assert np.abs(states[1].params["head"]["bias"] - params["head"]["bias"]).max() > 0
    image, label = make_arrays()[2:]
    variables = {"params": eval_params(run.state), **run.state.model_state}
    logits = Body().apply(variables, run.standardize(image), train=False)
    assert run.test_accuracy == np.mean(np.argmax(logits, axis=1) == label)
    np.testing.assert_allclose(run.predict(image), jax.nn.softmax(logits), rtol=1e-5)
    again = load_run(tmp_path / "run", config)
    jax.tree.map(np.testing.assert_array_equal, again.state, run.state)
    with pytest.raises(RuntimeError, match="stopped"):
        train_and_evaluate(config, run_dir=tmp_path / "stopped", on_epoch=stop)
    resumed = train_and_evaluate(config, run_dir=tmp_path / "stopped", resume=True)
    assert resumed.finished_result()["sha256"] == run.finished_result()["sha256"]
