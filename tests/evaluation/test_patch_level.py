import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.patch_level import patch_metrics, patch_metrics_by_slide

FIGURES = ("accuracy", "sensitivity", "specificity", "roc_auc", "average_precision")


def test_hand_worked_patches():
    metrics = patch_metrics([1, 1, 1, 0, 0], [0.9, 0.75, 0.2, 0.8, 0.1])

    assert {key: metrics[key] for key in ("tp", "fn", "fp", "tn")} == {
        "tp": 2, "fn": 1, "fp": 1, "tn": 1,
    }  # fmt: skip
    assert (metrics["n"], metrics["positives"]) == (5, 3)
    assert metrics["accuracy"] == 3 / 5
    assert metrics["sensitivity"] == 2 / 3
    assert metrics["specificity"] == 1 / 2
    # Of the 6 pairs (tumour, normal) the tumour patch wins 0.9 > both, 0.75 > 0.1, 0.2 > 0.1.
    assert metrics["roc_auc"] == pytest.approx(4 / 6)
    # Precision at the three tumour patches in falling order: 1/1, 2/3, 3/4.
    assert metrics["average_precision"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert metrics["undefined"] is None
    # Squares of score minus label: 0.01, 0.0625, 0.64, 0.64, 0.01. Each patch has a bin of its
    # own but for 0.75 and 0.8 (mean 0.775, half of them tumour).
    assert metrics["brier"] == pytest.approx(1.3625 / 5)
    assert metrics["calibration_error"] == pytest.approx((0.1 + 0.8 + 0.1 + 2 * 0.275) / 5)


def test_a_score_equal_to_the_threshold_is_positive():
    assert patch_metrics([1, 0], [0.75, 0.7499])["accuracy"] == 1


def test_a_float32_score_is_not_compared_at_float32_precision():
    score = np.float32(0.7)  # 0.699999988...
    assert patch_metrics([0], np.array([score]), threshold=0.7)["fp"] == 0


def test_agrees_with_scikit_learn_under_ties():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 3000)
    scores = np.round(np.clip(rng.normal(0.4 + 0.2 * labels, 0.3), 0, 1), 2)
    metrics = patch_metrics(labels, scores.astype(np.float32), threshold=0.5)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(labels, scores >= 0.5))
    assert metrics["roc_auc"] == pytest.approx(roc_auc_score(labels, scores))
    assert metrics["average_precision"] == pytest.approx(average_precision_score(labels, scores))


def test_unreadable_and_unknown_patches_are_left_out_and_counted():
    metrics = patch_metrics([1, 0, 1, 0, -1, -1], [0.9, 0.1, np.nan, np.nan, 0.9, np.nan])
    assert (metrics["n"], metrics["unscored"], metrics["unknown"]) == (2, 2, 2)
    assert metrics["accuracy"] == 1


@pytest.mark.parametrize(
    ("labels", "undefined", "reason"),
    [
        ([0, 0], {"sensitivity", "roc_auc", "average_precision"}, "no positive"),
        ([1, 1], {"specificity", "roc_auc", "average_precision"}, "no negative"),
        ([-1, -1], set(FIGURES), "nothing with a known label"),
    ],
)
def test_what_one_class_leaves_undefined_is_none_with_a_reason(labels, undefined, reason):
    metrics = patch_metrics(labels, [0.9, 0.1])
    assert {name for name in FIGURES if metrics[name] is None} == undefined
    assert reason in metrics["undefined"]


@pytest.mark.parametrize(("labels", "found"), [([2, 0], r"\[2\]"), ([1], r"\(1,\) labels")])
def test_labels_that_cannot_be_are_refused(labels, found):
    with pytest.raises(RunError, match=found):
        patch_metrics(labels, [0.5, 0.5])


def test_by_slide_gives_each_slide_its_own_figures():
    patches = pd.DataFrame(
        {
            "slide_id": ["b", "a", "b", "a", "b"],
            "label": np.array([1, 0, 0, 0, 1], np.int8),
            "score": np.array([0.9, 0.8, 0.1, 0.2, np.nan], np.float32),
        }
    )
    table = patch_metrics_by_slide(patches).set_index("slide_id")
    assert list(table.index) == ["a", "b"]
    assert table["accuracy"].tolist() == [0.5, 1]
    assert table["unscored"].tolist() == [0, 1]
    assert np.isnan(table["roc_auc"]["a"]) and table["roc_auc"]["b"] == 1


def test_by_slide_of_no_patches_is_an_empty_table_with_the_same_columns():
    empty = pd.DataFrame({"slide_id": [], "label": [], "score": []})
    table = patch_metrics_by_slide(empty)
    assert len(table) == 0 and {"slide_id", "roc_auc", "tp"} <= set(table.columns)
