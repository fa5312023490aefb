"""The page of tissue masks: what was taken for tissue in each slide."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from wsi_pipeline.files import write_whole
from wsi_pipeline.report.evaluation_page import environment


@dataclass(frozen=True)
class TiledSlide:
    """A slide on the page.

    Parameters
    ----------
    slide_id : str
    patches, positive : int
        Numbers of its indexed patches, and of those with tumour.
    notes : tuple of str
        What a reader should know.
    drawn : bool
        Whether ``SLIDE.jpg`` lies beside the page.
    """

    slide_id: str
    patches: int
    positive: int
    notes: tuple[str, ...]
    drawn: bool


def write_tissue_page(
    path,
    *,
    title: str,
    slides: Sequence[TiledSlide],
    failures: pd.DataFrame,
    notes: Sequence[str] = (),
) -> None:
    """Write the page; whole or not at all. Its pictures stay files, loaded when they are looked at.

    Parameters
    ----------
    path : path-like
    title : str
    slides : sequence of TiledSlide
        Those without patches or with notes come first.
    failures : DataFrame
        A row for each slide or part of one that failed; any columns.
    notes : sequence of str
        What is noted of all slides together.
    """
    slides = sorted(slides, key=lambda s: (s.patches > 0 and not s.notes, s.slide_id))
    page = environment().get_template("tissue_page.html.j2")
    html = page.render(title=title, slides=slides, failures=failures, notes=notes)
    write_whole(path, html.encode())
