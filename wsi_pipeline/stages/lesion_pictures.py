"""Pictures of places: each lesion, found or missed, and the worst false positives."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wsi_pipeline.config import AnnotationConfig
from wsi_pipeline.files import write_whole
from wsi_pipeline.geometry import Bounds
from wsi_pipeline.heatmaps.store import open_heatmap
from wsi_pipeline.jobs.unit import LargeFile, Output, SmallFile, Unit
from wsi_pipeline.report.slide_pictures import HeatmapPanel, heatmap_figure
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages.slide_annotation import slide_annotation

PICTURE_PX = 360
"""Longer side of what is read of the slide for a picture."""
WIDTH_INCHES = 6.5
AROUND_LESION = 1.6
"""Side of the picture, in longer sides of the lesion's box."""
INNER_SQUARES = 7
"""Side of the picture, in inner squares, at least."""


def picture_units(
    slides: pd.DataFrame,
    lesions: pd.DataFrame,
    false_positives: pd.DataFrame,
    heatmaps: Path,
    folder: Path,
    annotation_rules: AnnotationConfig,
) -> Iterator[Unit]:
    """Give one unit for each slide with something to show.

    Parameters
    ----------
    slides : DataFrame
        ``slide_id, path, mpp, annotation``.
    lesions : DataFrame
        ``slide_id, lesion_id, x0, y0, x1, y1`` (level-0 px) of those to show.
    false_positives : DataFrame
        ``slide_id, x, y`` (level-0 px) of those to show; the index names the picture.
    heatmaps : Path
        Folder of the heatmaps.
    folder : Path
        Of the pictures.
    annotation_rules : AnnotationConfig
        See `slide_annotation`.
    """
    for slide in slides.itertuples(index=False):
        places = [
            Place(
                picture_name("lesion", row.lesion_id),
                (float(row.x0), float(row.y0), float(row.x1), float(row.y1)),
            )
            for row in lesions[lesions["slide_id"] == slide.slide_id].itertuples(index=False)
        ] + [
            Place(picture_name("false-positive", row.Index), (float(row.x), float(row.y)) * 2)
            for row in false_positives[false_positives["slide_id"] == slide.slide_id].itertuples()
        ]
        if places:
            yield DrawPlaces(
                slide_id=slide.slide_id,
                slide=LargeFile.at(slide.path),
                mpp=float(slide.mpp),
                annotation=slide.annotation and SmallFile.at(slide.annotation),
                annotation_rules=annotation_rules,
                heatmap=LargeFile.at(heatmaps / f"{slide.slide_id}.zarr"),
                places=tuple(places),
                folder=Output(folder / slide.slide_id),
            )


def picture_name(kind: str, number: int) -> str:
    """File name of a lesion's or a false positive's picture."""
    return f"{kind}-{number}.jpg"


def read_pictures(folder: Path, kind: str, shown: pd.DataFrame, number: str | None = None) -> dict:
    """Read the pictures of lesions, by (slide, lesion), or of false positives, by row."""
    pictures = {}
    for row, slide_id in shown["slide_id"].items():
        key = row if number is None else int(shown.at[row, number])
        picture = folder / slide_id / picture_name(kind, key)
        if picture.is_file():  # else its slide failed, which is recorded
            pictures[row if number is None else (slide_id, key)] = picture.read_bytes()
    return pictures


@dataclass(frozen=True)
class Place:
    """A picture's name, and the box that it shows: x0, y0, x1, y1, level-0 px; or one point."""

    name: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class DrawPlaces(Unit):
    """Draw places of one slide.

    A lesion is shown with some of its surroundings; a false positive with a circle.
    """

    slide: LargeFile
    mpp: float
    annotation: SmallFile | None
    annotation_rules: AnnotationConfig
    heatmap: LargeFile
    places: tuple[Place, ...]
    folder: Output

    def run(self) -> dict:
        """``pictures``: their number."""
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        probabilities = open_heatmap(self.heatmap.path)
        grid = probabilities.grid
        panels = [HeatmapPanel("heatmap", probabilities.values(), grid)]
        with Slide(self.slide.path, self.mpp) as slide:
            lesions = slide_annotation(slide, self.annotation, self.annotation_rules).lesions
            for place in self.places:
                least = grid.level0_length(INNER_SQUARES * grid.inner_px)
                jpeg = _picture(slide, place.box, least, lesions, panels)
                write_whole(Path(self.folder) / place.name, jpeg)
        return {"pictures": len(self.places)}


def _picture(slide: Slide, box, least: float, lesions, panels) -> bytes:
    shown = _picture_square(box, least)
    downsample = max(1.0, shown.width / PICTURE_PX)
    side = max(1, round(shown.width / downsample))
    image = slide.read(shown.x, shown.y, side, side, downsample)
    x0, y0, x1, y1 = box
    marks = [(x0, y0)] if (x0, y0) == (x1, y1) else []
    return heatmap_figure(image, shown, lesions, panels, marks=marks, width_inches=WIDTH_INCHES)


def _picture_square(box: tuple[float, ...], least: float) -> Bounds:
    """A square around a box, level-0 px; it may reach over the slide's edge, which is white."""
    x0, y0, x1, y1 = box
    side = round(max(least, AROUND_LESION * max(x1 - x0, y1 - y0)))
    return Bounds(round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2), side, side)
