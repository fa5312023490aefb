import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap, norm
from threadpoolctl import threadpool_limits

from wsi_pipeline.errors import CatalogError, RunError
from wsi_pipeline.evaluation.froc import AVERAGE_FPS, FrocHits
from wsi_pipeline.evaluation.uncertainty import (
    CHUNK,
    compare,
    froc_band,
    froc_intervals,
    intervals,
    resample,
)
from wsi_pipeline.evaluation.weighted_metrics import Statistic, binary_statistic, froc_statistic


def means(values):
    """The mean of one value a slide: a statistic whose bootstrap is known."""
    values = np.asarray(values, float)

    def evaluate(weights):
        with np.errstate(invalid="ignore"):
            return (weights @ values / weights.sum(axis=1))[:, None]

    ids = tuple(f"s{i}" for i in range(len(values)))
    return Statistic("means", ids, np.zeros(len(values), int), ("mean",), evaluate)


def own_patients(statistic):
    return {slide: slide for slide in statistic.slide_ids}


def some_slides(seed, size=40, separation=1.0):
    rng = np.random.default_rng(seed)
    label = np.arange(size) % 2
    score = norm.cdf(separation * label + rng.normal(size=size))
    ids = [f"s{i}" for i in range(size)]
    return pd.DataFrame({"slide_id": ids, "label": label, "score": score})


def test_slides_of_a_patient_are_drawn_together_and_unknown_patients_apart():
    weights = resample(["p", "q", "p", None, np.nan], 500, seed=1)
    assert weights.dtype == np.uint16 and weights.shape == (500, 5)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 3] != weights[:, 4]).any()
    # Patients p, q and two unknown ones: four are drawn.
    assert (weights[:, [0, 1, 3, 4]].sum(axis=1) == 4).all()
    # Each is in one of four equally likely places: 4 draws, mean 1, variance 4 * 1/4 * 3/4.
    counts = resample(list("abcd"), 20_000, seed=2).astype(float)
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.03)
    np.testing.assert_allclose(counts.var(axis=0), 0.75, atol=0.03)


def test_one_seed_gives_one_result_whatever_the_order_of_slides():
    patients = ["p", "q", "r", "p", "q"]
    first = resample(patients, 3 * CHUNK + 7, seed=3)
    assert (first == resample(patients, 3 * CHUNK + 7, seed=3)).all()
    assert (first[:, ::-1] == resample(patients[::-1], 3 * CHUNK + 7, seed=3)).all()
    assert (first[:5] == resample(patients, 5, seed=3)).all()
    assert (first[: 2 * CHUNK] == resample(patients, 2 * CHUNK, seed=3)).all()
    assert (first != resample(patients, 3 * CHUNK + 7, seed=4)).any()


def test_bca_agrees_with_scipy_where_the_level_is_not_widened():
    values = np.random.default_rng(0).exponential(size=400)
    found = intervals(means(values), own_patients(means(values)), replicates=20_000)["mean"]
    theirs = bootstrap(
        (values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    # Of 400 patients the level is widened by 0.4 % of the interval.
    width = theirs.high - theirs.low
    np.testing.assert_allclose([found["low"], found["high"]], theirs, atol=0.03 * width)
    # The mean's bootstrap is skewed as the exponential is: the upper arm is the longer one.
    assert found["high"] - values.mean() > 1.05 * (values.mean() - found["low"])


def test_a_mean_of_few_patients_has_an_interval_as_wide_as_students():
    values = norm.ppf((np.arange(10) + 0.5) / 10)  # symmetric: no bias, no skewness
    found = intervals(means(values), own_patients(means(values)), replicates=40_000)["mean"]
    student = 2.262 * values.std(ddof=1) / np.sqrt(10)  # t of 9 degrees of freedom at 97.5 %
    assert found["high"] == pytest.approx(student, rel=0.04)
    assert found["low"] == pytest.approx(-student, rel=0.04)


def test_more_slides_of_a_patient_do_not_narrow_the_interval():
    slides = some_slides(0)
    once = binary_statistic(slides, 0.5, "slides")
    many = pd.concat([slides.assign(slide_id=slides["slide_id"] + f"_{i}") for i in range(5)])
    five_times = binary_statistic(many, 0.5, "slides")
    patients = {slide: slide.split("_")[0] for slide in five_times.slide_ids}
    assert intervals(five_times, patients) == intervals(once, own_patients(once))


def test_an_interval_that_resampling_cannot_give_is_none_with_the_reason():
    perfect = pd.DataFrame({"slide_id": list("abcd"), "label": [1, 0, 1, 0], "score": [1, 0, 1, 0]})
    statistic = binary_statistic(perfect, 0.5, "slides")
    found = intervals(statistic, own_patients(statistic), replicates=400)
    accuracy = found["accuracy"]
    assert (accuracy["low"], accuracy["high"], accuracy["replicates"]) == (None, None, 400)
    assert "vary too little to tell how far 1 may be off" in accuracy["undefined"]
    # A slide of either label is missing with a probability of 2 / 16: those have no AUC.
    assert found["roc_auc"]["replicates"] == pytest.approx(400 * 7 / 8, abs=25)
    one = intervals(statistic, dict.fromkeys("abcd", "p"))["accuracy"]
    assert "one patient" in one["undefined"]

    normal = binary_statistic(perfect.assign(label=0), 0.5, "slides")
    assert "figure itself" in intervals(normal, own_patients(normal))["roc_auc"]["undefined"]
    nothing = binary_statistic(perfect[:0], 0.5, "slides")
    assert "figure itself" in intervals(nothing, {})["accuracy"]["undefined"]


def test_a_figure_that_hangs_on_one_patient_has_no_interval():
    slides = pd.DataFrame(
        {"slide_id": list("abcd"), "label": [1, 1, 0, 0], "score": [0.5, 0.7, 0.6, 0.1]}
    )
    statistic = binary_statistic(slides, 0.5, "slides")
    apart = intervals(statistic, own_patients(statistic))["roc_auc"]
    assert apart["low"] < 0.75 <= apart["high"]  # pairs won: 0.5 one of two, 0.7 both
    one_tumour_patient = {"a": "p", "b": "p", "c": "q", "d": "r"}
    found = intervals(statistic, one_tumour_patient)
    assert found["roc_auc"]["low"] is None and "one patient" in found["roc_auc"]["undefined"]
    assert found["accuracy"]["undefined"] is None


def test_a_slide_without_a_place_among_the_patients_is_refused():
    with pytest.raises(CatalogError, match="s1"):
        intervals(means([1, 2]), {"s0": "p"})
    with pytest.raises(RunError, match="replicates is 0"):
        resample(["p"], 0)


def a_run(seed, slides=30, skill=1.0):
    """Hits of one run: the slides, their lesions and which are averaged are the same in each."""
    rng = np.random.default_rng(seed)
    lesions = np.arange(slides) % 3
    lesion_slide = np.repeat(np.arange(slides), lesions)
    fp_slide = np.repeat(np.arange(slides), rng.poisson(20, slides))
    return FrocHits(
        "corrected", tuple(f"s{i}" for i in range(slides)), lesions, np.ones(slides, bool),
        lesion_slide, rng.normal(skill, size=len(lesion_slide)), fp_slide,
        rng.normal(size=len(fp_slide)),
    )  # fmt: skip


def test_froc_intervals_have_the_shape_of_froc_metrics_and_hold_the_figures():
    hits = a_run(0)
    statistic = froc_statistic(hits)
    found = froc_intervals(hits, own_patients(statistic), replicates=500, seed=5)
    assert list(found["sensitivity_at"]) == [f"{fps:g}" for fps in AVERAGE_FPS]
    figures = statistic.evaluate(np.ones((1, 30)))[0]
    for figure, ends in zip(
        figures, [found["score"], *found["sensitivity_at"].values()], strict=True
    ):
        assert ends["low"] <= figure <= ends["high"]
    again = froc_intervals(hits, own_patients(statistic), replicates=500, seed=5)
    assert found == again


def test_the_band_is_the_interval_of_each_point():
    hits = a_run(1)
    patients = {slide: f"p{int(slide[1:]) // 2}" for slide in hits.slide_ids}
    band = froc_band(hits, patients, (0.5, 0.5000001, 1), replicates=300)
    points = froc_intervals(hits, patients, (0.5, 1), replicates=300)["sensitivity_at"]
    for row, fps in ((0, "0.5"), (2, "1")):
        assert band["low"][row] == points[fps]["low"]
        assert band["high"][row] == points[fps]["high"]
    assert band["sensitivity"].is_monotonic_increasing
    default = froc_band(hits, patients, replicates=300)
    assert default["average_fps"].is_monotonic_increasing
    assert default["average_fps"].iloc[[0, -1]].tolist() == [0, 16]


def test_two_runs_are_compared_on_the_same_resampled_patients():
    slides = some_slides(0)
    rng = np.random.default_rng(1)
    other = slides.assign(score=slides["score"] * (0.7 + 0.3 * rng.random(len(slides))))
    first = binary_statistic(slides, 0.5, "slides")
    second = binary_statistic(other.sample(frac=1, random_state=2), 0.5, "slides")
    patients = {slide: f"p{int(slide[1:]) // 2}" for slide in first.slide_ids}
    found = compare(first, second, patients, replicates=999, seed=3)

    # The same by hand: draw patients, repeat their slides, compute anew.
    weights = resample([patients[slide] for slide in slides["slide_id"]], 999, seed=3)
    right = (slides["score"] >= 0.5) == slides["label"]
    other_right = (other["score"] >= 0.5) == other["label"]
    gaps = np.array(
        [
            np.repeat(right, row).mean() - np.repeat(other_right, row).mean()
            for row in weights.astype(int)
        ]
    ).round(12)
    accuracy = found["accuracy"]
    assert accuracy["first"] == right.mean() and accuracy["second"] == other_right.mean()
    assert accuracy["difference"] == pytest.approx(right.mean() - other_right.mean())
    tail = min(np.sum(gaps <= 0), np.sum(gaps >= 0))
    assert accuracy["p_value"] == min(1, 2 * (tail + 1) / 1000)
    # 20 patients: t of 19 degrees of freedom is 2.093; 2.093 * sqrt(20 / 19) = 2.147.
    ends = np.quantile(gaps, norm.cdf([-2.1474, 2.1474]))
    np.testing.assert_allclose([accuracy["low"], accuracy["high"]], ends, atol=1e-3)


def test_a_run_against_itself_differs_by_nothing():
    hits = a_run(0)
    found = compare(froc_statistic(hits), froc_statistic(hits), dict.fromkeys(hits.slide_ids))
    assert found["score"]["difference"] == 0 and found["score"]["p_value"] == 1
    assert "vary too little" in found["score"]["undefined"]


def test_a_much_better_run_has_the_smallest_p_value_there_is():
    good, bad = froc_statistic(a_run(0, skill=3)), froc_statistic(a_run(0, skill=-1))
    found = compare(good, bad, own_patients(good), replicates=999)["score"]
    assert found["p_value"] == 2 / 1000
    assert 0 < found["low"] < found["difference"] < found["high"]
    turned = compare(bad, good, own_patients(good), replicates=999)["score"]
    assert turned["difference"] == -found["difference"] and turned["p_value"] == 2 / 1000


def test_one_patient_proves_no_difference():
    good, bad = froc_statistic(a_run(0, skill=3)), froc_statistic(a_run(0, skill=-1))
    found = compare(good, bad, dict.fromkeys(good.slide_ids, "p"), replicates=99)["score"]
    assert found["difference"] > 0
    assert found["low"] is None and found["p_value"] is None and "one patient" in found["undefined"]


def test_runs_on_other_slides_another_truth_or_other_figures_are_refused():
    slides = some_slides(0, size=6)
    first = binary_statistic(slides, 0.5, "slides")
    patients = own_patients(first)
    with pytest.raises(RunError, match=r"2 slides are in one run only: s0 \(first\), s9 \(second"):
        other = slides.replace({"slide_id": {"s0": "s9"}})
        compare(first, binary_statistic(other, 0.5, "slides"), patients)
    with pytest.raises(RunError, match="slide s1 has 1 to find in the first run and 0"):
        other = slides.assign(label=[0, 0, 0, 1, 0, 1])
        compare(first, binary_statistic(other, 0.5, "slides"), patients)
    with pytest.raises(RunError, match="patches"):
        compare(first, binary_statistic(slides, 0.5, "patches"), patients)


# The coverage simulation: cohorts of 60 patients with 1 to 3 slides, whose scores share a term.
PATIENTS, COHORTS, FP_RATE, SHARED = 60, 1000, 20, 0.7


def a_drawn_cohort(rng, separation):
    patient = np.repeat(np.arange(PATIENTS), rng.integers(1, 4, PATIENTS))
    label = (rng.random(len(patient)) < 0.4).astype(int)
    own = np.sqrt(1 - SHARED**2) * rng.normal(size=len(patient))
    score = separation * label + SHARED * rng.normal(size=PATIENTS)[patient] + own
    ids = [f"s{i}" for i in range(len(patient))]
    slides = pd.DataFrame({"slide_id": ids, "label": label, "score": score})
    return slides, dict(zip(ids, patient, strict=True))


def drawn_hits(rng, slides, lesion_mean):
    size = len(slides)
    lesions = slides["label"].to_numpy() * (1 + rng.poisson(1, size))
    lesion_slide = np.repeat(np.arange(size), lesions)
    fp_slide = np.repeat(np.arange(size), rng.poisson(FP_RATE, size))
    return FrocHits(
        "corrected", tuple(slides["slide_id"]), lesions, np.ones(size, bool), lesion_slide,
        rng.normal(lesion_mean, size=len(lesion_slide)), fp_slide, rng.normal(size=len(fp_slide)),
    )  # fmt: skip


def true_sensitivity(average_fps, lesion_mean):
    """Of FP_RATE normal scores a slide, average_fps exceed the threshold: invert it."""
    return norm.sf(norm.isf(np.asarray(average_fps) / FP_RATE) - lesion_mean)


def covered(seed, truth, separation, lesion_mean):
    """Which intervals of one cohort hold the truth."""
    rng = np.random.default_rng([20, seed])
    slides, patients = a_drawn_cohort(rng, separation)
    # Two runs with the same true AUC: each adds noise of its own.
    runs = [slides.assign(score=slides["score"] + rng.normal(size=len(slides))) for _ in "ab"]
    first, *pair = (binary_statistic(s, separation / 2, "slides") for s in (slides, *runs))
    hits = froc_statistic(drawn_hits(rng, slides, lesion_mean))
    options = {"replicates": 500, "seed": seed}
    found = intervals(first, patients, **options) | intervals(hits, patients, **options)
    found["difference"] = compare(*pair, patients, **options)["roc_auc"]
    return {
        name: found[name]["low"] is not None
        and found[name]["low"] <= value <= found[name]["high"]
        for name, value in truth.items()
    }  # fmt: skip


@pytest.mark.slow
def test_95_percent_intervals_hold_the_truth_in_93_to_97_percent_of_small_cohorts():
    separation = lesion_mean = 1.5
    called_right = norm.cdf(separation / 2)  # at a threshold halfway: sensitivity, specificity
    sensitivity = true_sensitivity(AVERAGE_FPS, lesion_mean)
    truth = {
        "roc_auc": norm.cdf(separation / np.sqrt(2)), "accuracy": called_right,
        "sensitivity": called_right, "specificity": called_right, "score": sensitivity.mean(),
        **{f"{fps:g}": value for fps, value in zip(AVERAGE_FPS, sensitivity, strict=True)},
        "difference": 0,
    }  # fmt: skip
    with threadpool_limits(1):
        cohorts = [covered(seed, truth, separation, lesion_mean) for seed in range(COHORTS)]
    shares = pd.DataFrame(cohorts).mean()
    assert shares.between(0.93, 0.97).all(), shares
