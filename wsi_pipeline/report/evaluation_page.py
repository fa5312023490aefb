"""The report of an evaluation: one HTML page to read, and the same figures as JSON and CSV."""

import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.binary import reliability_table, score_counts
from wsi_pipeline.evaluation.froc import FrocCurve, vertices
from wsi_pipeline.evaluation.patch_level import patch_metrics_by_slide
from wsi_pipeline.evaluation.uncertainty import LEVEL
from wsi_pipeline.files import write_csv, write_json, write_whole
from wsi_pipeline.report import curves as figures
from wsi_pipeline.report.tables import (
    SlidePanel,
    cohort_counts,
    reading_order,
    score_gap,
    slide_table,
)

PERCENT = "\N{NO-BREAK SPACE}%"
OPEN_PICTURES = 12
"""A gallery shows as many at once, and whatever went wrong; the rest is folded."""


def write_report(
    folder,
    *,
    title: str,
    model: str,
    run: dict,
    metrics: dict,
    patches: pd.DataFrame,
    slide_curves: Mapping[str, pd.DataFrame],
    curves: Mapping[str, FrocCurve],
    bands: Mapping[str, pd.DataFrame],
    lesions: pd.DataFrame,
    false_positives: pd.DataFrame,
    lesion_pictures: Mapping[tuple[str, int], bytes],
    false_positive_pictures: Mapping[int, bytes],
    slides: Sequence[SlidePanel],
    failures: pd.DataFrame,
    explanations: str,
    explained: Mapping | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write ``report.html``, ``metrics.json`` and the tables as CSV, each whole or not at all.

    The page needs no other file and no network, runs no script, and can be printed.

    Parameters
    ----------
    folder : path-like
        Made when missing.
    title : str
    model : str
        What tells it from all others: name and weights.
    run : dict
        How the figures came about (seed, model, versions, settings): plain YAML values, shown at
        the end of the page.
    metrics : dict
        ``patch`` (`patch_metrics` of the test split), ``slide`` (`slide_metrics`), each with
        ``intervals`` of ``roc_auc, accuracy, sensitivity, specificity``; and ``froc``: for each
        of ``lecture, official, corrected`` `froc_metrics` with ``intervals``, `froc_intervals`.
        ``precision``: of ``training`` and ``heatmaps``, "float32" or "bfloat16" (None: not on
        record), and ``difference`` of the latter's probabilities from float32's (None, or
        ``patches`` compared, ``largest``, ``mean``).
        ``metrics.json`` adds ``cohort``, see `cohort_counts`; what is undefined is null in it.
    patches : DataFrame
        ``slide_id, label, score`` of the test split's patches.
    slide_curves : mapping
        `accuracy_curve` of the splits ``validation`` and ``test``.
    curves, bands : mapping
        For each definition of FROC its `FrocCurve` and its `froc_band`.
    lesions : DataFrame
        A row for each lesion of the test split, missed ones first: ``slide_id, lesion_id, region,
        x0, y0, x1, y1`` (level-0 px), ``area_mm2, longest_diameter_um, itc, confidence`` (-inf:
        no detection), ``average_fps`` (NaN: not found at any price), ``status`` ("missed",
        "found", "ITC"), ``patch_score`` (-inf: no scored patch) and ``n_patches``.
    false_positives : DataFrame
        ``slide_id, probability, x, y`` (level-0 px) of the detections off all lesions, the
        highest probability first.
    lesion_pictures : mapping
        JPEG images by ``(slide_id, lesion_id)``; lesions without one are in ``lesions.csv`` only.
    false_positive_pictures : mapping
        JPEG images by row number, from 0, of `false_positives`.
    slides : sequence of SlidePanel
        Of both splits.
    failures : DataFrame
        A row for each slide or unit that failed in any stage; any columns.
    explanations : str
        Where the page of explanations is or will be, seen from `folder`.
    explained : mapping, optional
        What is known of this model's explanations, see
        `wsi_pipeline.report.explanations_page.read_summary`; where there are none yet,
        `show_explanations` puts them into the report later.
    notes : sequence of str
        What is noted of all slides together.

    Returns
    -------
    Path
        Of ``report.html``.

    Raises
    ------
    RunError
        If a lesion or a false positive is of none of the test slides.
    """
    folder = Path(folder)
    _refuse_strange_slides(slides, {"lesions": lesions, "false positives": false_positives})
    metrics = {"cohort": cohort_counts(slides, lesions), **metrics}
    tables = {
        "slides": slide_table(slides, lesions),
        "slide_accuracy": pd.concat(slide_curves, names=["split", None]).reset_index("split"),
        **_patch_tables(patches, metrics["patch"]["threshold"]),
        **{f"froc_{mode}": vertices(curve) for mode, curve in curves.items()},
        **{f"froc_{mode}_band": band for mode, band in bands.items()},
        "lesions": lesions,
        "false_positives": false_positives,
    }
    html = environment().get_template("report.html.j2").render(
        title=title,
        run=_sections(run),
        metrics=metrics,
        gap=score_gap(metrics["froc"]),
        most_fps=max(_points(metrics)),
        pictures={
            **_froc_figure(metrics, curves, bands),
            **_slide_figures(metrics["slide"], slide_curves, slides),
            **_patch_figures(metrics["patch"], patches, tables["calibration"]),
        },
        tables={
            name: tables[name].to_dict("records")
            for name in ("slides", "patches_by_slide", "calibration")
        },
        lesions=_shown_lesions(lesions, lesion_pictures),
        false_positives=_shown_false_positives(false_positives, false_positive_pictures, slides),
        false_positive_count=len(false_positives),
        panels=reading_order(slides),
        failures=failures,
        notes=notes,
        model=model,
        link=explanations,
        explained=explained,
        csv_names=list(tables),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_csv(folder / f"{name}.csv", table)
    write_json(folder / "metrics.json", metrics)
    write_whole(folder / "report.html", html.encode())
    return folder / "report.html"


def show_explanations(report, *, model: str, explanations: str, explained: Mapping | None) -> None:
    """Put what is known of a model's explanations into its report, over what it said before.

    Parameters
    ----------
    report : path-like
        ``report.html``; nothing happens where it is not there, or is of another model.
    model, explanations, explained
        See `write_report`.
    """
    report = Path(report)
    if not report.is_file():
        return
    template = environment().get_template("explanations_section.html.j2")
    section = template.render(model=model, link=explanations, explained=explained).strip()
    begin, *_, end = section.splitlines()
    before, begun, rest = report.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if begun and ended:
        write_whole(report, (before + section + after).encode())


def _patch_tables(patches: pd.DataFrame, threshold: float) -> dict[str, pd.DataFrame]:
    return {
        "patches_by_slide": patch_metrics_by_slide(patches, threshold),
        "calibration": reliability_table(patches["label"], patches["score"]),
        "patch_scores": score_counts(patches["label"], patches["score"]),
    }


def _refuse_strange_slides(slides: Sequence[SlidePanel], tables: Mapping[str, pd.DataFrame]):
    known = [slide.slide_id for slide in slides if slide.split == "test"]
    for what, table in tables.items():
        strange = table.loc[~table["slide_id"].isin(known), "slide_id"].unique()
        if len(strange):
            raise RunError(f"there are {what} of {strange[:5].tolist()}: none of the test slides")


def _points(metrics: Mapping) -> list[float]:
    """Average false positives at which the FROC curves are read off."""
    return [float(point) for point in metrics["froc"]["corrected"]["sensitivity_at"]]


def _shown_lesions(lesions: pd.DataFrame, pictures: Mapping) -> list[dict]:
    """The lesions that have a picture, with it, in their order."""
    return [
        row | {"picture": pictures[key]}
        for row in lesions.to_dict("records")
        if (key := (row["slide_id"], row["lesion_id"])) in pictures
    ]


def _shown_false_positives(
    false_positives: pd.DataFrame, pictures: Mapping, slides: Sequence[SlidePanel]
) -> list[dict]:
    """The false positives that have a picture, with it, their rank and their slide's label."""
    labels = {slide.slide_id: slide.label for slide in slides}
    numbers = sorted(pictures)
    rows = false_positives.iloc[numbers].to_dict("records")
    return [
        row | {"rank": number + 1, "label": labels[row["slide_id"]], "picture": pictures[number]}
        for number, row in zip(numbers, rows, strict=True)
    ]


def _froc_figure(metrics, curves, bands) -> dict[str, figures.Picture]:
    if all(curve.undefined for curve in curves.values()):
        return {}
    return {"froc": figures.froc_figure(curves, bands, _points(metrics))}


def _slide_figures(metrics, slide_curves, slides) -> dict[str, figures.Picture]:
    found = {}
    filled = {split: curve for split, curve in slide_curves.items() if len(curve) > 1}
    if filled:
        found["slide_accuracy"] = figures.slide_accuracy_figure(filled, metrics["threshold"])
    if metrics["roc_auc"] is not None:
        test = [slide for slide in slides if slide.split == "test"]
        labels, scores = [slide.label for slide in test], [slide.score for slide in test]
        found["slide_roc"] = figures.slide_roc_figure({"test slides": (labels, scores, metrics)})
    return found


def _patch_figures(metrics, patches, calibration) -> dict[str, figures.Picture]:
    found, rows = {}, (patches["label"], patches["score"], metrics["threshold"])
    if metrics["roc_auc"] is not None:
        found["roc"] = figures.roc_figure(*rows)
        found["precision_recall"] = figures.precision_recall_figure(*rows)
    if metrics["n"]:
        found["histogram"] = figures.score_histogram_figure(*rows)
        found["calibration"] = figures.reliability_figure(calibration)
    return found


def _sections(run: dict) -> dict[str, str]:
    """Each entry as text: plain values as they are, nested ones as YAML."""
    return {
        name: yaml.safe_dump(value, sort_keys=False).rstrip()
        if isinstance(value, dict | list)
        else str(value)
        for name, value in run.items()
    }


def environment() -> Environment:
    """The templates of the package's pages, with the filters that write its numbers."""
    pages = Environment(
        loader=PackageLoader("wsi_pipeline", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.globals |= {"level": f"{100 * LEVEL:g}{PERCENT}", "open_pictures": OPEN_PICTURES}
    pages.filters |= _filters()
    pages.tests["missing"] = _missing
    return pages


def _filters() -> dict:
    """How the page writes numbers and other values."""
    return {
        "percent": lambda part: "undefined" if _missing(part) else f"{100 * part:.1f}{PERCENT}",
        "decimal": lambda value: "–" if _missing(value) else f"{value:.3f}",
        "count": lambda number: "–" if _missing(number) else f"{number:,}",
        "cell": lambda value: "–" if _missing(value) else str(value),
        "area": lambda mm2: f"{mm2:.2f} mm²" if mm2 >= 0.1 else f"{mm2:.2g} mm²",
        "diameter": lambda um: f"{um / 1000:.2f} mm" if um >= 1000 else f"{um:.0f} µm",
        "place": lambda px: f"{px:,.0f}",
        "price": lambda fps: f"{fps:.2f}" if fps < 100 else f"{fps:,.0f}",
        "ends": _ends,
        "reasons": _reasons,
        "froc_reasons": _froc_reasons,
        "base64": lambda data: b64encode(data).decode(),
    }


def _missing(value) -> bool:
    return bool(pd.api.types.is_scalar(value) and (pd.isna(value) or value == -math.inf))


def _ends(interval: Mapping, unit: str = "") -> str:
    """Both ends of a defined interval, as shares or, with the unit "%", in percent."""
    low, high = interval["low"], interval["high"]
    if unit == "%":
        return f"{100 * low:.1f} to {100 * high:.1f}{PERCENT}"
    return f"{low:.3f} to {high:.3f}"


def _reasons(intervals: Mapping[str, Mapping], figures: Mapping) -> list[str]:
    """Why figures that are defined have no interval, each reason once."""
    why = (intervals[name]["undefined"] for name in intervals if figures[name] is not None)
    return list(dict.fromkeys(reason for reason in why if reason))


def _froc_reasons(froc: Mapping[str, Mapping]) -> list[str]:
    """`_reasons` of all definitions together."""
    why = []
    for found in froc.values():
        figures = {"score": found["score"], **found["sensitivity_at"]}
        ends = found["intervals"]
        why += _reasons({"score": ends["score"], **ends["sensitivity_at"]}, figures)
    return list(dict.fromkeys(why))
