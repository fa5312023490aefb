"""Inner-square labels of patches."""

import numpy as np
import shapely

from benchmarks.measure import Row, compare
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.patches.index import build_index
from wsi_pipeline.slides.tissue import TissueMask


def rows(quick: bool) -> list[Row]:
    """A slide."""
    return [labelling()]


def labelling() -> Row:
    """Inner-square labels of a slide against a loop of shapely intersections."""
    bounds = Bounds(0, 0, 60_000, 60_000)
    grid = PatchGrid(bounds, 0.25, 1.0)
    angle = np.linspace(0, 2 * np.pi, 5000, endpoint=False)
    wave = 1 + 0.2 * np.sin(17 * angle) + 0.05 * np.sin(200 * angle)
    lesions = [
        shapely.Polygon(
            np.stack([x + r * wave * np.cos(angle), y + r * wave * np.sin(angle)], axis=1)
        )
        for x, y, r in ((12_000, 12_000, 6000), (40_000, 15_000, 9000), (30_000, 45_000, 10_000))
    ]
    tissue = TissueMask(np.ones((1875, 1875), bool), bounds, 32.0)
    cells = grid.shape[0] * grid.shape[1]

    def pipeline() -> int:
        build_index("slide", grid, tissue, lesions, 1, 0.05)
        return cells

    def plain() -> int:
        rows, cols = np.indices(grid.shape).reshape(2, -1)
        squares = [shapely.box(*box) for box in grid.inner_boxes(rows, cols)[::50]]
        for square in squares:
            any(lesion.intersection(square).area > 0 for lesion in lesions)
        return len(squares)

    return compare(
        "labelling a slide of 55,225 cells, 3 lesions of 5,000 points",
        "an intersection for each cell and lesion", "cells", pipeline, plain,
    )  # fmt: skip
