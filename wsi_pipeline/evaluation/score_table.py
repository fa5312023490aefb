"""Slide accuracy from any table of slide scores, made by whatever software.

A table has a row for each slide: its id, its label, a score in [0, 1] in one column or in several
that are to be compared, and optionally its split and its patient.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from wsi_pipeline.errors import CatalogError
from wsi_pipeline.evaluation.slide_level import slide_metrics
from wsi_pipeline.evaluation.uncertainty import REPLICATES, intervals
from wsi_pipeline.evaluation.weighted_metrics import binary_statistic
from wsi_pipeline.slides.patients import known_patient, refuse_two_spellings

LABELS = {
    **dict.fromkeys(("1", "1.0", "tumor", "tumour", "positive"), 1),
    **dict.fromkeys(("0", "0.0", "normal", "negative"), 0),
}
SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
MISSING = ("", "na", "n/a", "nan", "null", "none")  # case ignored
FIGURES = ("roc_auc", "accuracy", "sensitivity", "specificity")


def slide_score_metrics(
    table: pd.DataFrame,
    slide: str,
    label: str,
    scores: Sequence[str],
    *,
    split: str | None = None,
    patient: str | None = None,
    threshold: float = 0.5,
    replicates: int = REPLICATES,
    seed: int = 0,
    source: str = "the table",
) -> dict:
    """Slide accuracy of each score column, with 95 % intervals.

    A slide is called positive iff its score >= t. With a split column t is chosen on the
    validation rows and the figures are those of the test rows, see `slide_metrics`; train rows
    are left out. Without one all rows are test rows and t is `threshold`.

    Parameters
    ----------
    table : DataFrame
        A row for each slide.
    slide, label : str
        Columns. A label is 1 or tumor, tumour, positive; 0 or normal, negative; case ignored.
    scores : sequence of str
        Columns of scores in [0, 1]. A slide without a score in a column (empty, NA, NaN, null,
        None) is left out of that column's figures and counted as ``unscored``.
    split, patient : str, optional
        Columns. A split is train, validation (or val) or test. A slide without a patient has that
        of its name in a public cohort (see `wsi_pipeline.slides.patients`) or is its own; patients
        are what is resampled for the intervals.
    threshold : float
        The t where the validation rows cannot choose one.
    replicates, seed : int
        See `intervals`.
    source : str
        What errors call the table: its path.

    Returns
    -------
    dict
        ``slides, tumour_slides, normal_slides, patients`` of the test rows; ``train_slides,
        validation_slides``; ``scores``: for each column `slide_metrics`, and ``intervals`` of
        ``roc_auc, accuracy, sensitivity, specificity`` at t, see `intervals`. That t was chosen
        on data is not in the intervals.

    Raises
    ------
    CatalogError
        If a column is missing, a slide is there twice (upper and lower case alike) or has no id, a
        label or split is none of the above, a score is not a number in [0, 1], a patient is
        spelled in two ways or in two splits, or no test row is left; the message names `source`,
        row and value. The first row below the header is 1.
    """
    columns = {"slide": slide, "label": label, "split": split, "patient": patient}
    slides, values = read_slide_rows(table, columns, scores, source)
    return slide_row_metrics(slides, values, threshold, split is not None, replicates, seed)


def slide_row_metrics(slides, values, threshold, has_splits, replicates, seed) -> dict:
    """Evaluate what `read_slide_rows` read, see `slide_score_metrics`."""
    test, validation = (slides["split"] == name for name in ("test", "validation"))
    patients = dict(zip(slides["slide_id"], slides["patient_id"], strict=True))

    def of_column(column):
        scored = slides.assign(score=values[column])
        found = slide_metrics(scored[validation], scored[test], threshold)
        if not has_splits:
            found["threshold_reason"] = "there is no split column, so there are no validation rows"
        statistic = binary_statistic(scored[test], found["threshold"], "slides")
        return found | {
            "intervals": intervals(statistic, patients, replicates=replicates, seed=seed)
        }

    label, patient = slides["label"][test], slides["patient_id"][test]
    return {
        "slides": int(test.sum()),
        "tumour_slides": int((label == 1).sum()),
        "normal_slides": int((label == 0).sum()),
        "patients": int(patient.nunique() + patient.isna().sum()),
        "train_slides": int((slides["split"] == "train").sum()),
        "validation_slides": int(validation.sum()),
        "scores": {column: of_column(column) for column in values},
    }


def read_score_csv(path: Path) -> pd.DataFrame:
    """Read a CSV table with a header as strings; CatalogError if it is none."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CatalogError(f"{path}: cannot be read as a CSV table: {error}") from error
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise CatalogError(
                f"{path}, row {number}: it has {len(row)} cells and the header {len(header)}"
            )
    return pd.DataFrame(rows, columns=header, dtype="string")


def read_slide_rows(
    table: pd.DataFrame, columns: Mapping[str, str | None], scores: Sequence[str], source: str
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """``slide_id, label, split, patient_id`` of each row, and each column of scores."""
    _check_columns(table, [*columns.values(), *scores], source)
    cells = {what: _cells(table, column) for what, column in columns.items()}
    ids = cells["slide"]
    _refuse(ids.isna(), ids, columns["slide"], "each row needs the id of a slide", source)
    _refuse(ids.str.casefold().duplicated(), ids, columns["slide"], "each slide is one row", source)
    slides = pd.DataFrame({"slide_id": ids.astype(object)})
    slides["label"] = _words(cells["label"], LABELS, columns["label"], source)
    slides["split"] = "test"
    if columns["split"]:
        slides["split"] = _words(cells["split"], SPLITS, columns["split"], source)
    named = [(known_patient(slide_id) or ("", None))[1] for slide_id in ids]
    patients = cells["patient"].astype(object).where(cells["patient"].notna(), named)
    slides["patient_id"] = patients
    refuse_two_spellings(slides, source, [f"row {row}" for row in range(1, len(slides) + 1)])
    splits = slides.groupby("patient_id")["split"].transform("nunique")
    _refuse(splits > 1, patients, columns["patient"] or "patient", "it is in two splits", source)
    if not (slides["split"] == "test").any():
        raise CatalogError(f"{source}: it has no test row; the figures are those of test rows")
    return slides, {column: _numbers(table, column, source) for column in scores}


def _check_columns(table: pd.DataFrame, columns: Sequence[str | None], source: str):
    there = table.columns.tolist()
    for column in columns:
        if column is not None and there.count(column) != 1:
            raise CatalogError(
                f"{source}: {there.count(column)} columns are named {column!r}, one is needed;"
                f" the table has {there}"
            )


def _cells(table: pd.DataFrame, column: str | None) -> pd.Series:
    """Text without blanks around it; missing where it says so, or there is no such column."""
    if column is None:
        return pd.Series(pd.NA, index=range(len(table)), dtype="string")
    cells = table[column].reset_index(drop=True).astype("string").str.strip()
    return cells.mask(cells.str.casefold().isin(MISSING))


def _words(
    cells: pd.Series, words: Mapping[str, object], column: str | None, source: str
) -> pd.Series:
    meant = cells.str.casefold().map(words)
    _refuse(meant.isna(), cells, column, f"it must be one of {', '.join(words)}", source)
    return meant


def _numbers(table: pd.DataFrame, column: str, source: str) -> np.ndarray:
    cells = _cells(table, column)
    given = table[column].reset_index(drop=True).mask(cells.isna())
    numbers = pd.to_numeric(given, errors="coerce").astype("float64")
    rule = "a score is a number in [0, 1]"
    _refuse(cells.notna() & ~numbers.between(0, 1), cells, column, rule, source)
    return numbers.to_numpy()


def _refuse(bad: pd.Series, cells: pd.Series, column: str | None, rule: str, source: str):
    if bad.any():
        row = int(bad.to_numpy(dtype=bool).argmax())
        value = None if pd.isna(cells[row]) else cells[row]
        raise CatalogError(f"{source}, row {row + 1}: {column} is {value!r}: {rule}")
