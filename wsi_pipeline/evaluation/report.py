"""The report of an evaluation: one HTML page to read, and the same figures as JSON and CSV."""

import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from wsi_pipeline.evaluation import figures
from wsi_pipeline.evaluation.froc import FrocCurve, vertices
from wsi_pipeline.evaluation.patch_level import patch_metrics_by_slide
from wsi_pipeline.files import write_csv, write_json, write_whole

VERDICTS = {
    (1, True): "found",
    (1, False): "missed",
    (0, True): "false alarm",
    (0, False): "correctly negative",
}
MISTAKES_FIRST = ("missed", "false alarm", "not evaluated", "found", "correctly negative")


@dataclass(frozen=True)
class SlidePanel:
    """A slide in the report.

    Parameters
    ----------
    slide_id : str
    patient_id : str
    split : "validation" or "test"
    label : int
        1 tumour, 0 no tumour, -1 unknown.
    score : float
        The largest probability of its patches; -inf: it has none, NaN: none could be scored.
    called : bool or None
        Whether it is called positive; None if it has no score.
    picture : bytes, optional
        JPEG: the slide with its annotation beside its heatmap.
    notes : tuple of str
        What a reader should know: repairs of its annotation, unreadable patches.
    """

    slide_id: str
    patient_id: str
    split: Literal["validation", "test"]
    label: int
    score: float
    called: bool | None
    picture: bytes | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """The call against the truth."""
        return VERDICTS.get((self.label, self.called), "not evaluated")


def write_report(
    folder,
    *,
    title: str,
    run: dict,
    metrics: dict,
    patches: pd.DataFrame,
    slide_curves: Mapping[str, pd.DataFrame],
    froc: FrocCurve,
    lesions: pd.DataFrame,
    slides: Sequence[SlidePanel],
    failures: pd.DataFrame,
) -> Path:
    """Write ``report.html``, ``metrics.json`` and the tables as CSV, each whole or not at all.

    The page needs no other file and no network, runs no script, and can be printed.

    Parameters
    ----------
    folder : path-like
        Made when missing.
    title : str
    run : dict
        How the figures came about (seed, model, versions, settings): plain YAML values, shown at
        the end of the page.
    metrics : dict
        ``patch`` (`patch_metrics` of the test split), ``slide`` (`slide_metrics`) and ``froc``:
        ``{"lecture": froc_metrics(...)}``. ``metrics.json`` adds ``cohort``, see
        `cohort_counts`; what is undefined is null in it.
    patches : DataFrame
        ``slide_id, label, score`` of the test split's patches.
    slide_curves : mapping
        `accuracy_curve` of the splits ``validation`` and ``test``.
    froc : FrocCurve
        Of the test split.
    lesions : DataFrame
        `lesion_scores` of the test split.
    slides : sequence of SlidePanel
        Of both splits.
    failures : DataFrame
        A row for each slide or unit that failed in any stage; any columns.

    Returns
    -------
    Path
        Of ``report.html``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {"cohort": cohort_counts(slides, lesions), **metrics}
    threshold = metrics["patch"]["threshold"]
    tables = {
        "patches_by_slide": patch_metrics_by_slide(patches, threshold),
        "slides": slide_table(slides, lesions, threshold),
        "slide_accuracy": pd.concat(slide_curves, names=["split", None]).reset_index("split"),
        "froc_lecture": vertices(froc),
        "lesions": lesions,
    }
    for name, table in tables.items():
        write_csv(folder / f"{name}.csv", table)
    write_json(folder / "metrics.json", metrics)
    page = _environment().get_template("report.html.j2")
    html = page.render(
        title=title,
        run=_sections(run),
        metrics=metrics,
        pictures=_pictures(metrics, patches, slide_curves, froc),
        patches_by_slide=tables["patches_by_slide"].to_dict("records"),
        slide_rows=tables["slides"].to_dict("records"),
        panels=sorted(slides, key=_reading_order),
        failures=failures,
        csv_names=list(tables),
    )
    write_whole(folder / "report.html", html.encode())
    return folder / "report.html"


def cohort_counts(slides: Sequence[SlidePanel], lesions: pd.DataFrame) -> dict:
    """What was evaluated: the counts of the test split, and of validation slides.

    Returns
    -------
    dict
        ``slides, tumour_slides, normal_slides, patients, lesions``, all of the test split, and
        ``validation_slides``.
    """
    test = [slide for slide in slides if slide.split == "test"]
    return {
        "slides": len(test),
        "tumour_slides": sum(slide.label == 1 for slide in test),
        "normal_slides": sum(slide.label == 0 for slide in test),
        "patients": len({slide.patient_id for slide in test}),
        "lesions": len(lesions),
        "validation_slides": len(slides) - len(test),
    }


def slide_table(
    slides: Sequence[SlidePanel], lesions: pd.DataFrame, patch_threshold: float
) -> pd.DataFrame:
    """A row for each slide, mistakes first.

    Returns
    -------
    DataFrame
        ``split, slide_id, patient_id, label, score, called, verdict, lesions, lesions_found,
        notes``. A lesion is found iff a patch of it has F(I) >= `patch_threshold`; the two
        columns are missing for validation slides.
    """
    found = lesions["score"] >= patch_threshold
    by_slide = found.groupby(lesions["slide_id"], observed=True).agg(["size", "sum"])
    rows = []
    for slide in sorted(slides, key=_reading_order):
        known = slide.split == "test" and slide.label >= 0
        size, hits = by_slide.loc[slide.slide_id] if slide.slide_id in by_slide.index else (0, 0)
        rows.append(
            {
                "split": slide.split,
                "slide_id": slide.slide_id,
                "patient_id": slide.patient_id,
                "label": slide.label,
                "score": slide.score,
                "called": slide.called,
                "verdict": slide.verdict,
                "lesions": size if known else None,
                "lesions_found": hits if known else None,
                "notes": "; ".join(slide.notes),
            }
        )
    counts = {"lesions": "Int64", "lesions_found": "Int64"}
    columns = "split slide_id patient_id label score called verdict lesions lesions_found notes"
    return pd.DataFrame(rows, columns=columns.split()).astype(counts)


def _reading_order(slide: SlidePanel) -> tuple:
    """The test split before the validation split, mistakes before the rest."""
    return slide.split != "test", MISTAKES_FIRST.index(slide.verdict), slide.slide_id


def _pictures(metrics, patches, slide_curves, froc) -> dict[str, figures.Picture]:
    """Those curves that are defined."""
    labels, scores = patches["label"], patches["score"]
    patch, slide = metrics["patch"], metrics["slide"]
    points = [float(point) for point in metrics["froc"]["lecture"]["sensitivity_at"]]
    filled = {split: curve for split, curve in slide_curves.items() if len(curve) > 1}
    pictures = {}
    if not froc.undefined:
        pictures["froc"] = figures.froc_figure(froc, points)
    if filled:
        pictures["slide_accuracy"] = figures.slide_accuracy_figure(filled, slide["threshold"])
    if patch["roc_auc"] is not None:
        pictures["roc"] = figures.roc_figure(labels, scores, patch["threshold"])
        pictures["precision_recall"] = figures.precision_recall_figure(
            labels, scores, patch["threshold"]
        )
    if patch["n"]:
        pictures["histogram"] = figures.score_histogram_figure(labels, scores, patch["threshold"])
    return pictures


def _sections(run: dict) -> dict[str, str]:
    """Each entry as text: plain values as they are, nested ones as YAML."""
    return {
        name: yaml.safe_dump(value, sort_keys=False).rstrip()
        if isinstance(value, dict | list)
        else str(value)
        for name, value in run.items()
    }


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("wsi_pipeline", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda share: "undefined" if _missing(share) else f"{100 * share:.1f} %",
        "decimal": lambda value: "–" if _missing(value) else f"{value:.3f}",
        "count": lambda number: "–" if _missing(number) else f"{number:,}",
        "base64": lambda data: b64encode(data).decode(),
    }
    return environment


def _missing(value) -> bool:
    return pd.isna(value) or value == -math.inf
