"""Any table of slide scores, evaluated: figures as JSON and CSV, ROC curves as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from wsi_pipeline.evaluation.score_table import (
    FIGURES,
    read_score_csv,
    read_slide_rows,
    slide_row_metrics,
)
from wsi_pipeline.evaluation.uncertainty import REPLICATES
from wsi_pipeline.files import write_csv, write_json, write_whole
from wsi_pipeline.report.curves import slide_roc_figure


def write_slide_scores(
    path,
    out,
    *,
    slide: str,
    label: str,
    scores: Sequence[str],
    split: str | None = None,
    patient: str | None = None,
    threshold: float = 0.5,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Path:
    """Evaluate a CSV file with a header, UTF-8, and write what was found.

    Parameters
    ----------
    path : path-like
    out : path-like
        Folder, made when missing. It gets ``slide_scores.json`` (`slide_score_metrics`),
        ``slide_scores.csv`` (a row for each score column) and ``slide_scores.svg`` (their ROC
        curves, of those that are defined; not there if none is).
    slide, label, scores, split, patient, threshold, replicates, seed
        See `slide_score_metrics`.

    Returns
    -------
    Path
        Of ``slide_scores.json``.

    Raises
    ------
    CatalogError
        If the file cannot be read, a row has more or fewer cells than the header, or as
        `slide_score_metrics`.
    """
    columns = {"slide": slide, "label": label, "split": split, "patient": patient}
    slides, values = read_slide_rows(read_score_csv(Path(path)), columns, scores, str(path))
    metrics = slide_row_metrics(slides, values, threshold, split is not None, replicates, seed)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "slide_scores.csv", _flat(metrics["scores"]))
    test = slides["split"] == "test"
    curves = {
        column: (slides["label"][test], values[column][test], found)
        for column, found in metrics["scores"].items()
        if found["roc_auc"] is not None
    }
    (out / "slide_scores.svg").unlink(missing_ok=True)
    if curves:
        write_whole(out / "slide_scores.svg", slide_roc_figure(curves).svg)
    write_json(out / "slide_scores.json", metrics)
    return out / "slide_scores.json"


def _flat(scores: Mapping[str, dict]) -> pd.DataFrame:
    """A row for each score column, the ends of the intervals beside their figures."""
    rows = []
    for column, found in scores.items():
        row = {"score": column}
        row |= {name: found[name] for name in ("n", "positives", "unscored")}
        row |= {name: found[name] for name in ("threshold", "threshold_from")}
        for name in FIGURES:
            ends = found["intervals"][name]
            row |= {name: found[name], f"{name}_low": ends["low"], f"{name}_high": ends["high"]}
        rows.append(row)
    return pd.DataFrame(rows)
