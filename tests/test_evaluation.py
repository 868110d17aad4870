"""The scores of a whole data set from a state, as in a loop of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs.research import CONFIG
from sklearn.metrics import balanced_accuracy_score

from cnnjax import Batch, eval_step, evaluate


@pytest.fixture(scope="module")
def test_set(research_run):
    """Returns the standardized images of the test set, and its labels."""
    examples = research_run.load_data("test")
    return research_run.standardize(examples.image), examples.label


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_the_scores_are_those_of_the_run(tta, research_run, test_set):
    scores = evaluate(research_run.state, *test_set, model=CONFIG.model, tta=tta)
    expected = research_run.evaluate(tta=tta)
    assert (scores.accuracy, scores.num_examples) == (expected.accuracy, 37)
    assert scores.loss == pytest.approx(expected.loss)
    assert scores.confusion == expected.confusion
    assert scores.logits.shape == (37, 4)
    examples = research_run.load_data("test")
    np.testing.assert_allclose(scores.logits, research_run.logits(examples.image, tta=tta), atol=1e-6)
    predicted = scores.logits.argmax(1)
    assert scores.balanced_accuracy == pytest.approx(balanced_accuracy_score(examples.label, predicted))


def test_batches_and_their_padding_change_nothing(monkeypatch, research_run, test_set):
    state, model = research_run.state, CONFIG.model
    whole = evaluate(state, *test_set, model=model)
    monkeypatch.setattr("cnnjax.evaluation.EVAL_BATCH_SIZE", 10)
    parts = evaluate(state, *map(jnp.asarray, test_set), model=model)
    np.testing.assert_allclose(parts.logits, whole.logits, atol=1e-6)
    assert parts.loss == pytest.approx(whole.loss) and parts.confusion == whole.confusion
    image, label = test_set
    sums = eval_step(state, Batch(image, label, np.ones(37, bool)), model=model)
    assert float(sums.loss) / 37 == pytest.approx(whole.loss)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_mistakes_are_errors(research_run, test_set, no_type_checks):
    image, label = test_set
    for images, labels, message in (
        (image, label + 1, r"`label` must be from 0 to K-1, .*, got 1 to 4 for logits \[37, 4\]"),
        (image, label - 1, "got -1 to 2 for"),
        (
            image,
            label[:-1],
            r"`label` must be int \[N\], .* got int\d+\[36\] for images float32",
        ),
        (image, np.eye(4)[label], r"`label` must be int \[N\]"),
        (image[:0], label[:0], r"`image` must be \[N H W C\], with at least one image, got float32"),
        (image[0], label[:6], r"`image` must be \[N H W C\]"),
        (image, np.ma.array(label, mask=label == 1), "without a mask"),
        (image.astype(np.uint8), label, "floating-point"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(research_run.state, images, labels, model=CONFIG.model)
