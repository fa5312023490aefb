"""Places to explain: what the evaluation says is worth a look, or one that is asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd

from wsi_pipeline.config import TileConfig
from wsi_pipeline.errors import ConfigError, RunError
from wsi_pipeline.evaluation.patch_scores import read_scores
from wsi_pipeline.geometry import level0_box
from wsi_pipeline.patches.index import read_index
from wsi_pipeline.seeds import derived_seed
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages.run_directory import (
    evaluation_folder,
    index_path,
    read_slides,
    slides_path,
)

KINDS = {
    "false-positive": "False positives",
    "missed": "Missed lesions",
    "lowest": "Lesions found with the lowest probability",
    "hit": "Best hits",
    "asked": "Places asked for",
}
"""Kinds of places, in the order of the page, and their headings."""


@dataclass(frozen=True)
class PlacedPixels:
    """A rectangle of one slide, at the working resolution: what a map depends on.

    Parameters
    ----------
    slide_id : str
    x, y : int
        Upper left corner, level-0 px; may be negative where a patch reaches over the edge.
    width_px, height_px : int
        Working px.
    downsample : float
        Level-0 px per working px.
    patch_px : int
        Side of the model's patches, working px.
    """

    slide_id: str
    x: int
    y: int
    width_px: int
    height_px: int
    downsample: float
    patch_px: int


@dataclass(frozen=True)
class Place(PlacedPixels):
    """Such a rectangle, and why it is explained.

    Parameters
    ----------
    kind : str
        A key of `KINDS`.
    lesion_id : int or None
        Of the lesion that it is about.
    evaluated : float or None
        F(I) of the patch in the evaluation.
    """

    kind: str
    lesion_id: int | None = None
    evaluated: float | None = None

    @property
    def pixels(self) -> PlacedPixels:
        """The rectangle alone: the same pixels have the same map, whatever the kind of place."""
        return PlacedPixels(**{of.name: getattr(self, of.name) for of in fields(PlacedPixels)})

    @property
    def name(self) -> str:
        """Folder of its results: unique in a run of the stage."""
        if self.lesion_id is not None:
            return f"{self.kind}-{self.slide_id}-lesion-{self.lesion_id}"
        place = f"{self.kind}-{self.slide_id}-{self.x}-{self.y}"
        if (self.width_px, self.height_px) == (self.patch_px, self.patch_px):
            return place
        return f"{place}-{self.width_px}x{self.height_px}"


def asked_place(
    slide: Slide,
    slide_id: str,
    at: tuple[int, int],
    size_px: tuple[int, int] | None,
    tile: TileConfig,
) -> Place:
    """The place that a user asks for.

    Parameters
    ----------
    slide : Slide
    slide_id : str
    at : (int, int)
        Upper left corner, level-0 px.
    size_px : (int, int) or None
        Width and height, working px; None for one patch.
    tile : TileConfig
        Says what the working resolution and a patch are.

    Raises
    ------
    ConfigError
        If it is smaller than a patch, or has no pixel of the slide's scanned bounds.
    """
    width_px, height_px = size_px or (tile.patch_px, tile.patch_px)
    if min(width_px, height_px) < tile.patch_px:
        raise ConfigError(
            f"the place's size is {width_px} x {height_px} px: it must be that of a patch"
            f" (tile.patch_px), {tile.patch_px} px, or more on each side"
        )
    downsample, bounds, (x, y) = slide.downsample(tile.level, tile.mpp), slide.bounds, at
    _, _, end_x, end_y = level0_box(x, y, width_px, height_px, downsample)
    over_x = bounds.x < end_x and x < bounds.x + bounds.width
    over_y = bounds.y < end_y and y < bounds.y + bounds.height
    if not (over_x and over_y):
        raise ConfigError(
            f"the place at level-0 px ({x}, {y}), {width_px} x {height_px} px of {downsample:g}"
            f" level-0 px, lies off slide {slide_id} ({slide.path}), which has x {bounds.x} to"
            f" {bounds.x + bounds.width}, y {bounds.y} to {bounds.y + bounds.height}"
        )
    return Place(slide_id, x, y, width_px, height_px, downsample, tile.patch_px, "asked")


def evaluated_places(run_dir: Path, model: str, top: int) -> list[Place]:
    """What the evaluation of a model says is worth a look, `top` places of each kind.

    The worst false positives: the most confident detections off all lesions, each at the grid
    patch that it comes from. Missed lesions, the largest first; where there are fewer than `top`,
    found ones with the lowest probability follow. The best hits: found lesions with the highest
    probability. The place of a lesion is, of the patches whose inner square touches it, the one
    with the highest F(I); a lesion without a scored patch has none and is left out.

    Returns
    -------
    list of Place

    Raises
    ------
    RunError
        If there is no evaluation, or a file of it is missing.
    """
    folder = evaluation_folder(run_dir, model)
    wrong = _read_csv(folder / "false_positives.csv").head(top)
    lesions = _read_csv(folder / "lesions.csv")
    lesions = lesions[np.isfinite(lesions["patch_score"].astype(float))]
    found = lesions[lesions["status"] == "found"]
    found = found.sort_values("patch_score", ascending=False, kind="stable")
    best, rest = found.head(top), found.iloc[top:]
    missed = lesions[lesions["status"] == "missed"].head(top)
    lowest = rest.iloc[::-1].head(top - len(missed))
    return [
        *(_patch_at(run_dir, folder, row.slide_id, row.x, row.y) for row in wrong.itertuples()),
        *_of_lesions(run_dir, folder, "missed", missed),
        *_of_lesions(run_dir, folder, "lowest", lowest),
        *_of_lesions(run_dir, folder, "hit", best),
    ]


def annotated_patches(run_dir: Path, model: str, count: int, seed: int) -> list[Place]:
    """Test patches whose inner square is partly annotated as tumour, drawn at random.

    Slides take turns, so that one with many such patches does not stand for all.

    Returns
    -------
    list of Place
        `count`, or as many as there are.

    Raises
    ------
    RunError
        As `evaluated_places`.
    """
    folder = evaluation_folder(run_dir, model)
    slides = _read_csv(folder / "slides.csv")
    tumour = slides[(slides["split"] == "test") & (slides["label"] == 1)]
    if tumour.empty:
        return []
    patches = _patches(folder, sorted(tumour["slide_id"]))
    patches = patches[(patches["coverage"] > 0) & (patches["coverage"] < 1)]
    drawn = patches.sample(frac=1, random_state=derived_seed(seed, "explain/patches") % 2**32)
    turn = drawn.groupby("slide_id", observed=True).cumcount()
    drawn = drawn.iloc[np.lexsort((drawn["slide_id"], turn))].head(count)
    return [_patch(run_dir, "asked", row.slide_id, row) for row in drawn.itertuples()]


def catalogued(slides: pd.DataFrame, slide_id: str) -> pd.Series:
    """The row, by slide id, of a slide that the evaluation names.

    Raises
    ------
    RunError
        If there is none: the evaluation is older than the catalog.
    """
    if slide_id not in slides.index:
        raise RunError(
            f"slide {slide_id!r} of the evaluation is not among the {len(slides)} readable slides"
            " of today's catalog: evaluate again"
        )
    return slides.loc[slide_id]


def slide_of(run_dir: Path, slide_id: str) -> pd.Series:
    """The catalog's row of a slide that could be opened.

    Raises
    ------
    RunError
        If there is none.
    """
    slides = read_slides(run_dir)
    rows = slides[slides["slide_id"] == slide_id]
    if rows.empty:
        raise RunError(
            f"slide {slide_id!r} is not among the {len(slides)} readable slides of"
            f" {slides_path(run_dir)}"
        )
    return rows.iloc[0]


def _read_csv(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise RunError(
            f"{path} does not exist: run the evaluate stage first, or ask for a place by --slide"
            " and --at"
        )
    return pd.read_csv(path, dtype={"slide_id": str})


def _patches(folder: Path, slide_ids: Sequence[str]) -> pd.DataFrame:
    """The scored patches of slides: ``x, y, coverage, lesions, score`` and ``slide_id``."""
    patches = read_scores(folder, slide_ids, ("x", "y", "coverage", "lesions", "score"))
    return patches[patches["score"].notna()]


def _patch_at(run_dir: Path, folder: Path, slide_id: str, x: float, y: float) -> Place:
    """The grid patch that a detection comes from: its centre is the nearest."""
    patches, grid = _patches(folder, [slide_id]), read_index(index_path(run_dir, slide_id)).grid
    centres = np.stack(grid.centre_pixels(*grid.cells_at(patches["x"], patches["y"])))
    distance = np.hypot(centres[0] - x, centres[1] - y)
    row = patches.iloc[np.lexsort((-patches["score"], distance))[0]]
    return _patch(run_dir, "false-positive", slide_id, row)


def _of_lesions(run_dir: Path, folder: Path, kind: str, lesions: pd.DataFrame) -> Iterator[Place]:
    for lesion in lesions.itertuples():
        patches = _patches(folder, [lesion.slide_id])
        of_lesion = patches[[lesion.lesion_id in ids for ids in patches["lesions"]]]
        if len(of_lesion):
            row = of_lesion.loc[of_lesion["score"].idxmax()]
            yield _patch(run_dir, kind, lesion.slide_id, row, int(lesion.lesion_id))


def _patch(run_dir: Path, kind: str, slide_id: str, row, lesion_id: int | None = None) -> Place:
    grid = read_index(index_path(run_dir, slide_id)).grid
    return Place(
        slide_id, int(row.x), int(row.y), grid.patch_px, grid.patch_px,
        float(grid.downsample), grid.patch_px, kind, lesion_id, float(row.score),
    )  # fmt: skip
