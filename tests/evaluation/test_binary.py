import numpy as np
import pandas as pd
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_curve

from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.binary import calibration_metrics, reliability_table, score_counts


def test_hand_worked_reliability_of_two_bins():
    # 0.5 belongs to the lower bin, which it closes; 0.3 has no label, the last no score.
    labels, scores = [0, 1, 0, 1, 1, -1, 1], [0.0, 0.5, 0.1, 0.6, 1.0, 0.3, np.nan]
    expected = pd.DataFrame(
        {
            "low": [0, 0.5], "high": [0.5, 1], "n": [3, 2],
            "mean_probability": [0.2, 0.8], "share_positive": [1 / 3, 1],
        }
    )  # fmt: skip
    pd.testing.assert_frame_equal(
        reliability_table(labels, scores, bins=2), expected, check_dtype=False
    )
    metrics = calibration_metrics(labels, scores, bins=2)
    # Squares: 0, 0.25, 0.01, 0.16, 0. Gaps: 3 of 5 rows 1/3 - 0.2, 2 of 5 rows 0.2.
    assert metrics["brier"] == pytest.approx(0.42 / 5)
    assert metrics["calibration_error"] == pytest.approx(3 / 5 * (1 / 3 - 0.2) + 2 / 5 * 0.2)


@pytest.mark.parametrize("bins", [1, 5, 10, 20])
def test_calibration_agrees_with_scikit_learn_on_edges_too(bins):
    rng = np.random.default_rng(bins)
    probability = np.concatenate([np.round(rng.beta(0.5, 2, 5000), 2), np.linspace(0, 1, 21)])
    labels = (rng.random(len(probability)) < probability**1.5).astype(int)
    table = reliability_table(labels, probability, bins)
    filled = table[table["n"] > 0]
    share, mean = calibration_curve(labels, probability, n_bins=bins)
    np.testing.assert_allclose(filled["share_positive"], share)
    np.testing.assert_allclose(filled["mean_probability"], mean)
    assert table["n"].sum() == len(labels)
    brier = calibration_metrics(labels, probability, bins)["brier"]
    assert brier == pytest.approx(brier_score_loss(labels, probability))


def test_an_empty_bin_has_no_mean_and_nothing_has_no_figure():
    table = reliability_table([1], [0.95])
    assert table["n"].tolist() == [0] * 9 + [1]
    assert table["mean_probability"][:9].isna().all()
    assert calibration_metrics([-1, 1], [0.5, np.nan]) == {"brier": None, "calibration_error": None}


@pytest.mark.parametrize("score", [-0.01, 1.5, -np.inf])
def test_a_score_that_is_no_probability_is_refused(score):
    with pytest.raises(RunError, match=f"probability {score:g}"):
        calibration_metrics([1, 0], [0.5, score])


def test_the_brier_score_of_calibrated_probabilities_is_the_integral():
    rng = np.random.default_rng(0)
    probability = rng.random(2_000_000)
    labels = (rng.random(2_000_000) < probability).astype(np.int8)
    metrics = calibration_metrics(labels, probability)
    assert metrics["calibration_error"] < 0.005
    assert metrics["brier"] == pytest.approx(1 / 6, abs=0.001)  # the integral of p (1 - p)


def test_counts_in_bins_give_the_roc_of_binned_scores():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(-1, 2, 500), rng.random(500)
    table = score_counts(labels, scores, bins=20)
    assert table[["positive", "negative"]].sum().tolist() == [
        (labels == 1).sum(), (labels == 0).sum(),
    ]  # fmt: skip
    assert table.loc[3, ["low", "high"]].tolist() == pytest.approx([0.15, 0.2])
    inside = (labels == 1) & (scores > 0.15) & (scores <= 0.2)
    assert table.loc[3, "positive"] == inside.sum()
    known = labels >= 0
    binned = np.ceil(scores[known] * 20)
    false, true, _ = roc_curve(labels[known], binned, drop_intermediate=False)
    found = table["positive"][::-1].cumsum() / (labels == 1).sum()
    np.testing.assert_allclose(found, true[1:])
    np.testing.assert_allclose(table["negative"][::-1].cumsum() / (labels == 0).sum(), false[1:])
