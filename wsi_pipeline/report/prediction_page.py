"""The page of a model's predictions on slides without labels: worst first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from wsi_pipeline.files import write_whole
from wsi_pipeline.report.evaluation_page import environment


@dataclass(frozen=True)
class PredictedSlide:
    """A slide on the page; its picture is ``slides/SLIDE.jpg`` beside it.

    Parameters
    ----------
    slide_id : str
    called : {"tumour", "no tumour", ""}
        "" where there is no score or no slide threshold.
    figures : mapping
        ``score``, ``patches``, ``detections``, ``regions_above``, ``area_above_mm2`` and
        ``tissue_mm2``; a missing figure is None or NaN.
    notes : tuple of str
        What a reader should know.
    """

    slide_id: str
    called: str
    figures: Mapping
    notes: tuple[str, ...]


def write_prediction_page(
    path,
    *,
    title: str,
    model: str,
    card: Mapping,
    patch_threshold: float,
    slides: Sequence[PredictedSlide],
    failures: pd.DataFrame,
    notes: Sequence[str] = (),
) -> None:
    """Write the page; whole or not at all. Its pictures stay files, loaded when they are looked at.

    Parameters
    ----------
    path : path-like
    title : str
    model : str
        Name and hash, as the heatmaps call it.
    card : mapping
        The model's card as plain values.
    patch_threshold : float
        Areas with a probability >= this are outlined and measured.
    slides : sequence of PredictedSlide
        In the order of the page.
    failures : DataFrame
        A row for each slide or part of one that failed; any columns.
    notes : sequence of str
        What is noted of all slides together.
    """
    page = environment().get_template("prediction_page.html.j2")
    html = page.render(
        title=title,
        model=model,
        card=card,
        found=card["evaluation"],
        best=card["training"].get("best", {}),
        slide_threshold=card["thresholds"]["slide"],
        patch_threshold=patch_threshold,
        slides=slides,
        failures=failures,
        notes=notes,
    )
    write_whole(path, html.encode())
