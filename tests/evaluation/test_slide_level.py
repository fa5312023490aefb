import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.errors import CatalogError, RunError
from wsi_pipeline.evaluation.slide_level import (
    accuracy_curve,
    choose_threshold,
    slide_metrics,
    slide_scores,
)

# Few distinct values, 0 and 1 among them, so that ties and edges are common.
SLIDES = st.lists(
    st.tuples(
        st.sampled_from([0, 1]), st.sampled_from([-np.inf, 0.0, 0.125, 0.3, 0.75, 0.76, 1.0])
    ),
    min_size=1,
    max_size=12,
)


def a_split(name, labels, scores):
    slide_ids = [f"{name}_{number}" for number in range(len(labels))]
    return pd.DataFrame({"slide_id": slide_ids, "label": labels, "score": scores})


def test_a_slide_has_the_score_of_its_most_suspicious_patch():
    patches = pd.DataFrame(
        {"slide_id": ["a", "a", "b", "b", "c"], "score": [0.2, 0.6, np.nan, 0.1, np.nan]}
    )
    scores = slide_scores(["c", "a", "b", "without_tissue"], patches)
    assert scores.index.tolist() == ["c", "a", "b", "without_tissue"]
    np.testing.assert_array_equal(scores, [np.nan, 0.6, 0.1, -np.inf])


def test_patches_of_a_slide_that_is_not_evaluated_are_refused():
    with pytest.raises(CatalogError, match="stray"):
        slide_scores(["a"], pd.DataFrame({"slide_id": ["a", "stray"], "score": [0.1, 0.2]}))


def test_hand_worked_curve_with_a_tie_between_the_labels():
    curve = accuracy_curve([1, 1, 0, 0], [0.9, 0.5, 0.5, 0.1])
    expected = pd.DataFrame(
        {
            "threshold": [0.1, 0.5, 0.9, np.inf],
            "accuracy": [0.5, 0.75, 0.75, 0.5],
            "sensitivity": [1, 1, 0.5, 0],
            "specificity": [0, 0.5, 1, 1],
        }
    )
    pd.testing.assert_frame_equal(curve, expected)
    # Right for t in (0.1, 0.5] and (0.5, 0.9], one stretch: its middle.
    assert choose_threshold(curve) == 0.5


def test_a_slide_without_patches_is_negative_at_every_threshold():
    curve = accuracy_curve([1, 0, 0], [-np.inf, -np.inf, 0.4])
    assert curve["threshold"].tolist() == [0.4, np.inf]
    assert curve["sensitivity"].tolist() == [0, 0]
    assert curve["specificity"].tolist() == [0.5, 1]


@given(SLIDES)
def test_curve_is_the_plain_loop(slides):
    labels, scores = map(np.array, zip(*slides, strict=True))
    for row in accuracy_curve(labels, scores).itertuples():
        called = scores >= row.threshold
        assert row.accuracy == np.mean(called == (labels == 1))
        for label, share in ((1, row.sensitivity), (0, 1 - row.specificity)):
            if label in labels:
                assert share == pytest.approx(called[labels == label].mean())
            else:
                assert np.isnan(share)


@given(SLIDES.filter(lambda slides: any(np.isfinite(score) for _, score in slides)))
def test_no_threshold_within_0_and_1_beats_the_chosen_one(slides):
    labels, scores = map(np.array, zip(*slides, strict=True))
    t = choose_threshold(accuracy_curve(labels, scores))
    assert 0 <= t <= 1

    def accuracy(threshold):
        return np.mean((scores >= threshold) == (labels == 1))

    assert accuracy(t) == max(accuracy(threshold) for threshold in np.linspace(0, 1, 401))


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([0, 1], [0.2, 0.8], 0.5),  # perfect: the middle of the gap
        ([0, 1, 0, 1], [0.125, 0.25, 0.375, 0.875], 0.625),  # as good as (0.125, 0.25], wider
        ([1, 0, 1], [0.875, 0.5, 0.25], 0.6875),  # as good as [0, 0.25], wider
        ([1, 0, 1], [1.0, 0.75, 0.25], 0.125),  # equally wide: the lower
        ([0, 1, 0], [1.0, 1.0, 1.0], 0.5),  # calling all negative would need t > 1
        ([0, 1], [0.99999994, 1.0], 0.99999997),  # near 1, between two float32 neighbours
    ],
)
def test_chosen_threshold_is_the_middle_of_the_widest_best_interval(labels, scores, expected):
    curve = accuracy_curve(labels, np.array(scores, np.float32))
    assert choose_threshold(curve) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("scores", [[], [-0.1, 0.5], [0.5, 1.5]])
def test_scores_that_are_no_probabilities_choose_no_threshold(scores):
    with pytest.raises(RunError, match="slide scores"):
        choose_threshold(accuracy_curve([1, 0][: len(scores)], scores))


def test_threshold_comes_from_validation_and_figures_from_test():
    validation = a_split("validation", [0, 1], [0.2, 0.4])
    test = a_split("test", [1, 1, 0, 0], [0.9, 0.1, 0.35, 0.0])
    metrics = slide_metrics(validation, test)
    assert metrics["threshold"] == pytest.approx(0.3)
    assert (metrics["threshold_from"], metrics["threshold_reason"]) == ("validation", None)
    assert (metrics["accuracy"], metrics["sensitivity"], metrics["specificity"]) == (0.5, 0.5, 0.5)
    assert metrics["roc_auc"] == 0.75
    assert metrics["validation"]["accuracy"] == 1


@given(SLIDES)
def test_the_test_split_never_moves_the_threshold(slides):
    validation = a_split("validation", [0, 1, 1], [0.2, 0.4, 0.9])
    labels, scores = map(list, zip(*slides, strict=True))
    assert (
        slide_metrics(validation, a_split("test", labels, scores))["threshold"]
        == (slide_metrics(validation, a_split("test", [], []))["threshold"])
    )


@pytest.mark.parametrize(
    ("labels", "scores", "reason"),
    [
        ([], [], "0 scored slides with tumour and 0 without"),
        ([1, 1], [0.9, 0.8], "2 scored slides with tumour and 0 without"),
        ([1, 0, -1], [0.9, np.nan, 0.1], "1 scored slide with tumour and 0 without"),
    ],
)
def test_a_validation_split_that_cannot_choose_falls_back_and_says_so(labels, scores, reason):
    metrics = slide_metrics(
        a_split("validation", labels, scores), a_split("test", [1, 0], [0.8, 0.6])
    )
    assert (metrics["threshold"], metrics["threshold_from"]) == (0.75, "fallback")
    assert reason in metrics["threshold_reason"]
    assert metrics["accuracy"] == 1


def test_a_slide_in_both_splits_is_refused():
    split = a_split("same", [0, 1], [0.1, 0.9])
    with pytest.raises(CatalogError, match="same_0"):
        slide_metrics(split, split)
