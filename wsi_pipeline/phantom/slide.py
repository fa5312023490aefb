"""A plan to the files of a slide."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import shapely

from wsi_pipeline.geometry import Bounds
from wsi_pipeline.phantom.feather import feather, window_box
from wsi_pipeline.phantom.histology import Histology
from wsi_pipeline.phantom.layout import INKS, Layout, draw_layout
from wsi_pipeline.phantom.mosaic import Mosaic
from wsi_pipeline.phantom.plan import SlidePlan
from wsi_pipeline.phantom.pyramid import TILE_PX, write_mask, write_slide_pyramid
from wsi_pipeline.raster import fill
from wsi_pipeline.slides.annotation_xml import write_asap_xml

GLASS = 243  # grey of the empty slide
LESION = 255  # in masks
BLOCK_PX = (1024, 2 * TILE_PX)  # width and height of what is drawn at once
TISSUE_EDGE_UM, TUMOUR_EDGE_UM, FOLD_EDGE_UM, PEN_EDGE_UM = 2.0, 3.0, 3.0, 2.0
MELANIN = np.array([0.0, 0.0, 0.35], np.float32)  # browner: it takes more of the blue
FOLD_GAIN = 0.8  # a fold lays tissue over tissue


def write_slide(plan: SlidePlan, out: str | Path) -> dict:
    """Draw one slide: ``slides/ID.tif``, ``masks/ID.tif`` and, with tumour, ``annotations/ID.xml``.

    The annotation is the exact boundary. The mask is as the challenge's, but of one level: level-0
    size, 255 in every pixel whose centre lies in a lesion, else 0.

    Parameters
    ----------
    plan : SlidePlan
    out : path-like
        The cohort's folder.

    Returns
    -------
    dict
        The slide's row of the cohort's table; paths relative to `out`.

    Raises
    ------
    ConfigError
        If the tissue has no room for a lesion of the plan.
    """
    out = Path(out)
    layout = draw_layout(plan)
    image = out / "slides" / f"{plan.slide_id}.tif"
    mask = out / "masks" / f"{plan.slide_id}.tif"
    annotation = out / "annotations" / f"{plan.slide_id}.xml"
    for file in (image, mask, annotation):
        file.parent.mkdir(parents=True, exist_ok=True)
    if layout.lesions:
        write_asap_xml(annotation, layout.lesions)
    write_mask(mask, plan.size, plan.mpp, _mask_strips(plan, layout))
    write_slide_pyramid(image, plan.size, plan.mpp, _image_strips(plan, layout))
    return {
        "slide_id": plan.slide_id,
        "path": image.relative_to(out).as_posix(),
        "annotation": annotation.relative_to(out).as_posix() if layout.lesions else None,
        "patient_id": plan.patient_id,
        "label": plan.label,
        "split": plan.split,
    }


def write_table(rows: Sequence[dict], out: str | Path) -> Path:
    """Write the rows of `write_slide` as ``slides.csv``, the catalog's input."""
    table = pd.DataFrame(rows).sort_values("slide_id").dropna(axis="columns", how="all")
    path = Path(out) / "slides.csv"
    table.to_csv(path, index=False)
    return path


def _mask_strips(plan: SlidePlan, layout: Layout) -> Iterator[np.ndarray]:
    width, height = plan.size
    for y in range(0, height, TILE_PX):
        window = Bounds(0, y, width, min(TILE_PX, height - y))
        strip = np.zeros((window.height, width), np.uint8)
        for lesion in layout.lesions:
            if lesion.intersects(window_box(window)):
                strip[fill(lesion, window)] = LESION
        yield strip


def _image_strips(plan: SlidePlan, layout: Layout) -> Iterator[np.ndarray]:
    texture = Mosaic(plan) if plan.normal_tiles else Histology(plan.seed, plan.mpp, layout)
    stained = shapely.union_all([layout.tissue, *(stroke for stroke, _ in layout.pens)])
    shapely.prepare(stained)
    width, height = plan.size
    for y in range(0, height, BLOCK_PX[1]):
        rows = min(BLOCK_PX[1], height - y)
        band = np.full((rows, width, 3), GLASS, np.uint8)
        for x in range(0, width, BLOCK_PX[0]):
            window = Bounds(x, y, min(BLOCK_PX[0], width - x), rows)
            if stained.intersects(window_box(window, margin_px=TISSUE_EDGE_UM / plan.mpp + 2)):
                band[:, x : x + window.width] = _block(window, plan.mpp, layout, texture)
        for top in range(0, rows, TILE_PX):
            yield band[top : top + TILE_PX]


def _block(window: Bounds, mpp: float, layout: Layout, texture) -> np.ndarray:
    """Pixels of a window: light through tissue, folds and ink, uint8 (height, width, 3)."""
    tissue, fold = (
        feather(geometry, window, round(edge_um / mpp))
        for geometry, edge_um in ((layout.tissue, TISSUE_EDGE_UM), (layout.folds, FOLD_EDGE_UM))
    )
    density = np.zeros((window.height, window.width, 3), np.float32)
    if tissue.any():
        edge_px = round(TUMOUR_EDGE_UM / mpp)
        sheets = texture.density(window, feather(layout.sheets, window, edge_px))
        if layout.naevi:
            naevus = feather(shapely.MultiPolygon(layout.naevi), window, edge_px)
            sheets *= 1 + naevus[..., None] * MELANIN
        density += sheets * (tissue * (1 + FOLD_GAIN * fold))[..., None]
    for stroke, ink in layout.pens:
        opacity = feather(stroke, window, round(PEN_EDGE_UM / mpp))
        density += opacity[..., None] * np.array(INKS[ink], np.float32)
    return (GLASS * np.exp(-density) + 0.5).astype(np.uint8)
