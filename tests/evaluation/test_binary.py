import numpy as np
import pandas as pd
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation import binary
from wsi_pipeline.evaluation.binary import (
    binary_metrics,
    by_slide,
    calibration_metrics,
    call_counts,
    is_called,
    reliability_table,
    score_counts,
)


@pytest.fixture
def few_rows_at_once(monkeypatch):
    monkeypatch.setattr(binary, "ROWS_AT_ONCE", 70)


@pytest.mark.parametrize("decimals", [1, 9])
def test_ranking_agrees_with_scikit_learn_with_and_without_ties(decimals, few_rows_at_once):
    rng = np.random.default_rng(decimals)
    scores = np.round(rng.random(300), decimals).astype(np.float32)
    labels = (rng.random(300) < scores).astype(np.int8)
    found = binary_metrics(labels, scores, 0.5)
    assert found["roc_auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    expected = average_precision_score(labels, scores)
    assert found["average_precision"] == pytest.approx(expected, abs=1e-12)


def test_hand_worked_ranking():
    # Pairs of 0.8, 0.4 against 0.6, 0.4, -inf: 3 won; 1 and a half of a tie, 2 1/2 won of 3 + 3.
    # Precision at 0.8: 1 of 1; at 0.4: 2 of 4.
    found = binary_metrics([1, 1, 0, 0, 0], [0.8, 0.4, 0.6, 0.4, -np.inf], 0.5)
    assert found["roc_auc"] == pytest.approx(4.5 / 6)
    assert found["average_precision"] == pytest.approx((1 + 2 / 4) / 2)


def test_a_float32_score_just_under_the_threshold_is_not_called():
    # The float32 nearest to 0.7 is 0.699999988.
    assert is_called(np.float32([0.7, 0.75]), 0.7).tolist() == [False, True]
    assert binary_metrics([1], np.float32([0.7]), 0.7)["fn"] == 1


def test_hand_worked_calls_at_falling_thresholds():
    found = call_counts([1, 0, 1, 0, -1, 1], [0.9, 0.5, 0.5, 0.1, 0.7, np.nan])
    expected = pd.DataFrame(
        {"threshold": [np.inf, 0.9, 0.5, 0.1], "tp": [0, 1, 2, 2], "fp": [0, 0, 1, 2]}
    )
    pd.testing.assert_frame_equal(found, expected)


def test_many_rows_have_few_points_and_all_of_them_on_the_curve():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 20_000), rng.random(20_000, np.float32)
    found = call_counts(labels, scores, points=100)
    assert len(found) <= 2 * 101 + 1
    for share in (found["tp"] / (labels == 1).sum(), found["fp"] / (labels == 0).sum()):
        assert share.iloc[-1] == 1 and np.diff(share).max() < 0.011
    precision, recall, threshold = precision_recall_curve(labels, scores)
    at = np.searchsorted(threshold, found["threshold"][1:])
    np.testing.assert_allclose((found["tp"] / (found["tp"] + found["fp"]))[1:], precision[at])
    np.testing.assert_allclose(found["tp"][1:] / (labels == 1).sum(), recall[at])


def test_slides_come_in_order_whatever_the_order_of_their_rows():
    rows = pd.DataFrame({"slide_id": ["b", "a", "b", "a", "c"], "score": [1, 2, 3, 4, 5]})
    for table in (rows, rows.astype({"slide_id": pd.CategoricalDtype(["x", "a", "b", "c"])})):
        found = {name: part["score"].tolist() for name, part in by_slide(table)}
        assert list(found.items()) == [("a", [2, 4]), ("b", [1, 3]), ("c", [5])]
    assert list(by_slide(rows[:0])) == []


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
def test_calibration_agrees_with_scikit_learn_on_edges_too(bins, few_rows_at_once):
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
