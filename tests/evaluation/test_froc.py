from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.froc import (
    FrocHits,
    froc_curve,
    froc_metrics,
    lecture_hits,
    lesion_scores,
    sensitivity_at,
    vertices,
)

MODES = ("lecture", "official", "corrected")
CONFIDENCES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])


def hits_of(mode, lesion_scores, fp_scores, slides, lesions=None):
    """A cohort whose lesions and false positives all are on its first slide."""
    counts = np.zeros(slides, int)
    counts[:1] = len(lesion_scores) if lesions is None else lesions
    return FrocHits(
        mode=mode,
        slide_ids=tuple(f"s{i}" for i in range(slides)),
        lesions=counts,
        averaged=np.ones(slides, bool),
        lesion_slide=np.zeros(len(lesion_scores), int),
        lesion_score=np.array(lesion_scores, float),
        fp_slide=np.zeros(len(fp_scores), int),
        fp_score=np.array(fp_scores, float),
    )


@st.composite
def cohorts(draw):
    """Hits of 1 to 4 slides, as each mode has them; the first has a lesion, the last is averaged.

    Entries of isolated tumour cells, which only official has, are zeros beside the lesions.
    """
    mode = draw(st.sampled_from(MODES))
    slides = draw(st.integers(1, 4))
    lesions = draw(st.lists(st.integers(0, 3), min_size=slides, max_size=slides))
    lesions[0] += 1
    itc = draw(st.integers(0, 2)) if mode == "official" else 0
    lesion_slide = [*np.repeat(np.arange(slides), lesions), *[0] * itc]
    never = 0.0 if mode == "official" else -np.inf
    found = st.lists(CONFIDENCES | st.just(never), min_size=sum(lesions), max_size=sum(lesions))
    fp_score = draw(st.lists(CONFIDENCES, max_size=15))
    fp_slide = draw(
        st.lists(st.integers(0, slides - 1), min_size=len(fp_score), max_size=len(fp_score))
    )
    lesion_score = np.array([*draw(found), *[0.0] * itc])
    if mode == "official":
        lesion_score = lesion_score.astype(np.float32).astype(float)
    return FrocHits(
        mode, tuple("abcd"[:slides]), np.array(lesions), np.ones(slides, bool),
        np.array(lesion_slide, int), lesion_score, np.array(fp_slide, int), np.array(fp_score),
    )  # fmt: skip


def plain_loop(hits, t):
    """Sensitivity and average false positives at one threshold; official meets hits in float32."""
    rounded = np.float32(t) if hits.mode == "official" else t
    found = sum(1 for score in hits.lesion_score if score >= rounded)
    false_positives = sum(1 for score in hits.fp_score if score >= t)
    return found / hits.lesions.sum(), false_positives / hits.averaged.sum()


def plain_thresholds(hits):
    scores = {float(s) for s in [*hits.lesion_score, *hits.fp_score] if np.isfinite(s)}
    falling = sorted(scores, reverse=True)
    return [np.inf, *(falling[:-1] if hits.mode == "official" else falling)]


# 4 lesions, of which one is never found, and 5 false positives on 2 slides; 0.5 is in both, 0.75
# doubled. All are exact in float32. Falling thresholds: 0.875 finds 1 lesion; 0.75 adds 2 false
# positives; 0.5 a lesion and a false positive; 0.25 a lesion; 0.125 2 false positives.
LESIONS, FALSE_POSITIVES = [0.875, 0.5, 0.25], [0.5, 0.75, 0.75, 0.125, 0.125]
TABLE = pd.DataFrame(
    {
        "threshold": [np.inf, 0.875, 0.75, 0.5, 0.25, 0.125],
        "sensitivity": [0, 0.25, 0.25, 0.5, 0.75, 0.75],
        "average_fps": [0, 0, 1, 1.5, 1.5, 2.5],
    }
)


@pytest.mark.parametrize(
    ("mode", "never", "sensitivities"),
    [
        # Steps: 0.25 up to 1.5 false positives, then 0.75.
        ("lecture", -np.inf, [0.25, 0.25, 0.25, 0.75, 0.75, 0.75]),
        # Straight lines: level from (0, 0.25) to (1, 0.25), up to (1.5, 0.75), level on.
        ("corrected", -np.inf, [0.25, 0.25, 0.25, 0.75, 0.75, 0.75]),
        # The 0 of the lesion never found is the lowest threshold, and left out.
        ("official", 0, [0.25, 0.25, 0.25, 0.75, 0.75, 0.75]),
    ],
)
def test_hand_worked_curve_with_ties_and_a_lesion_never_found(mode, never, sensitivities):
    curve = froc_curve(hits_of(mode, [*LESIONS, never], FALSE_POSITIVES, slides=2))
    pd.testing.assert_frame_equal(curve.table, TABLE)
    metrics = froc_metrics(curve, slides=2)
    assert list(metrics["sensitivity_at"]) == ["0.25", "0.5", "1", "2", "4", "8"]
    assert list(metrics["sensitivity_at"].values()) == sensitivities
    assert metrics["score"] == pytest.approx(sum(sensitivities) / 6)
    assert (metrics["lesions"], metrics["slides"], metrics["slides_averaged"]) == (4, 2, 2)
    assert metrics["undefined"] is None


@pytest.mark.parametrize(
    ("mode", "fps", "sensitivity"),
    # From (1, 0.25) to (1.5, 0.5) and, at the same false positives, (1.5, 0.75).
    [
        ("lecture", 1.25, 0.25), ("corrected", 1.25, 0.375), ("official", 1.25, 0.375),
        ("lecture", 1.5, 0.75), ("corrected", 1.5, 0.75), ("official", 1.5, 0.75),
    ],
)  # fmt: skip
def test_between_thresholds_the_lecture_steps_and_the_others_interpolate(mode, fps, sensitivity):
    never = 0 if mode == "official" else -np.inf
    curve = froc_curve(hits_of(mode, [*LESIONS, never], FALSE_POSITIVES, slides=2))
    assert sensitivity_at(curve, fps) == sensitivity


def test_official_leaves_out_the_lowest_threshold_even_where_it_is_a_real_one():
    # Both lesions are found, the second with the lowest of all confidences: it is lost.
    official = froc_curve(hits_of("official", [0.75, 0.25], [0.5], slides=1))
    assert official.table["threshold"].tolist() == [np.inf, 0.75, 0.5]
    assert official.table["sensitivity"].tolist() == [0, 0.5, 0.5]
    corrected = froc_curve(hits_of("corrected", [0.75, 0.25], [0.5], slides=1))
    assert corrected.table["threshold"].tolist() == [np.inf, 0.75, 0.5, 0.25]
    assert corrected.table["sensitivity"].tolist() == [0, 0.5, 0.5, 1]
    assert [sensitivity_at(curve, 1) for curve in (official, corrected)] == [0.5, 1]


@pytest.mark.parametrize(("mode", "found"), [("lecture", 1), ("official", 0), ("corrected", 1)])
def test_one_distinct_threshold_is_all_there_is_and_official_drops_it(mode, found):
    curve = froc_curve(hits_of(mode, [0.5, 0.5], [0.5], slides=4))
    assert [sensitivity_at(curve, fps) for fps in (0.25, 8)] == [found, found]


@pytest.mark.parametrize("mode", MODES)
def test_without_any_detection_nothing_is_found(mode):
    never = 0 if mode == "official" else -np.inf
    curve = froc_curve(hits_of(mode, [never, never], [], slides=2))
    assert curve.table.values.tolist() == [[np.inf, 0, 0]]
    assert froc_metrics(curve, slides=2)["score"] == 0


@pytest.mark.parametrize("mode", ["lecture", "corrected"])
def test_no_false_positive_at_all_finds_every_scored_lesion_at_zero(mode):
    assert sensitivity_at(froc_curve(hits_of(mode, [0.5, 0.1], [], slides=3)), 0) == 1


def test_official_meets_hits_in_float32():
    # float32(0.3) is 0.300000012: a threshold of its own, above the false positive's 0.3, at which
    # the lesion is found without it. float32(0.9) is 0.899999976: found already at 0.9.
    three, nine = (float(np.float32(value)) for value in (0.3, 0.9))
    table = froc_curve(hits_of("official", [three, nine, 0], [0.3, 0.9], slides=1)).table
    assert table["threshold"].tolist() == [np.inf, 0.9, nine, three, 0.3]
    assert (table["sensitivity"] * 3).tolist() == [0, 1, 1, 2, 2]
    assert table["average_fps"].tolist() == [0, 1, 1, 1, 2]


def test_official_score_is_that_published_for_monai():
    # MONAI's test vectors: 4 lesions and 3 entries of isolated tumour cells or lesions never found.
    # Vertices (FP, sensitivity): (0, 0), at 1 (0, 0.5), at 0.8 (0.5, 1), at 0.6 (1, 1).
    # At 1/4 halfway from 0.5 to 1, from 1/2 on all: (0.75 + 5) / 6.
    tp = [1, 1, 0, 0, 0.8, 0.8, 0]
    curve = froc_curve(hits_of("official", tp, [0.8, 0.6], slides=2, lesions=4))
    assert froc_metrics(curve, slides=2)["score"] == pytest.approx(0.95833, abs=5e-6)
    assert froc_metrics(curve, slides=2, average_fps=(0.25,))["score"] == 0.75


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("lesions", "slides"), [(0, 2), (1, 0), (0, 0)])
def test_without_lesions_or_averaged_slides_nothing_is_defined(mode, lesions, slides):
    # A slide with a lesion, then `slides` that are averaged over.
    hits = FrocHits(
        mode, tuple(f"s{i}" for i in range(slides + 1)), np.array([lesions] + [0] * slides),
        np.arange(slides + 1) > 0, np.zeros(lesions, int), np.full(lesions, 0.9),
        np.zeros(0, int), np.zeros(0),
    )  # fmt: skip
    curve = froc_curve(hits)
    metrics = froc_metrics(curve, slides=slides + 1)
    assert ("no slide without tumour" if lesions else "no lesion") in metrics["undefined"]
    assert metrics["score"] is None
    assert set(metrics["sensitivity_at"].values()) == {None}
    assert len(vertices(curve)) == 0


def test_isolated_tumour_cells_alone_are_no_lesion():
    curve = froc_curve(hits_of("official", [0, 0], [0.5], slides=1, lesions=0))
    assert "no lesion (ITC aside" in curve.undefined


@given(cohorts())
def test_curve_is_the_plain_loop_over_thresholds(hits):
    curve = froc_curve(hits)
    rows = [(t, *(plain_loop(hits, t) if t < np.inf else (0, 0))) for t in plain_thresholds(hits)]
    plain = pd.DataFrame(rows, columns=curve.table.columns, dtype=float)
    assert {*curve.table.itertuples(index=False)} <= {*plain.itertuples(index=False)}
    pd.testing.assert_frame_equal(vertices(curve), vertices(replace(curve, table=plain)))


@given(cohorts(), st.sampled_from([0, 0.25, 1 / 3, 0.5, 1, 2, 4, 8]))
def test_sensitivity_at_is_read_off_the_plain_loop(hits, fps):
    points = [plain_loop(hits, t) for t in plain_thresholds(hits)]
    best = max(sensitivity for sensitivity, average_fps in points if average_fps <= fps)
    if hits.mode == "lecture":
        expected = best
    else:
        beyond = [point for point in points if point[1] > fps]
        left = max(average_fps for _, average_fps in points if average_fps <= fps)
        expected = best
        if beyond:
            # The next vertex: fewest false positives, and of those the lowest sensitivity.
            sensitivity, right = min(beyond, key=lambda point: (point[1], point[0]))
            expected += (sensitivity - best) * (fps - left) / (right - left)
    assert sensitivity_at(froc_curve(hits), fps) == pytest.approx(expected, abs=1e-12)


@given(cohorts())
def test_vertices_are_the_same_curve_in_fewer_rows(hits):
    curve = froc_curve(hits)
    thin = replace(curve, table=vertices(curve))
    assert thin.table["sensitivity"].value_counts().max() <= 2
    assert thin.table["average_fps"].value_counts().max() <= 2
    for fps in np.arange(0, 21) / 5:
        assert sensitivity_at(thin, fps) == pytest.approx(sensitivity_at(curve, fps), abs=1e-12)


@given(cohorts(), st.data())
def test_weights_repeat_slides(hits, data):
    slides = len(hits.slide_ids)
    weights = data.draw(st.lists(st.integers(0, 3), min_size=slides, max_size=slides))
    copies = np.repeat(np.arange(slides), weights)

    def repeated(slide, score):
        place = [np.flatnonzero(slide == original) for original in copies]
        return (
            np.repeat(np.arange(len(copies)), [len(p) for p in place]),
            score[np.concatenate([*place, np.zeros(0, int)]).astype(int)],
        )

    again = FrocHits(
        hits.mode, tuple(f"copy {i}" for i in range(len(copies))), hits.lesions[copies],
        hits.averaged[copies], *repeated(hits.lesion_slide, hits.lesion_score),
        *repeated(hits.fp_slide, hits.fp_score),
    )  # fmt: skip
    expected, curve = froc_curve(again), froc_curve(hits, weights)
    pd.testing.assert_frame_equal(curve.table, expected.table)
    assert (curve.lesions, curve.slides_averaged, curve.undefined) == (
        expected.lesions, expected.slides_averaged, expected.undefined,
    )  # fmt: skip


def test_129_slides_of_a_hundred_thousand_false_positives_leave_few_rows():
    rng = np.random.default_rng(0)
    hits = hits_of("corrected", rng.random(250), rng.random(12_900_000), slides=129)
    assert len(froc_curve(hits).table) <= 2 * 251 + 1


def test_lecture_counts_the_patches_of_slides_without_tumour():
    patches = pd.DataFrame(
        {
            "slide_id": ["t", "t", "n", "n", "n", "m"],
            # A patch of the tumour slide off its lesion, and one that cannot be read.
            "score": np.array([0.5, 1.0, 0.25, np.nan, 0.75, 0.125], np.float32),
        }
    )
    lesions = pd.DataFrame({"slide_id": ["t", "t"], "score": [0.5, -np.inf]})
    labels = pd.Series({"n": 0, "t": 1, "empty": 0, "m": 0})
    hits = lecture_hits(patches, lesions, labels)
    assert hits.slide_ids == ("n", "t", "empty", "m")
    assert hits.lesions.tolist() == [0, 2, 0, 0]
    assert hits.averaged.tolist() == [True, False, True, True]
    assert hits.lesion_slide.tolist() == [1, 1]
    assert hits.lesion_score.tolist() == [0.5, -np.inf]
    assert hits.fp_slide.tolist() == [0, 0, 3]
    assert hits.fp_score.tolist() == [0.25, 0.75, 0.125]
    # Three slides without tumour, the one without patches included.
    assert froc_curve(hits).table["average_fps"].max() == 1
    # As categories, which the evaluate stage has, it is the same.
    again = lecture_hits(patches.astype({"slide_id": "category"}), lesions, labels)
    assert again.fp_slide.tolist() == [0, 0, 3]


def test_patches_of_a_slide_that_is_not_evaluated_are_refused():
    patches = pd.DataFrame({"slide_id": ["a", "b"], "score": [0.5, 0.5]})
    lesions = pd.DataFrame({"slide_id": [], "score": []})
    with pytest.raises(RunError, match=r"slides \['b'\] that are not evaluated"):
        lecture_hits(patches, lesions, pd.Series({"a": 0}))


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
