import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

from wsi_pipeline.evaluation.froc import AVERAGE_FPS, FrocHits
from wsi_pipeline.evaluation.weighted_metrics import binary_statistic, froc_statistic

MODES = ("lecture", "official", "corrected")


def some_hits(rng, mode, slides=5, values=6):
    """A cohort with few distinct scores, so that ties and equal thresholds are common."""
    scores = np.round(np.linspace(0.1, 0.9, values), 2)
    tumour = rng.random(slides) < 0.6
    lesions = np.where(tumour, rng.integers(0, 4, slides), 0)
    lesion_slide = np.repeat(np.arange(slides), lesions)
    lesion_score = rng.choice(scores, len(lesion_slide))
    lesion_score[rng.random(len(lesion_slide)) < 0.3] = 0 if mode == "official" else -np.inf
    if mode == "official":  # labels of isolated tumour cells, kept as zeros
        itc = rng.integers(0, slides, rng.integers(0, 3))
        lesion_slide = np.concatenate([lesion_slide, itc])
        lesion_score = np.concatenate([lesion_score, np.zeros(len(itc))])
        lesion_score = lesion_score.astype(np.float32).astype(np.float64)  # 0.1 is not 0.1 then
    averaged = ~tumour if mode == "lecture" else np.ones(slides, bool)
    fp_slide = rng.choice(np.append(np.flatnonzero(averaged), -1), rng.integers(0, 25))
    fp_slide = fp_slide[fp_slide >= 0]
    return FrocHits(
        mode, tuple(f"s{i}" for i in range(slides)), lesions, averaged, lesion_slide,
        lesion_score, fp_slide, rng.choice(scores, len(fp_slide)),
    )  # fmt: skip


def repeated(hits, weights):
    """The cohort in which each slide is there as often as its weight says."""
    lesion, fp = weights[hits.lesion_slide], weights[hits.fp_slide]
    slides = np.repeat(np.arange(len(weights)), weights)
    return (
        np.repeat(hits.lesion_score, lesion), np.repeat(hits.fp_score, fp),
        hits.lesions[slides].sum(), hits.averaged[slides].sum(),
    )  # fmt: skip


def brute_force(hits, weights, average_fps=AVERAGE_FPS):
    """Score and sensitivities by the definition, a plain loop over all thresholds."""
    lesion_scores, fp_scores, lesions, slides = repeated(hits, weights)
    if not lesions or not slides:
        return [np.nan] * (1 + len(average_fps))
    thresholds = sorted({x for x in [*lesion_scores, *fp_scores] if x > -np.inf}, reverse=True)
    if hits.mode == "official":
        thresholds = thresholds[:-1]
    fps, sensitivity = [0.0], [0.0]
    for threshold in thresholds:
        meets_lesion = np.float32(threshold) if hits.mode == "official" else threshold
        fps.append(np.sum(fp_scores >= threshold) / slides)
        sensitivity.append(np.sum(lesion_scores >= meets_lesion) / lesions)
    if hits.mode == "lecture":
        at = [max(y for x, y in zip(fps, sensitivity, strict=True) if x <= q) for q in average_fps]
    else:
        at = np.interp(average_fps, fps, sensitivity).tolist()
    return [np.mean(at), *at]


@pytest.mark.parametrize("mode", MODES)
def test_froc_of_weights_is_that_of_the_repeated_slides_from_scratch(mode):
    rng = np.random.default_rng(0)
    points = (0, 0.1, 0.25, 1 / 3, 0.5, 1, 2, 3.3, 8)
    checked = bent = 0
    for _ in range(150):
        hits = some_hits(rng, mode)
        weights = rng.integers(0, 4, (6, len(hits.slide_ids)))
        found = froc_statistic(hits, points).evaluate(weights.astype(float))
        expected = np.array([brute_force(hits, row, points) for row in weights])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
        checked += np.isfinite(expected[:, 0]).sum()
        lesions = np.array([repeated(hits, row)[2] for row in weights])[:, None]
        whole = expected[:, 1:] * lesions
        bent += np.sum(np.abs(whole - np.round(whole)) > 1e-9)
    assert checked > 500
    assert (bent > 100) == (mode != "lecture")  # slanted stretches are among those compared


def a_cohort(mode, **changes):
    """Lesions 0.9 and 0.5 in slide a, one in b that was not found; false positives 0.5 and 0.3."""
    hits = {
        "slide_ids": ("a", "b", "c"), "lesions": np.array([2, 1, 0]),
        "averaged": np.array([False, False, True] if mode == "lecture" else [True] * 3),
        "lesion_slide": np.array([0, 0, 1]),
        "lesion_score": np.array([0.9, 0.5, 0.0 if mode == "official" else -np.inf]),
        "fp_slide": np.array([2, 2, 2]), "fp_score": np.array([0.5, 0.5, 0.3]),
    }  # fmt: skip
    return FrocHits(mode, **(hits | changes))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # Vertices (FP a slide, lesions found), one slide averaged: (0, 1), (2, 2), (3, 2).
        ("lecture", [1 / 3, 1 / 3, 2 / 3, 2 / 3]),
        # Three slides averaged: (0, 0), (0, 1), (2/3, 2), (1, 2); at 1/3 halfway to 2.
        ("corrected", [1.5 / 3, 2 / 3, 2 / 3, 2 / 3]),
        # The lowest threshold is 0, of the lesion not found; nothing else changes.
        ("official", [1.5 / 3, 2 / 3, 2 / 3, 2 / 3]),
    ],
)
def test_hand_worked_sensitivities(mode, expected):
    found = froc_statistic(a_cohort(mode), (1 / 3, 1, 2, 3)).evaluate(np.ones((1, 3)))
    np.testing.assert_allclose(found, [[np.mean(expected), *expected]])


def test_official_leaves_out_the_lowest_threshold_of_the_slides_drawn():
    # Slides a and c: scores 0.9, 0.5 and 0.5, 0.5, 0.3; the lowest, 0.3, is no lesion's. Without
    # c's false positive 0.3 it is 0.5, and the lesion at 0.5 is never counted.
    drawn = np.array([[1.0, 0, 1]])
    with_low = froc_statistic(a_cohort("official"), (8,)).evaluate(drawn)
    high = {"fp_slide": np.array([2, 2]), "fp_score": np.array([0.5, 0.5])}
    without = froc_statistic(a_cohort("official", **high), (8,)).evaluate(drawn)
    assert (with_low[0, 1], without[0, 1]) == (1, 0.5)


@pytest.mark.parametrize("mode", MODES)
def test_without_lesions_or_slides_to_average_over_nothing_is_defined(mode):
    statistic = froc_statistic(a_cohort(mode))
    weights = np.array([[0.0, 0, 1], [1, 1, 0], [0, 0, 0]])
    defined = ~np.isnan(statistic.evaluate(weights)).any(axis=1)
    assert defined.tolist() == [False, mode != "lecture", False]


def test_a_cohort_without_any_detection_finds_nothing():
    none = {"lesion_score": np.full(3, -np.inf), "fp_slide": np.zeros(0, int)}
    hits = a_cohort("corrected", **none, fp_score=np.zeros(0))
    assert froc_statistic(hits).evaluate(np.ones((1, 3))).tolist() == [[0] * 7]


ROWS = st.lists(
    st.tuples(
        st.sampled_from("abcd"),
        st.sampled_from([1, 0]),
        st.sampled_from([-np.inf, 0.0, 0.2, 0.5, 0.7]),
    ),
    min_size=1,
    max_size=25,
)


@given(ROWS, st.integers(0, 1000))
@settings(max_examples=40)
def test_binary_figures_agree_with_scikit_learn_on_weighted_rows(rows, seed):
    table = pd.DataFrame(rows, columns=["slide_id", "label", "score"])
    statistic = binary_statistic(table, 0.5, "patches")
    weights = np.random.default_rng(seed).integers(0, 4, (3, len(statistic.slide_ids)))
    found = statistic.evaluate(weights.astype(float))
    for row, figures in zip(weights, found, strict=True):
        weight = table["slide_id"].map(dict(zip(statistic.slide_ids, row, strict=True)))
        truth, score = table["label"], np.nan_to_num(table["score"])
        called = score >= 0.5
        present = {int(label) for label in truth[weight > 0]}
        expected = [
            roc_auc_score(truth, score, sample_weight=weight) if len(present) == 2 else np.nan,
            accuracy_score(truth, called, sample_weight=weight) if present else np.nan,
            recall_score(truth, called, sample_weight=weight) if 1 in present else np.nan,
            recall_score(truth, called, sample_weight=weight, pos_label=0)
            if 0 in present
            else np.nan,
        ]
        np.testing.assert_allclose(figures, expected, atol=1e-12)


def test_hand_worked_weights_of_patches():
    table = pd.DataFrame(
        {
            "slide_id": ["a", "a", "a", "b", "b", "b", "c"],
            "label": [1, 1, 0, 0, 0, -1, 1],
            "score": [0.9, 0.4, 0.4, 0.6, 0.1, 0.9, np.nan],
        }
    )
    statistic = binary_statistic(table, 0.5, "patches")
    assert statistic.slide_ids == ("a", "b")  # c has no row with a label and a score
    assert statistic.truth.tolist() == [2, 0]
    # Pairs won of tumour 0.9, 0.4: against a's 0.4 1 + 1/2 of 2, against b's 0.6, 0.1 2 + 1 of 4.
    # a twice, b once: (4 * 1.5 + 2 * 3) of (4 tumour rows * 4 normal rows).
    # Right at 0.5: a 2 of 3, b 1 of 2, so (2 * 2 + 1) of (2 * 3 + 2).
    expected = [12 / 16, 5 / 8, 2 / 4, 3 / 4]
    np.testing.assert_allclose(statistic.evaluate(np.array([[2.0, 1]])), [expected])
    # b alone has no tumour row; its normal rows are called 1 of 2 right.
    np.testing.assert_allclose(
        statistic.evaluate(np.array([[0.0, 1]])), [[np.nan, 0.5, np.nan, 0.5]]
    )
