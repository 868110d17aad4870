import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from sklearn.utils.class_weight import compute_class_weight

from cnnjax import Batch, CrossEntropy, UserError, softmax_cross_entropy
from cnnjax.losses import ClassWeighted, balanced_weights

LOGITS = jnp.log(jnp.array([[3.0, 1.0, 4.0], [1.0, 1.0, 2.0]]))
LABEL = np.array([1, 2], np.int32)


def labeled(label):
    return Batch(np.zeros((len(label), 1, 1, 1)), label, np.ones(len(label), bool))


def test_softmax_cross_entropy_equals_hand_computed_values():
    logits = jnp.array([[0.0, 0.0], [jnp.log(3.0), 0.0], [0.0, 100.0]])
    loss = softmax_cross_entropy(logits, labeled(jnp.array([0, 0, 1])))
    np.testing.assert_allclose(loss, [np.log(2), np.log(4 / 3), 0.0], rtol=1e-6, atol=1e-7)


def test_class_probabilities_as_labels_equal_hand_computed_values():
    label = jnp.array([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]])
    loss = softmax_cross_entropy(LOGITS, labeled(label))
    np.testing.assert_allclose(loss, [0.25 * np.log(8 / 3) + 0.75 * np.log(8), np.log(2)], rtol=1e-6)


def test_label_smoothing_equals_hand_computed_values():
    loss = CrossEntropy(label_smoothing=0.3)
    smooth = 0.7 * np.log([8, 2]) + 0.1 * np.array([np.log(512 / 12), np.log(64 / 2)])
    np.testing.assert_allclose(loss(LOGITS, labeled(LABEL)), smooth, rtol=1e-6)
    np.testing.assert_allclose(loss(LOGITS, labeled(jax.nn.one_hot(LABEL, 3))), smooth, rtol=1e-6)
    np.testing.assert_array_equal(CrossEntropy()(LOGITS, labeled(LABEL)), softmax_cross_entropy(LOGITS, labeled(LABEL)))


@pytest.mark.parametrize("loss", [softmax_cross_entropy, CrossEntropy(label_smoothing=0.1)])
@pytest.mark.parametrize("label", [np.array([0], np.int32), np.array([[0.75, 0.25, 0, 0]], np.float32)])
def test_the_loss_of_narrow_logits_is_float32(loss, label):
    logits = jnp.array([[20, 16, 0, 0]], jnp.bfloat16)
    got, expected = (loss(x, labeled(label)) for x in (logits, logits.astype(jnp.float32)))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("label", [LABEL, np.array([[0.2, 0.8, 0.0], [0.0, 0.5, 0.5]], np.float32)])
def test_gradients_equal_finite_differences(label):
    check_grads(lambda x: softmax_cross_entropy(jnp.asarray(x), labeled(label)), (LOGITS,), order=1, modes=["rev"])


@pytest.mark.parametrize("loss", [softmax_cross_entropy, CrossEntropy(label_smoothing=0.1)])
@pytest.mark.parametrize(
    "label",
    [np.ones((2, 1), np.int32), np.ones(1, np.int32), np.ones(2, np.float32), np.ones((2, 3), int), np.ones((2, 4))],
    ids=lambda label: f"{label.dtype}{label.shape}",
)
def test_labels_of_another_shape_or_dtype(loss, label):
    message = (
        r"`batch.label` must be class indices, int \[B\], or probabilities, float \[B K\], for the cross-entropy with "
        rf"logits \[B K\] of shape \(2, 3\), got {label.dtype}{re.escape(str(list(label.shape)))}\."
    )
    with pytest.raises(ValueError, match=message):
        loss(LOGITS, labeled(label))


def test_logits_that_are_not_an_array():
    with pytest.raises(
        ValueError, match=r"`logits` must be an array \[B K\] .*, got \(float32\[2, 3\], 'more'\)\. Pass"
    ):
        softmax_cross_entropy((LOGITS, "more"), labeled(LABEL))


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_label_smoothing_out_of_range(value):
    with pytest.raises(UserError, match=rf"`loss.label_smoothing` must be at least 0 and below 1, got {value}\."):
        CrossEntropy(label_smoothing=value)


@pytest.mark.parametrize("loss", [softmax_cross_entropy, CrossEntropy(label_smoothing=0.1)])
def test_a_label_outside_of_the_classes_has_no_loss(loss):
    """-1 is not the last class."""
    assert np.isnan(loss(LOGITS, labeled(np.array([-1, 3], np.int32)))).all()


def test_balanced_weights_are_those_of_scikit_learn():
    label = np.random.default_rng(0).choice([0, 1, 3], 200, p=[0.7, 0.25, 0.05]).astype(np.int32)
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=label)
    weights = balanced_weights(label, 5)
    np.testing.assert_allclose(weights, [*expected[:2], 0, expected[2], 0], rtol=1e-12)
    assert np.mean([weights[k] for k in label]) == pytest.approx(1)


def test_the_loss_of_each_class_is_weighted():
    loss = softmax_cross_entropy(LOGITS, labeled(LABEL))
    weighted = ClassWeighted(softmax_cross_entropy, (0.5, 2.0, 3.0))
    np.testing.assert_allclose(weighted(LOGITS, labeled(LABEL)), loss * jnp.array([2.0, 3.0]), rtol=1e-6)
    soft = np.array([[0.2, 0.8, 0.0], [0.0, 0.5, 0.5]], np.float32)
    expected = softmax_cross_entropy(LOGITS, labeled(soft)) * jnp.array([1.7, 2.5])
    np.testing.assert_allclose(weighted(LOGITS, labeled(soft)), expected, rtol=1e-6)


def test_the_values_that_a_weighted_loss_names_are_not_weighted():
    def loss_fn(logits, batch):
        return softmax_cross_entropy(logits, batch), {"ones": jnp.ones(2)}

    loss, values = ClassWeighted(loss_fn, (0.0, 1.0, 2.0))(LOGITS, labeled(LABEL))
    np.testing.assert_allclose(loss, softmax_cross_entropy(LOGITS, labeled(LABEL)) * jnp.array([1.0, 2.0]), rtol=1e-6)
    np.testing.assert_array_equal(values["ones"], 1)
