import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.froc import (
    froc_metrics,
    lecture_froc,
    lesion_scores,
    sensitivity_at,
    vertices,
)

SCORES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
COHORTS = st.tuples(
    st.lists(st.one_of(SCORES, st.just(-np.inf)), min_size=1, max_size=6),
    st.lists(st.one_of(SCORES, st.just(np.nan)), max_size=20),
    st.integers(1, 5),
)


def plain_loop(lesions, normal, slides, t):
    found = sum(1 for score in lesions if score >= t)
    false_positives = sum(1 for score in normal if score >= t)
    return found / len(lesions), false_positives / slides


def test_hand_worked_curve_with_ties_and_a_lesion_without_patches():
    # 4 lesions (one never found), 2 normal slides with 5 patches; 0.8 is in both, 0.6 doubled.
    curve = lecture_froc([0.9, 0.8, 0.3, -np.inf], [0.8, 0.6, 0.6, 0.2, 0.1], normal_slides=2)
    expected = pd.DataFrame(
        {
            "threshold": [np.inf, 0.9, 0.8, 0.6, 0.3, 0.2, 0.1],
            "sensitivity": [0, 0.25, 0.5, 0.5, 0.75, 0.75, 0.75],
            "average_fps": [0, 0, 0.5, 1.5, 1.5, 2, 2.5],
        }
    )
    pd.testing.assert_frame_equal(curve.table, expected)

    metrics = froc_metrics(curve, slides=5)
    assert metrics["sensitivity_at"] == {
        "0.25": 0.25, "0.5": 0.5, "1": 0.5, "2": 0.75, "4": 0.75, "8": 0.75,
    }  # fmt: skip
    assert metrics["score"] == pytest.approx(3.5 / 6)
    assert (metrics["lesions"], metrics["slides"], metrics["normal_slides"]) == (4, 5, 2)
    assert metrics["undefined"] is None


def test_sensitivity_jumps_only_where_a_threshold_reaches_it():
    curve = lecture_froc([0.5], [0.9, 0.9], normal_slides=1)
    assert [sensitivity_at(curve, fps) for fps in (0, 1.9, 2, 8)] == [0, 0, 1, 1]


def test_normal_slides_without_patches_count_in_the_average():
    assert lecture_froc([0.5], [0.9], normal_slides=4).table["average_fps"].max() == 0.25


def test_no_false_positive_at_all_finds_every_scored_lesion_at_zero():
    assert sensitivity_at(lecture_froc([0.5, 0.1], [], normal_slides=3), 0) == 1


@pytest.mark.parametrize(
    ("lesions", "normal_slides", "reason"),
    [([], 2, "no lesion"), ([0.9], 0, "no slide without tumour"), ([], 0, "no lesion")],
)
def test_without_lesions_or_normal_slides_nothing_is_defined(lesions, normal_slides, reason):
    curve = lecture_froc(lesions, [], normal_slides)
    metrics = froc_metrics(curve, slides=2)
    assert reason in metrics["undefined"]
    assert metrics["score"] is None
    assert set(metrics["sensitivity_at"].values()) == {None}
    assert len(vertices(curve)) == 0


@given(COHORTS)
def test_curve_is_the_plain_loop_over_thresholds(cohort):
    lesions, normal, slides = cohort
    table = lecture_froc(*cohort).table
    scores = {score for score in [*lesions, *normal] if np.isfinite(score)}
    assert table["threshold"].tolist() == [np.inf, *sorted(scores, reverse=True)]
    for row in table.itertuples():
        assert (row.sensitivity, row.average_fps) == plain_loop(
            lesions, normal, slides, row.threshold
        )


@given(COHORTS, st.sampled_from([0, 0.25, 1 / 3, 0.5, 1, 2, 4, 8]))
def test_sensitivity_at_is_the_best_of_all_thresholds_allowed(cohort, fps):
    best = 0
    for t in [2, 1.0, 0.9, 0.5, 0.25, 0.1, 0.0]:
        sensitivity, average_fps = plain_loop(*cohort, t)
        if average_fps <= fps:
            best = max(best, sensitivity)
    assert sensitivity_at(lecture_froc(*cohort), fps) == best


@given(COHORTS)
def test_vertices_are_the_same_step_function_in_fewer_rows(cohort):
    curve = lecture_froc(*cohort)
    thin = vertices(curve)
    assert thin["sensitivity"].value_counts().max() <= 2
    assert thin["average_fps"].value_counts().max() <= 2
    for fps in np.arange(0, 21) / 5:
        last = np.searchsorted(thin["average_fps"], fps, side="right") - 1
        assert thin["sensitivity"][last] == sensitivity_at(curve, fps)


def test_a_million_normal_patches_take_seconds_and_few_rows():
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    curve = lecture_froc(rng.random(200), rng.random(1_000_000), normal_slides=80)
    thin = vertices(curve)
    assert time.perf_counter() - start < 10
    assert len(curve.table) > 900_000
    assert len(thin) <= 2 * 201


def test_a_lesion_has_the_score_of_its_best_patch():
    patches = pd.DataFrame(
        {
            "slide_id": ["a", "a", "a", "a", "b", "c"],
            # The second patch lies on two lesions; that of b cannot be read.
            "lesions": [[1], np.array([1, 2], np.int32), [], [2], [1], []],
            "score": np.array([0.25, 0.5, 1.0, 0.75, np.nan, 1.0], np.float32),
        }
    )
    table = lesion_scores(patches, {"a": [1, 2, 3], "b": range(1, 2), "c": []})
    expected = pd.DataFrame(
        {
            "slide_id": ["a", "a", "a", "b"],
            "lesion_id": [1, 2, 3, 1],
            "score": [0.5, 0.75, -np.inf, -np.inf],
            "n_patches": [2, 2, 0, 0],
        }
    )
    pd.testing.assert_frame_equal(table, expected)


def test_a_cohort_without_lesions_has_an_empty_table():
    patches = pd.DataFrame({"slide_id": ["a"], "lesions": [[]], "score": [0.5]})
    table = lesion_scores(patches, {"a": []})
    assert list(table.columns) == ["slide_id", "lesion_id", "score", "n_patches"]
    assert len(table) == 0


def test_a_patch_on_a_lesion_that_the_annotation_lacks_is_refused():
    patches = pd.DataFrame({"slide_id": ["a"], "lesions": [[7]], "score": [0.5]})
    with pytest.raises(RunError, match=r"\('a', 7\)"):
        lesion_scores(patches, {"a": [1]})
