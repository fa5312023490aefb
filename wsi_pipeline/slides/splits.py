"""Patients drawn into splits."""

import hashlib
from collections.abc import Mapping

import numpy as np
import pandas as pd


def assign_splits(frame: pd.DataFrame, shares: Mapping[str, float], seed: int) -> pd.DataFrame:
    """Split the slides by patient.

    The patients of each split are counted first, by the largest remainders of their shares, at
    least one where there are enough; then patients with a tumour (a slide labelled 1 or
    annotated) and without are spread over the splits in proportion, to within one. Who goes
    where depends on the seed and the patients' ids, not on the order of rows.

    Parameters
    ----------
    frame : pandas.DataFrame
        As `read_catalog` gives it.
    shares : mapping of str to float
        Share of the patients for each split; they add up to 1.
    seed : int

    Returns
    -------
    pandas.DataFrame
        A copy with the column ``split`` filled.
    """
    normal = frame["label"].eq(0).fillna(False)
    tumour = (frame["label"].eq(1) | (frame["annotation"].notna() & ~normal)).fillna(False)
    has_tumour = tumour.astype(bool).groupby(frame["patient_id"]).any()
    order = sorted(has_tumour.index, key=lambda patient: _draw(seed, patient))
    with_tumour = [patient for patient in order if has_tumour[patient]]
    without = [patient for patient in order if not has_tumour[patient]]

    # Ties of remainders go to the larger share.
    names = sorted((name for name in shares if shares[name] > 0), key=lambda n: (-shares[n], n))
    counts = _at_least_one(_apportion(len(order), [shares[name] for name in names]))
    counts_with = _apportion(len(with_tumour), counts)
    split_of = {
        **dict(zip(with_tumour, np.repeat(names, counts_with), strict=True)),
        **dict(zip(without, np.repeat(names, counts - counts_with), strict=True)),
    }
    return frame.assign(split=frame["patient_id"].map(split_of).astype("string"))


def _draw(seed: int, patient: str) -> bytes:
    return hashlib.sha256(f"{seed}/split/{patient}".encode()).digest()


def _apportion(total: int, weights) -> np.ndarray:
    """Share out `total` by the largest remainders of the weights' quotas (Hamilton's method)."""
    quotas = total * np.asarray(weights, float) / np.sum(weights)
    counts = np.floor(quotas + 1e-9).astype(int)
    largest_first = np.argsort(counts - quotas, kind="stable")
    counts[largest_first[: total - counts.sum()]] += 1
    return counts


def _at_least_one(counts: np.ndarray) -> np.ndarray:
    counts = counts.copy()
    while counts.min() == 0 and counts.sum() >= len(counts):
        counts[counts.argmax()] -= 1
        counts[counts.argmin()] += 1
    return counts
