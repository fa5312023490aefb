"""Patients drawn into splits."""

import math

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.slides.splits import assign_splits

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


def cohort(slides_of_patient, tumour):
    rows = [
        {"slide_id": f"s{patient}-{i}", "patient_id": f"p{patient}", "tumour": i == 0 and has}
        for patient, (count, has) in enumerate(zip(slides_of_patient, tumour, strict=True))
        for i in range(count)
    ]
    frame = pd.DataFrame(rows)
    frame["label"] = frame["tumour"].map({True: 1, False: None}).astype("Int8")
    frame["annotation"] = pd.Series(pd.NA, index=frame.index, dtype="string")
    return frame


def patients(frame):
    return frame.groupby("patient_id")["split"].first().value_counts().to_dict()


def test_exact_counts_by_hand():
    """Of 20 patients 14, 2 and 4; of the 10 with a tumour 7, 1 and 2."""
    frame = assign_splits(cohort([2] * 20, [True] * 10 + [False] * 10), SHARES, seed=0)
    assert patients(frame) == {"train": 14, "validation": 2, "test": 4}
    with_tumour = frame[frame["label"].eq(1).fillna(False)]
    assert patients(with_tumour) == {"train": 7, "validation": 1, "test": 2}


def test_largest_remainders_by_hand():
    """Of 8 patients 5.6, 0.8 and 1.6: the two left over go to remainders 0.8 and, first, 0.6."""
    frame = assign_splits(cohort([1] * 8, [False] * 8), SHARES, seed=0)
    assert patients(frame) == {"train": 6, "validation": 1, "test": 1}


def test_no_split_stays_empty_while_there_are_patients_for_all():
    frame = assign_splits(cohort([1] * 3, [True, True, False]), SHARES, seed=0)
    assert patients(frame) == {"train": 1, "validation": 1, "test": 1}
    frame = assign_splits(cohort([1] * 2, [True, False]), SHARES, seed=0)
    assert sum(patients(frame).values()) == 2


def test_split_without_a_share_stays_empty():
    shares = {"train": 0.5, "validation": 0.0, "test": 0.5}
    frame = assign_splits(cohort([1] * 9, [True] * 4 + [False] * 5), shares, seed=0)
    assert set(patients(frame)) == {"train", "test"}


def test_annotated_patients_count_as_those_with_a_tumour():
    frame = cohort([1] * 20, [False] * 20)
    frame.loc[:9, "annotation"] = "a.xml"
    split = assign_splits(frame, SHARES, seed=3)
    assert patients(split[:10]) == {"train": 7, "validation": 1, "test": 2}


def test_every_patient_has_the_same_chance():
    """Over 500 seeds, each of 10 patients is in the test split about 100 times (sd 9)."""
    frame = cohort([1] * 10, [True] * 5 + [False] * 5)
    shares = {"train": 0.8, "test": 0.2}
    in_test = np.zeros(10)
    for seed in range(500):
        in_test += (assign_splits(frame, shares, seed)["split"] == "test").to_numpy(float)
    assert np.abs(in_test - 100).max() < 45


@given(
    cohort_of=st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=40),
    weights=st.lists(st.integers(0, 10), min_size=3, max_size=3).filter(any),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_splits_hold_their_properties(cohort_of, weights, seed, data):
    names = ("train", "validation", "test")
    shares = {name: w / sum(weights) for name, w in zip(names, weights, strict=True)}
    frame = cohort(*zip(*cohort_of, strict=True))
    split = assign_splits(frame, shares, seed)

    assert (split.groupby("patient_id")["split"].nunique() == 1).all()

    # The order of the rows and of the shares changes nothing.
    order = data.draw(st.permutations(range(len(frame))))
    turned = assign_splits(frame.iloc[order], dict(reversed(shares.items())), seed)
    assert turned["split"].sort_index().tolist() == split["split"].tolist()

    total, count = len(cohort_of), patients(split)
    used = [name for name in names if shares[name] > 0]
    floors = {name: math.floor(total * shares[name] + 1e-9) for name in used}
    assert set(count) <= set(used)
    if total >= len(used):
        assert set(count) == set(used)
    if min(floors.values()) >= 1:
        assert all(floors[name] <= count[name] <= floors[name] + 1 for name in used)

    # Patients with a tumour are spread as all patients are.
    tumour = split[split["label"].eq(1).fillna(False)]
    for name, n in patients(tumour).items():
        assert abs(n - len(tumour) * count[name] / total) < 1
