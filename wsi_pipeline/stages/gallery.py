"""Pictures of places: each lesion, found or missed, and the worst false positives."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from wsi_pipeline.files import write_whole
from wsi_pipeline.geometry import Bounds
from wsi_pipeline.heatmaps.render import HeatmapPanel, heatmap_figure
from wsi_pipeline.heatmaps.store import open_heatmap
from wsi_pipeline.jobs.record import file_fingerprint
from wsi_pipeline.jobs.run import Unit
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages import catalog

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
    annotation_rules: dict,
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
    annotation_rules : dict
        See `catalog.slide_annotation`.
    """
    for slide in slides.itertuples(index=False):
        places = [
            {
                "name": picture_name("lesion", row.lesion_id),
                "box": [float(side) for side in (row.x0, row.y0, row.x1, row.y1)],
            }
            for row in lesions[lesions["slide_id"] == slide.slide_id].itertuples(index=False)
        ] + [
            {
                "name": picture_name("false-positive", row.Index),
                "box": [float(row.x), float(row.y)] * 2,
            }
            for row in false_positives[false_positives["slide_id"] == slide.slide_id].itertuples()
        ]
        if not places:
            continue
        heatmap = heatmaps / f"{slide.slide_id}.zarr"
        output = folder / slide.slide_id
        settings = {"places": places, "annotation_rules": annotation_rules, "mpp": slide.mpp}
        inputs = {
            **settings,
            "slide_file": file_fingerprint(slide.path),
            "annotation_file": slide.annotation
            and file_fingerprint(slide.annotation, content=True),
            "heatmap": file_fingerprint(heatmap),
        }
        arguments = {
            **settings,
            "path": slide.path,
            "annotation": slide.annotation,
            "heatmap": str(heatmap),
            "folder": str(output),
        }
        yield Unit(slide.slide_id, slide.slide_id, inputs, draw_places, arguments, output)


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


def draw_places(
    path: str, mpp: float, annotation: str | None, annotation_rules: dict, heatmap: str,
    places: list[dict], folder: str,
) -> dict:  # fmt: skip
    """Draw places of one slide: the work of a unit.

    A lesion is shown with some of what is around it; a false positive with a circle.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    probabilities = open_heatmap(heatmap)
    grid = probabilities.grid
    panels = [HeatmapPanel("heatmap", probabilities.values(), grid)]
    with Slide(path, mpp) as slide:
        lesions = catalog.slide_annotation(slide, annotation, **annotation_rules).lesions
        for place in places:
            shown = _picture_square(place["box"], grid.level0_length(INNER_SQUARES * grid.inner_px))
            downsample = max(1.0, shown.width / PICTURE_PX)
            side = max(1, round(shown.width / downsample))
            image = slide.read(shown.x, shown.y, side, side, downsample)
            x0, y0, x1, y1 = place["box"]
            marks = [(x0, y0)] if (x0, y0) == (x1, y1) else []
            jpeg = heatmap_figure(
                image, shown, lesions, panels, marks=marks, width_inches=WIDTH_INCHES
            )
            write_whole(Path(folder) / place["name"], jpeg)
    return {"pictures": len(places)}


def _picture_square(box: list[float], least: float) -> Bounds:
    """A square around a box, level-0 px; it may reach over the slide's edge, which is white."""
    x0, y0, x1, y1 = box
    side = round(max(least, AROUND_LESION * max(x1 - x0, y1 - y0)))
    return Bounds(round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2), side, side)
