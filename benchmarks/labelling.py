"""Inner-square labels of patches, without their pixels."""

import time
from unittest import mock

import numpy as np
import shapely
from scipy import ndimage

from benchmarks.measure import Row, compare
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.patches import index
from wsi_pipeline.patches.index import build_index
from wsi_pipeline.slides.tissue import TissueMask

MASK_DOWNSAMPLE = 32
BLOCK_PX = 20  # the synthetic masks are made of such squares
TISSUE_CELLS = 10_700  # inner squares that the tissue would fill: it meets about 11,000
EACH_CELL = "an intersection for each cell and lesion"


def rows(quick: bool) -> list[Row]:
    """A slide, then a cohort of the lecture's size."""
    return [labelling(), cohort(20 if quick else 698)]


def labelling() -> Row:
    """Inner-square labels of a slide against a loop of shapely intersections."""
    bounds = Bounds(0, 0, 60_000, 60_000)
    grid = PatchGrid(bounds, 0.25, 1.0)
    angle = np.linspace(0, 2 * np.pi, 5000, endpoint=False)
    wave = 1 + 0.2 * np.sin(17 * angle) + 0.05 * np.sin(200 * angle)
    lesions = [
        _around(x, y, r * wave)
        for x, y, r in ((12_000, 12_000, 6000), (40_000, 15_000, 9000), (30_000, 45_000, 10_000))
    ]
    tissue = TissueMask(np.ones((1875, 1875), bool), bounds, 32.0)
    cells = grid.shape[0] * grid.shape[1]

    def pipeline() -> int:
        build_index("slide", grid, tissue, lesions, 1, 0.05)
        return cells

    def plain() -> int:
        rows, cols = np.indices(grid.shape).reshape(2, -1)
        return _label_each(grid.inner_boxes(rows, cols)[::50], lesions)

    return compare(
        "labelling a slide of 55,225 cells, 3 lesions of 5,000 points",
        EACH_CELL, "cells", pipeline, plain,
    )  # fmt: skip


def cohort(slides: int) -> Row:
    """All slides of a cohort, a third of them with lesions, against the loop on some patches.

    The time is that of `build_index` alone: tissue, labels and table. The loop is given the
    patches and only labels them. Both work on each slide in turn; the ratio is that of the totals,
    since a slide without lesions is no pair of one with a hundred thousand points.
    """
    measured, points = [], []
    for number in range(slides):
        grid, tissue, lesions = _slide(number)
        measured.append(_timed(grid, tissue, lesions))
        points += shapely.get_num_coordinates(lesions).tolist()
    patches, seconds, polygon_seconds, sampled, loop_seconds = np.sum(measured, axis=0).tolist()
    ours, theirs = patches / seconds, sampled / loop_seconds
    return Row(
        f"tiling {slides} slides of {patches / slides:,.0f} patches, a third with lesions"
        f" ({len(points):,} of {min(points):,} to {max(points):,} points);"
        f" {polygon_seconds / seconds:.0%} of the time in polygon tests",
        EACH_CELL, "patches", ours, theirs, ours / theirs,
    )  # fmt: skip


def _timed(
    grid: PatchGrid, tissue: TissueMask, lesions: list[shapely.Polygon]
) -> tuple[int, float, float, int, float]:
    """Patches, seconds, those of them in polygon tests; patches of the loop, and its seconds."""
    in_polygons = 0.0
    overlaps = index._overlaps

    def timed_overlaps(*arguments):
        nonlocal in_polygons
        started = time.perf_counter()
        found = overlaps(*arguments)
        in_polygons += time.perf_counter() - started
        return found

    with mock.patch.object(index, "_overlaps", timed_overlaps):
        started = time.perf_counter()
        made = build_index("slide", grid, tissue, lesions, int(bool(lesions)), 0.05)
        seconds = time.perf_counter() - started
    patches = (made.table[axis].to_numpy()[::200] for axis in "xy")
    boxes = grid.inner_boxes(*grid.cells_at(*patches))
    started = time.perf_counter()
    _label_each(boxes, lesions)
    return made.table.num_rows, seconds, in_polygons, len(boxes), time.perf_counter() - started


def _label_each(boxes: np.ndarray, lesions: list[shapely.Polygon]) -> int:
    for box in boxes:
        square = shapely.box(*box)
        any(lesion.intersection(square).area > 0 for lesion in lesions)
    return len(boxes)


def _slide(number: int) -> tuple[PatchGrid, TissueMask, list[shapely.Polygon]]:
    """A slide of 15 to 25 mm a side: pieces of tissue, on every third slide 1 to 20 lesions."""
    rng = np.random.default_rng(number)
    width, height = rng.integers(60_000, 100_000, 2).tolist()
    grid = PatchGrid(Bounds(0, 0, width, height), 0.25, 1.0)
    block = BLOCK_PX * MASK_DOWNSAMPLE
    field = ndimage.gaussian_filter(rng.normal(size=(height // block, width // block)), 6)
    whole = TISSUE_CELLS * 256**2 / (width * height)
    coarse = field > np.quantile(field, 1 - whole)
    mask = coarse.repeat(BLOCK_PX, 0).repeat(BLOCK_PX, 1)
    tissue = TissueMask(mask, grid.bounds, MASK_DOWNSAMPLE)
    if number % 3:
        return grid, tissue, []
    y, x = block * np.argwhere(coarse).T
    lesions = []
    for _ in range(rng.integers(1, 21)):
        centre = rng.integers(len(x))
        drawn = _outline(rng, x[centre], y[centre])
        if not shapely.intersects(drawn, lesions).any():
            lesions.append(drawn)
    return grid, tissue, lesions


def _outline(rng: np.random.Generator, x: int, y: int) -> shapely.Polygon:
    """A lesion as a hand draws it: 50 to 10^5 points, some 10 px apart, rough at every scale."""
    points = int(50 * 2000 ** rng.random())
    radius = min(2 * points, 8000) * rng.uniform(0.5, 1)
    waves = np.arange(1, points // 2 + 1)
    amplitude = 0.1 * points * waves**-1.3
    phases = np.exp(2j * np.pi * rng.random(len(waves)))
    wave = np.fft.irfft(np.concatenate([[0], amplitude * phases]), points)
    return _around(x, y, radius * np.exp(wave))


def _around(x: float, y: float, reach: np.ndarray) -> shapely.Polygon:
    """The polygon whose points are so far from a centre, at even angles."""
    angle = np.linspace(0, 2 * np.pi, len(reach), endpoint=False)
    return shapely.Polygon(np.stack([x + reach * np.cos(angle), y + reach * np.sin(angle)], axis=1))
