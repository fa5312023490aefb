"""The patch index: which patches a slide has, and what the annotation says of each.

A patch is positive iff its inner square intersects the annotation (Lecture): any positive area,
neither its centre point nor a fraction; a common border is no area. One Parquet file for each
slide.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely

from wsi_pipeline.errors import CatalogError, ConfigError, RunError
from wsi_pipeline.files import replace_atomically
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.slides.tissue import TissueMask

SCHEMA_VERSION = 1
METADATA_KEY = b"wsi_pipeline"
SCHEMA = pa.schema(
    {
        "x": pa.int32(),
        "y": pa.int32(),
        "tissue": pa.float32(),
        "coverage": pa.float32(),
        "label": pa.int8(),
        "lesions": pa.list_(pa.int32()),
    }
)
CELLS_AT_ONCE = 1 << 17
# A smaller share of the inner square is what rounding makes of a border that two share.
LEAST_COVERAGE = 1e-9


@dataclass(frozen=True, eq=False)
class PatchIndex:
    """The patches of one slide.

    Parameters
    ----------
    slide_id : str
    grid : PatchGrid
    table : pyarrow.Table
        Row-major in the grid. ``x``, ``y`` (int32): upper left corner, level-0 px. ``tissue``,
        ``coverage`` (float32): shares of the inner square that are tissue and annotated.
        ``label`` (int8): 1 tumour, 0 no tumour, -1 unknown (``coverage`` is then NaN).
        ``lesions`` (list of int32): ids, from 1, of all lesions that the inner square intersects.
    """

    slide_id: str
    grid: PatchGrid
    table: pa.Table

    def cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the patches in the grid.

        Returns
        -------
        rows, cols : int64 arrays, shape (N,)

        Raises
        ------
        RunError
            If a patch, of an index made elsewhere, does not lie where its grid has one.
        """
        x, y = (self.table[axis].to_numpy() for axis in "xy")
        rows, cols = self.grid.cells_at(x, y)
        off = np.any(np.stack(self.grid.patch_origins(rows, cols)) != np.stack([x, y]), axis=0)
        if off.any():
            first = int(np.argmax(off))
            raise RunError(
                f"{self.slide_id}: the indexed patch at x {x[first]}, y {y[first]} is none of its"
                " grid's: only those have a place in heatmaps and caches"
            )
        return rows, cols


def build_index(
    slide_id: str,
    grid: PatchGrid,
    tissue: TissueMask,
    lesions: Sequence[shapely.Polygon],
    slide_label: int,
    min_tissue: float,
) -> PatchIndex:
    """Index the patches whose inner square holds tissue, and label them.

    Parameters
    ----------
    slide_id : str
    grid : PatchGrid
    tissue : TissueMask
    lesions : sequence of Polygon
        Disjoint, level-0 px; a lesion's id is its position + 1.
    slide_label : int
        1, 0 or -1. A slide that is tumour by its label but has no lesion drawn, or one of
        unknown label, gives patches of unknown label.
    min_tissue : float
        A patch is indexed if more than this share of its inner square is tissue.

    Raises
    ------
    CatalogError
        If a slide has lesions but not label 1.
    """
    if lesions and slide_label != 1:
        raise CatalogError(
            f"slide {slide_id} has label {slide_label} but annotated lesions ({len(lesions)}): its"
            " label must be 1"
        )
    rows, cols, tissue_share = _tissue_cells(grid, tissue, min_tissue)
    cell, lesion, area = _overlaps(grid, rows, cols, lesions)
    counts = np.bincount(cell, minlength=len(rows))
    coverage = np.bincount(cell, area, len(rows)) / _square_area(grid)
    if slide_label == 0 or lesions:
        label = counts > 0
    else:
        label, coverage = np.full(len(rows), -1), np.full(len(rows), np.nan)
    order = np.lexsort((lesion, cell))
    columns = [
        *grid.patch_origins(rows, cols),
        tissue_share.astype(np.float32),
        coverage.clip(0, 1).astype(np.float32),
        label.astype(np.int8),
        pa.ListArray.from_arrays(
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            lesion[order].astype(np.int32),
        ),
    ]
    return PatchIndex(slide_id, grid, pa.table([pa.array(c) for c in columns], schema=SCHEMA))


def uncovered_lesions(
    index: PatchIndex, lesions: Sequence[shapely.Polygon], tissue: TissueMask
) -> dict[int, str]:
    """Why no indexed patch's inner square intersects a lesion, by the ids of such lesions."""
    found = pc.unique(pc.list_flatten(index.table["lesions"]))
    ids = np.setdiff1d(np.arange(1, len(lesions) + 1), found.to_numpy()).tolist()
    if not ids:
        return {}
    grid = index.grid
    rows, cols = np.indices(grid.shape).reshape(2, -1)
    cell, lesion, _ = _overlaps(grid, rows, cols, [lesions[i - 1] for i in ids])
    squares = {i: cell[lesion == number] for number, i in enumerate(ids, 1)}
    return {i: _why_uncovered(rows[at], cols[at], grid, tissue) for i, at in squares.items()}


def _why_uncovered(rows, cols, grid: PatchGrid, tissue: TissueMask) -> str:
    """Why no patch finds a lesion that intersects these inner squares."""
    if not len(rows):
        gaps = grid.stride_px > grid.inner_px
        return "lies between the inner squares" if gaps else "lies outside what was scanned"
    share = tissue.fraction(grid.inner_boxes(rows, cols)).max()
    if share == 0:
        return "has no tissue in the mask"
    return f"is in inner squares with {share:.1%} tissue at most, too little for tile.min_tissue"


def write_index(index: PatchIndex, path) -> None:
    """Write Parquet; whole or not at all."""
    metadata = {
        "schema_version": SCHEMA_VERSION,
        "slide_id": index.slide_id,
        "grid": index.grid.to_dict(),
    }
    table = index.table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata)})
    with replace_atomically(path) as part:
        pq.write_table(table, part, compression="zstd")


def read_index(path) -> PatchIndex:
    """Read what `write_index` wrote, or others wrote in its form.

    Raises
    ------
    RunError
        If the file is missing or damaged, or lacks a column or the grid.
    """
    try:
        table = pq.read_table(path)
        metadata = json.loads((table.schema.metadata or {})[METADATA_KEY])
        if metadata["schema_version"] != SCHEMA_VERSION:
            raise RunError(
                f"{path}: schema version {metadata['schema_version']}, this code reads"
                f" {SCHEMA_VERSION}"
            )
        grid = PatchGrid.from_dict(metadata["grid"])
        table = table.select(SCHEMA.names).cast(SCHEMA)
        return PatchIndex(metadata["slide_id"], grid, table)
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException, ConfigError) as error:
        raise RunError(
            f"{path}: no patch index: {type(error).__name__}: {error}; it needs the columns"
            f" {', '.join(SCHEMA.names)} and the grid in its metadata"
        ) from error


def _tissue_cells(
    grid: PatchGrid, tissue: TissueMask, min_tissue: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and tissue shares of the cells with tissue, a band of rows at a time."""
    n_rows, n_cols = grid.shape
    step = max(1, CELLS_AT_ONCE // n_cols)
    parts = []
    for first in range(0, n_rows, step):
        rows, cols = np.mgrid[first : min(first + step, n_rows), :n_cols].reshape(2, -1)
        share = tissue.fraction(grid.inner_boxes(rows, cols))
        kept = share > min_tissue
        parts.append((rows[kept], cols[kept], share[kept]))
    rows, cols, share = (np.concatenate(part) for part in zip(*parts, strict=True))
    return rows, cols, share


def _overlaps(
    grid: PatchGrid, rows: np.ndarray, cols: np.ndarray, lesions: Sequence[shapely.Polygon]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each pair of a cell and a lesion with common area: position, lesion id, area (px^2)."""
    parts = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    polygons = np.array(lesions, object)
    outlines = shapely.boundary(polygons)
    shapely.prepare(polygons)
    shapely.prepare(outlines)
    for first in range(0, len(rows), CELLS_AT_ONCE):
        band = slice(first, first + CELLS_AT_ONCE)
        boxes = grid.inner_boxes(rows[band], cols[band])
        cell, lesion = _box_lesion_pairs(boxes, shapely.bounds(polygons))
        squares = shapely.box(*boxes[cell].T)
        centres = (boxes[cell, :2] + boxes[cell, 2:]) / 2
        inside = shapely.contains_xy(polygons[lesion], *centres.T)
        area = np.where(inside, _square_area(grid), 0.0)
        cut = np.flatnonzero(shapely.intersects(outlines[lesion], squares))
        apart = _apart(grid, rows[band][cell[cut]], cols[band][cell[cut]], lesion[cut])
        area[cut] = _common_area(polygons[lesion[cut]], squares[cut], apart)
        common = area > LEAST_COVERAGE * _square_area(grid)
        parts.append((first + cell[common], lesion[common] + 1, area[common]))
    cell, lesion_id, area = (np.concatenate(part) for part in zip(*parts, strict=True))
    return cell, lesion_id, area


def _box_lesion_pairs(boxes: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pair of a box (row-major) and a lesion whose bounds it meets: their positions."""
    first = np.searchsorted(boxes[:, 3], bounds[:, 1], "right")
    end = np.searchsorted(boxes[:, 1], bounds[:, 3], "left")
    near = [
        start + np.flatnonzero((boxes[start:stop, 0] < x1) & (boxes[start:stop, 2] > x0))
        for start, stop, x0, x1 in zip(first, end, bounds[:, 0], bounds[:, 2], strict=True)
    ]
    lesion = np.repeat(np.arange(len(bounds)), [len(cells) for cells in near])
    return np.concatenate(near or [lesion]), lesion


def _apart(grid: PatchGrid, rows: np.ndarray, cols: np.ndarray, lesion: np.ndarray) -> np.ndarray:
    """Numbers of groups: the inner squares of a group neither overlap nor touch."""
    period = grid.inner_px // grid.stride_px + 1
    return (lesion * period + rows % period) * period + cols % period


def _common_area(lesions: np.ndarray, squares: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """Area that each square shares with its lesion.

    The squares of a group, all of one lesion, are cut from it at once as one multipolygon: an
    outline of 10^5 vertices is gone through four times, where inner squares tile the slide.
    """
    _, first, group = np.unique(apart, return_index=True, return_inverse=True)
    order = np.argsort(group)
    grouped = shapely.multipolygons(squares[order], indices=group[order])
    pieces, piece_group = shapely.get_parts(
        shapely.intersection(lesions[first], grouped), return_index=True
    )
    x0, y0, x1, y1 = shapely.bounds(pieces).T
    centres = shapely.points((x0 + x1) / 2, (y0 + y1) / 2)
    piece, square = shapely.STRtree(squares).query(centres, "intersects")
    own = group[square] == piece_group[piece]
    return np.bincount(square[own], shapely.area(pieces)[piece[own]], len(squares))


def _square_area(grid: PatchGrid) -> float:
    return grid.level0_length(grid.inner_px) ** 2
