import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from cnnjax import Config, CrossEntropy
from cnnjax.class_scores import Confused, calibrate, top_confusions
from cnnjax.report.analysis import band, differing, judge_fit, most_confident
from cnnjax.report.words import duration, explain_calibration, explain_fit, explain_fits, explain_operation
from cnnjax.runs.statistics import difference_interval, wilson_interval


def predictions(seed=0, n=400, k=5):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(k, 0.3), n).astype(np.float32)
    return probabilities, rng.integers(0, k, n)


def test_wilsons_interval_is_that_of_the_formula():
    z, p, n = 1.959963984540054, 0.9058, 10_000
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    np.testing.assert_allclose(wilson_interval(p, n), (center - half, center + half), rtol=1e-12)
    assert wilson_interval(1.0, 10)[1] == 1.0
    assert wilson_interval(1.0, 10)[0] == pytest.approx(10 / (10 + z**2))


def test_the_interval_of_a_difference_is_that_of_newcombe():
    expected = [(56 / 70, 70, 48 / 80, 80, 0.0524, 0.3339), (10 / 10, 10, 0 / 20, 20, 0.6791, 1.0)]  # Table II of 1998.
    for *measured, low, high in expected:
        np.testing.assert_allclose(difference_interval(*measured), (low, high), atol=5e-5)


def test_calibration_agrees_with_scikit_learn_and_with_a_loop():
    probabilities, label = predictions()
    confidence, correct = probabilities.max(axis=1).astype(np.float64), probabilities.argmax(axis=1) == label
    confidence = confidence.round(5)
    confidence[0] = 1.0
    found = calibrate(confidence, correct)
    right, mean = calibration_curve(correct, confidence, n_bins=15, strategy="uniform")
    full = found.num_examples > 0
    np.testing.assert_allclose(found.accuracy[full], right, rtol=1e-6)
    np.testing.assert_allclose(found.confidence[full], mean, rtol=1e-6)
    error = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        assert found.num_examples[m] == inside.sum()
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert found.error == pytest.approx(error, rel=1e-6)
    assert found.mean_confidence == pytest.approx(confidence.mean(), rel=1e-6)
    assert found.mean_accuracy == pytest.approx(correct.mean())
    edges = calibrate(np.float32([0.2, 0.4, 0.6, 0.8, 1.0]), np.ones(5, bool))
    assert np.flatnonzero(edges.num_examples).tolist() == [2, 5, 8, 11, 14]  # Each is the upper bound of its bin.


def test_chance_is_that_of_a_calibrated_network_in_simulation():
    rng = np.random.default_rng(0)
    confidence = 0.5 + 0.5 * rng.beta(3, 1, 200)
    found = [calibrate(confidence, rng.random(200) < confidence) for _ in range(2000)]
    assert np.mean([x.error for x in found]) == pytest.approx(found[0].by_chance, rel=0.03)
    assert np.std([x.mean_accuracy for x in found]) == pytest.approx(found[0].deviation, rel=0.05)


@pytest.mark.parametrize(
    ("confidence", "accuracy", "n", "words"),
    [
        ([0.8], [0.8], 10_000, "Its probabilities can be taken at face value."),
        ([0.6, 0.9], [0.65, 0.85], 40, "The 40 test images show neither over-confidence nor under-confidence, but"),
        ([0.8], [0.74], 100, "too few to show that it is calibrated: the 95% interval of its accuracy is 64.6%"),
        ([0.999], [1.0], 40, "of its accuracy is 91.2% to 100.0%"),
        ([0.8], [0.74], 1000, "It is over-confident: it is right less often than it says"),
        ([0.6, 0.9], [0.75, 0.95], 1000, "It is under-confident: it is right more often than it says"),
        ([0.6, 0.9], [0.9, 0.6], 1000, "It is over-confident in some bins of confidence, and under-confident in oth"),
        ([0.8, 0.95], [0.7575, 0.9527], 40_000, "It is over-confident: it is right less often than it says"),
        ([0.9], [0.0], 1, "they are too few to show that it is calibrated"),
        ([0.6, 0.9], [0.9, 0.5], 1000, "It is over-confident in some bins of confidence, and under-confident in oth"),
    ],
)
def test_calibration_is_judged_by_what_the_images_show(confidence, accuracy, n, words):
    """A bin of each confidence has the same number of images, of which the given fraction is right."""
    m = n // len(confidence)
    correct = np.concatenate([np.arange(m) < round(x * m) for x in accuracy])
    assert words in explain_calibration(calibrate(np.repeat(confidence, m), correct), Config())[1]


def test_the_most_confident_examples_are_those_of_a_sort():
    probabilities, label = predictions()
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1).round(5)
    mistakes, classes = most_confident(probabilities, label, per_class=3)
    wrong = sorted(np.flatnonzero(predicted != label), key=lambda i: -confidence[i])
    assert [x.example for x in mistakes] == wrong
    for k in range(5):
        certain = sorted(np.flatnonzero((label == k) & (predicted == k)), key=lambda i: -confidence[i])
        assert [x.example for x in classes[k].certain] == certain[:3]
        assert [x.example for x in classes[k].mistakes] == [i for i in wrong if label[i] == k][:3]


def test_top_confusions_are_the_largest_counts_besides_the_diagonal():
    matrix = [[9, 2, 0], [5, 9, 1], [0, 0, 9]]
    assert top_confusions(matrix, 2) == [Confused(1, 0, 5), Confused(0, 1, 2)]
    assert top_confusions(matrix, 9)[-1] == Confused(1, 2, 1)


def history(training, validation, loss, train_loss=(0.9, 0.5, 0.1)):
    columns = {"train_accuracy": training, "train_loss": train_loss, "validation_accuracy": validation}
    columns |= {"validation_loss": loss, "epoch": range(1, 1 + len(loss))}
    return {name: np.array(values) for name, values in columns.items()}


@pytest.mark.parametrize(
    ("loss", "lowest", "over_fitted", "words"),
    [
        ([0.9, 0.5, 0.8, 0.8], 2, True, "over-fits from epoch 3 on. Its validation loss is lowest after epoch 2"),
        ([0.9, 0.5, 0.51, 0.51], 2, False, "no sign of over-fitting: the validation loss ends at 0.5100, near its"),
        ([0.9, 0.5, 0.4], 3, False, "no sign of over-fitting: the validation loss is lowest at the end (0.4000)"),
        (
            [0.9, 0.5, 0.6],
            2,
            False,
            "the validation loss has risen in the last epochs (it ends at 0.6000, and is lowest",
        ),
        ([0.5, 1e-6, 2e-6, 2e-6], 2, False, "no sign of over-fitting"),
        ([0.5, 0.35, 0.3, 0.25, 0.21, 0.2, 0.212], 6, False, "which may be noise"),
        ([0.5, 0.2, 0.6, 0.4, 0.3, 0.215], 2, False, "which may be noise"),
        ([0.5, 0.2, 0.6, 0.5, 0.45, 0.44], 2, True, "This run over-fits from epoch 3 on"),
        ([0.9, 0.5, float("nan")], 2, False, "The validation loss is nan after epoch 3. The training diverges"),
        ([0.9], 1, False, "One epoch shows no trend."),
    ],
)
def test_learning_curves_are_judged(loss, lowest, over_fitted, words):
    score = np.linspace(0.5, 0.9, len(loss))
    curves = history(score, score, loss, train_loss=np.geomspace(0.9, 0.1, len(loss)))
    fit = judge_fit(curves)
    assert (fit.lowest, fit.over_fitted) == (lowest, over_fitted)
    assert words in explain_fit(fit, curves, Config())[0]


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ([0.9, 0.5, 0.51], "it ends at 0.5100, and is lowest (0.5000) after epoch 2"),
        ([0.9, 0.5, 0.4], "lowest at the end"),
    ],
)
def test_a_large_gap_is_not_called_no_over_fitting(loss, words):
    curves = history([0.5, 0.8, 0.99], [0.5, 0.6, 0.62], loss)
    fit = judge_fit(curves)
    assert fit.gap == pytest.approx(0.37)
    lines = explain_fit(fit, curves, Config())
    assert lines[0].startswith("The validation loss has not risen clearly yet: ") and words in lines[0]
    assert "training accuracy is 37.0 points higher than validation accuracy: the network begins to mem" in lines[0]
    assert "37.0 points better on the images that it was trained on" in lines[1]


def test_a_gap_that_may_be_chance_is_called_so():
    curves = history([0.5, 0.8, 0.85], [0.5, 0.7, 0.75], [0.9, 0.5, 0.4])
    few, many, few_for_training = (judge_fit(curves, *numbers) for numbers in ((10**6, 40), (4000, 4000), (40, 4000)))
    assert few.gap == many.gap == judge_fit(curves).gap == pytest.approx(0.1)
    assert few.chance == pytest.approx((0.85 - 0.858, 0.85 - 0.598), abs=1e-3)  # The Wilson interval of 30 of 40.
    assert (
        few_for_training.chance is not None and judge_fit(curves, None, None).chance is None
    )  # Of an earlier version.
    assert many.chance is judge_fit(curves).chance is None
    assert explain_fit(few, curves, Config())[0].endswith(
        "But training accuracy is 10.0 points higher than validation accuracy, which may be chance with so few images "
        "(the 95% interval of the difference between training and validation accuracy is -0.8 to 25.2 points)."
    )
    rises = history([0.5, 0.8, 0.8, 0.85], [0.5, 0.7, 0.7, 0.75], [0.9, 0.5, 0.8, 0.8], train_loss=(0.9, 0.5, 0.3, 0.1))
    doubted, certain = judge_fit(rises, 10**6, 40), judge_fit(rises)
    first = explain_fit(doubted, rises, Config())[0]
    assert first.startswith("This run seems to over-fit from epoch 3 on. ")
    assert "it memorizes them, which may be chance with so few images (the 95% interval" in first
    assert explain_fits([doubted, many]) == (
        "1 of 2 runs over-fits: the validation loss rises while the training loss falls, which may be chance with so "
        "few images. Training accuracy ends 10.0 points above validation accuracy, on average."
    )
    assert "2 of 2 runs over-fit: the validation loss rises while the training loss falls. T" in explain_fits(
        [certain] * 2
    )
    assert explain_fits([few]) == (
        "No run clearly over-fits. Training accuracy ends 10.0 points above validation accuracy, on average, which may "
        "be chance with so few images."
    )
    assert "begins to memorize" in explain_fit(many, curves, Config())[0]
    assert judge_fit(history([0.9], [0.5], [0.9]), 10, 0).chance is None


def test_a_network_that_learns_nothing_has_a_sentence_of_its_own():
    curves = history([0.1, 0.1, 0.1], [0.1, 0.1, 0.1], [2.30, 2.34, 2.5], train_loss=(2.303, 2.302, 2.30))
    fit = judge_fit(curves)
    assert (fit.flat, fit.over_fitted) == (True, False)
    assert explain_fit(fit, curves, Config())[0].startswith(
        "The loss has hardly fallen since the first epoch (training"
    )
    diverging = curves | {"train_loss": np.array([2.30, 2.34, 2.5])}
    assert explain_fit(judge_fit(diverging), diverging, Config())[0] == (
        "The loss has risen since the first epoch (training loss 2.3000 to 2.5000): the network has not learned "
        "anything since then. Perhaps the learning rate is too high."
    )
    without = {name: values for name, values in curves.items() if "validation" not in name}
    negative = curves | {"train_loss": np.array([-2.0, -2.01, -2.01])}
    assert "The loss has hardly fallen" in explain_fit(judge_fit(negative), negative, Config())[0]
    assert explain_fits([judge_fit(without), fit]) == ""
    lines = explain_fit(judge_fit(without), without, Config())
    assert lines[0].startswith("The loss has hardly fallen") and "cannot show over-fitting" in lines[1]


def test_a_validation_loss_that_rises_with_the_training_loss_is_no_over_fitting():
    loss = [0.9, 0.5, 0.8, 0.8]
    curves = history([0.5, 0.8, 0.6, 0.6], [0.5, 0.8, 0.6, 0.6], loss, train_loss=loss)
    fit = judge_fit(curves)
    assert (fit.lowest, fit.rises, fit.over_fitted) == (2, True, False)
    assert "this is not over-fitting; perhaps the learning rate is too high" in explain_fit(fit, curves, Config())[0]


def test_curves_without_validation_show_no_over_fitting():
    curves = {"epoch": np.array([1, 2]), "train_loss": np.array([1.0, 0.5])}
    fit = judge_fit(curves)
    assert (fit.lowest, fit.over_fitted, fit.gap) == (None, False, None)
    assert "cannot show over-fitting" in explain_fit(fit, curves, Config())[0]


def test_another_training_loss_is_not_compared_with_the_validation_loss():
    curves = history([0.5, 0.6], [0.5, 0.6], [0.9, 0.5], train_loss=(0.9, 0.5))
    smoothed = Config(loss=CrossEntropy(label_smoothing=0.2), class_weights="balanced")
    of_mixed = {name: values for name, values in curves.items() if name != "train_accuracy"}  # As with Mixup.
    for columns, config, reasons in (
        (curves, smoothed, "label smoothing of 0.2, class weights"),
        (of_mixed, smoothed, "label smoothing of 0.2, class weights, labels that the augmentation changes"),
        (of_mixed, Config(), "labels that the augmentation changes"),
    ):
        last = explain_fit(judge_fit(columns), columns, config)[-1]
        assert last.startswith(f"The training loss is computed with {reasons}, the validation loss is the plain cross")
    assert not any("plain cross-entropy" in line for line in explain_fit(judge_fit(curves), curves, Config()))


def test_a_band_has_the_mean_and_the_extremes_of_the_seeds_that_reached_an_epoch():
    both, one = {"epoch": np.array([1, 2])}, {"epoch": np.array([1])}
    histories = [both | {"x": np.array([1.0, 4.0])}, both | {"x": np.array([3.0, np.nan])}, one]
    found = band(histories, "x")
    assert found is not None
    np.testing.assert_array_equal(np.stack(found), [[1, 2], [2, 4], [1, 4], [3, 4]])
    assert band(histories, "y") is None


def test_differing_keeps_what_is_not_the_same_in_all():
    assert differing([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1}]) == {"b": [2, 3, None]}


def test_words():
    assert [duration(x) for x in (4.24, 107.0, 7500.0)] == ["4.2 s", "1 min 47 s", "2 h 5 min"]
    assert "negative value to zero" in explain_operation("ReLU")
    assert explain_operation("other") == ""
