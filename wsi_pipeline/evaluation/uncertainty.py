"""How sure a cohort's figures are, and whether two runs differ: bootstrap over patients.

Slides of one patient resemble each other, so patients are drawn with replacement, with all their
slides, as many as there are. The spread of a figure over the resampled cohorts stands for its
spread over cohorts that could have been collected. The model is taken as given: what another
training would change is not in it.

The intervals of figures are BCa intervals (Efron, Better bootstrap confidence intervals, J. Am.
Stat. Assoc. 82, 1987), those of differences percentile intervals, both at the wider level that
makes a percentile interval of a mean as wide as Student's (Hesterberg, What teachers should know
about the bootstrap, Am. Stat. 69, 2015). A simulation chose them. Of 1,000 cohorts of 60 patients
(1 to 3 correlated slides each), a nominal 95 % covered the truth in 91.1 to 95.9 % (plain
percentile; least for an AUC of 0.96), 91.5 to 96.5 % (percentile at the wider level), 93.8 to
95.8 % (BCa), 94.3 to 96.1 % (BCa at the wider level) for AUC, accuracy, sensitivity and FROC. A
difference of two AUCs, of 40 and of 60 patients: 95.2 to 96.5 % (percentile at the wider level),
92.7 to 95.7 % (BCa at it). With 30 and 40 patients the intervals used held 92.5 to 97.5 % (400
cohorts).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.special import ndtr, ndtri, stdtrit

from wsi_pipeline.errors import CatalogError, RunError
from wsi_pipeline.evaluation.froc import AVERAGE_FPS, FrocHits
from wsi_pipeline.evaluation.weighted_metrics import Statistic, froc_statistic

REPLICATES = 2000
LEVEL = 0.95
# Linear up to the first point of CAMELYON16's score and logarithmic from there, as it is drawn.
BAND_FPS = (*np.linspace(0, 0.25, 9)[:-1].tolist(), *np.geomspace(0.25, 16, 49).tolist())
CHUNK = 250  # replicates evaluated at a time: memory does not grow with their number


def resample(patients: Sequence, replicates: int = REPLICATES, seed: int = 0) -> np.ndarray:
    """How often each slide is in each resampled cohort.

    Parameters
    ----------
    patients : sequence, length S
        The patient of each slide; None or NaN: unknown, the slide is drawn by itself.
    replicates : int
    seed : int

    Returns
    -------
    uint16 array, shape (replicates, S)
        Equal for all slides of a patient; over patients each row adds up to their number. The
        same for the same patients and seed in any order of the slides, if all are known.

    Raises
    ------
    RunError
        If `replicates` is less than 1.
    """
    return _resample(_clusters(patients), replicates, seed)


def _clusters(patients: Sequence) -> np.ndarray:
    """Patients as numbers from 0, int array of shape (S,)."""
    values = np.empty(len(patients), object)
    values[:] = list(patients)
    cluster, known = pd.factorize(values, sort=True)
    alone = cluster < 0
    cluster[alone] = len(known) + np.arange(alone.sum())
    return cluster


def _resample(cluster: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    if replicates < 1:
        raise RunError(f"replicates is {replicates}: one or more are needed")
    rng = np.random.default_rng([seed, *b"bootstrap"])
    patients = cluster.max(initial=-1) + 1
    weights = np.zeros((replicates, len(cluster)), np.uint16)
    for start in range(0, replicates if patients else 0, CHUNK):
        rows = min(CHUNK, replicates - start)
        drawn = rng.integers(patients, size=(rows, patients)) + patients * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * patients).reshape(rows, patients)
        weights[start : start + rows] = times[:, cluster]
    return weights


def intervals(
    statistic: Statistic,
    patients: Mapping[str, str | None],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, dict]:
    """The interval of each of a statistic's figures.

    Parameters
    ----------
    statistic : Statistic
        `froc_statistic` or `binary_statistic`.
    patients : mapping
        Each slide's patient; None: unknown, the slide is drawn by itself.
    replicates, seed : int
    level : float
        In (0, 1).

    Returns
    -------
    dict
        For each name ``low``, ``high`` (None if undefined), ``replicates``: those in which the
        figure was defined, and ``undefined``: why there is no interval, or None. There is none
        if the figure is undefined, in the cohort or without one of its patients (the only one
        with tumour, say), and where both ends are one value (all slides are called rightly, say):
        the replicates then cannot tell how far it may be off, and an interval of no width would
        claim certainty.

    Raises
    ------
    CatalogError
        If a slide is not in `patients`.
    """
    estimate, drawn, left_out = _resampled(statistic, patients, replicates, seed)
    return {
        name: _interval(estimate[i], drawn[:, i], left_out[:, i], level, bca=True)
        for i, name in enumerate(statistic.names)
    }


def froc_intervals(
    hits: FrocHits,
    patients: Mapping[str, str | None],
    average_fps: Sequence[float] = AVERAGE_FPS,
    **options,
) -> dict:
    """`intervals` of the FROC score and its sensitivities, in the shape of `froc_metrics`.

    Parameters
    ----------
    hits : FrocHits
    patients, **options
        See `intervals`.
    average_fps : sequence of float

    Returns
    -------
    dict
        ``score`` and ``sensitivity_at``, keyed by `average_fps` as text.
    """
    found = intervals(froc_statistic(hits, average_fps), patients, **options)
    return {"score": found.pop("score"), "sensitivity_at": found}


def froc_band(
    hits: FrocHits,
    patients: Mapping[str, str | None],
    average_fps: Sequence[float] = BAND_FPS,
    **options,
) -> pd.DataFrame:
    """The interval of the sensitivity at each of many points, to be drawn around the curve.

    Each point's interval is right by itself; the band does not hold the whole true curve with
    the same probability.

    Parameters
    ----------
    hits : FrocHits
    patients, **options
        See `intervals`.
    average_fps : sequence of float
        Rising.

    Returns
    -------
    DataFrame
        ``average_fps, sensitivity, low, high``; NaN where undefined.
    """
    statistic = froc_statistic(hits, average_fps)
    names = ("score", *map(str, range(len(average_fps))))  # close points may share a text
    found = list(intervals(replace(statistic, names=names), patients, **options).values())[1:]
    estimate = statistic.evaluate(np.ones((1, len(hits.slide_ids))))[0, 1:]
    band = {"average_fps": average_fps, "sensitivity": estimate}
    for end in ("low", "high"):
        band[end] = [interval[end] for interval in found]
    return pd.DataFrame(band, dtype="float64")


def compare(
    first: Statistic,
    second: Statistic,
    patients: Mapping[str, str | None],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, dict]:
    """Paired comparison of two runs: the same resampled patients for both.

    Parameters
    ----------
    first, second : Statistic
        The same statistic of two runs on the same slides, in any order.
    patients, replicates, seed, level
        See `intervals`.

    Returns
    -------
    dict
        For each name ``first`` and ``second``, the two figures; ``difference``, first minus
        second; ``low, high, replicates, undefined`` of the difference, see `intervals`; and
        ``p_value``, two-sided: with d the difference in each of n replicates,

            p = min(1, 2 min(#{d <= 0} + 1, #{d >= 0} + 1) / (n + 1)),

        never under 2 / (n + 1). What is undefined is None; so is the p-value of a single patient,
        or of a figure that hangs on one.

    Raises
    ------
    RunError
        If the runs were not evaluated on the same slides, with the same truth, in the same way;
        the message names slides that differ.
    CatalogError
        If a slide is not in `patients`.
    """
    order = _aligned(first, second)

    def difference(weights):
        return first.evaluate(weights) - second.evaluate(weights[:, order])

    paired = replace(first, evaluate=difference)
    estimate, drawn, left_out = _resampled(paired, patients, replicates, seed)
    every = np.ones((1, len(order)))
    one, other = first.evaluate(every)[0], second.evaluate(every)[0]
    return {
        name: {
            "first": _number(one[i]),
            "second": _number(other[i]),
            "difference": _number(estimate[i]),
            **_interval(estimate[i], drawn[:, i], left_out[:, i], level, bca=False),
            "p_value": _p_value(estimate[i], drawn[:, i], left_out[:, i]),
        }
        for i, name in enumerate(first.names)
    }


def _aligned(first: Statistic, second: Statistic) -> np.ndarray:
    """Where each slide of `second` is in `first`."""
    if (first.kind, first.names) != (second.kind, second.names):
        raise RunError(
            f"{first.kind} {first.names} and {second.kind} {second.names}: only the same figures"
            " can be compared"
        )
    if odd := sorted(set(first.slide_ids) ^ set(second.slide_ids)):
        only = [f"{slide} ({'first' if slide in first.slide_ids else 'second'})" for slide in odd]
        raise RunError(
            f"{len(odd)} slides are in one run only: {', '.join(only[:5])}; a paired comparison"
            " needs the same slides in both"
        )
    order = pd.Index(first.slide_ids).get_indexer(second.slide_ids)
    if (differs := np.flatnonzero(first.truth[order] != second.truth)).size:
        at = differs[0]
        raise RunError(
            f"slide {second.slide_ids[at]} has {first.truth[order[at]]} to find in the first run"
            f" and {second.truth[at]} in the second ({first.kind}): a paired comparison needs the"
            " same truth for both"
        )
    return order


def _resampled(statistic: Statistic, patients: Mapping, replicates: int, seed: int):
    """Figures of the cohort (M,), of resampled ones (R, M), of those without one patient (P, M).

    Rounded to 12 digits, so that figures are equal where only the order of a sum differs.
    """
    if strange := [slide for slide in statistic.slide_ids if slide not in patients]:
        raise CatalogError(f"slides {strange[:5]} are not among those whose patient is given")
    cluster = _clusters([patients[slide] for slide in statistic.slide_ids])
    every = np.ones((1, len(cluster)), np.uint16)
    drawn = _resample(cluster, replicates, seed)
    left_out = np.arange(cluster.max(initial=-1) + 1)[:, None] != cluster
    estimate, *others = (_evaluate(statistic, weights) for weights in (every, drawn, left_out))
    return estimate[0], *others


def _evaluate(statistic: Statistic, weights: np.ndarray) -> np.ndarray:
    chunks = range(0, len(weights), CHUNK)
    values = [statistic.evaluate(weights[i : i + CHUNK].astype(np.float64)) for i in chunks]
    return np.round(np.concatenate([np.empty((0, len(statistic.names))), *values]), 12)


def _interval(estimate: float, drawn, left_out, level: float, *, bca: bool) -> dict:
    defined, patients = drawn[~np.isnan(drawn)], len(left_out)
    low = high = None
    undefined = _why_undefined(estimate, defined, left_out)
    if undefined is None:
        wider = stdtrit(patients - 1, (1 - level) / 2) * np.sqrt(patients / (patients - 1))
        ends = np.array([wider, -wider])  # in standard deviations of the replicates
        if bca:
            ends = _bca(ends, estimate, defined, left_out)
        low, high = np.quantile(defined, ndtr(ends)).tolist()
        if low == high:
            low = high = None
            undefined = f"resampled cohorts vary too little to tell how far {estimate:g} may be off"
    return {"low": low, "high": high, "replicates": len(defined), "undefined": undefined}


def _bca(ends: np.ndarray, estimate: float, defined: np.ndarray, left_out: np.ndarray):
    """Normal quantiles of the replicates, corrected for their bias and skewness."""
    half = 0.5 / len(defined)
    below = np.mean(defined < estimate) + np.mean(defined == estimate) / 2
    bias = ndtri(np.clip(below, half, 1 - half))
    gap = left_out.mean() - left_out
    spread = np.sum(gap**2) ** 1.5
    acceleration = np.sum(gap**3) / (6 * spread) if spread else 0.0
    return bias + (bias + ends) / np.maximum(1 - acceleration * (bias + ends), 1e-9)


def _why_undefined(estimate: float, defined: np.ndarray, left_out: np.ndarray) -> str | None:
    if np.isnan(estimate):
        return "the figure itself is undefined"
    if len(left_out) < 2:
        return "there is one patient only: resampling needs two or more"
    if np.isnan(left_out).any() or not len(defined):
        return "it hangs on one patient: without them there is no such figure"
    return None


def _p_value(estimate: float, drawn: np.ndarray, left_out: np.ndarray) -> float | None:
    defined = drawn[~np.isnan(drawn)]
    if _why_undefined(estimate, defined, left_out):
        return None
    tail = min(np.sum(defined <= 0), np.sum(defined >= 0)) + 1
    return float(min(1, 2 * tail / (len(defined) + 1)))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
