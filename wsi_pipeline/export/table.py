"""The patches of a heatmap as a table."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd

from wsi_pipeline.errors import ExportError
from wsi_pipeline.files import replace_atomically, write_whole
from wsi_pipeline.geometry import PatchGrid

KINDS = (".csv", ".csv.gz", ".parquet")


def write_patches(path, *, values: np.ndarray, grid: PatchGrid, slide_id: str) -> None:
    """Write one row for each patch with a prediction, whole or not at all.

    Columns are ``slide_id``; ``x``, ``y``: the patch's upper left corner, whole level-0 px, which
    may lie off the slide; ``width``: side of the patch in level-0 px, not rounded; ``mpp``: the
    resolution at which the model saw the patch, um per px; ``probability`` in [0, 1].

    Parameters
    ----------
    path : path-like
        Ends in ``.csv``, ``.csv.gz`` or ``.parquet``.
    values : float array, shape `grid.shape`
        Level 0 of the heatmap, in [0, 1]; NaN (no tissue) has no row.
    grid : PatchGrid
    slide_id : str

    Raises
    ------
    ExportError, RunError
        If the name has another ending, or `values` are not of the grid's shape.
    """
    path = Path(path)
    if not path.name.endswith(KINDS):
        raise ExportError(f"{path}: a table of patches ends in {', '.join(KINDS)}. Rename it.")
    table = patch_table(values, grid, slide_id)
    if path.suffix == ".parquet":
        with replace_atomically(path) as part:
            table.to_parquet(part, index=False)
        return
    text = table.to_csv(index=False, lineterminator="\n").encode()
    write_whole(path, gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def patch_table(values: np.ndarray, grid: PatchGrid, slide_id: str) -> pd.DataFrame:
    """The rows of `write_patches`, by row and column of the heatmap.

    Raises
    ------
    RunError
        If `values` are not of the grid's shape.
    """
    grid.check_shape(values)
    rows, cols = np.nonzero(np.isfinite(values))
    x, y = grid.patch_origins(rows, cols)
    return pd.DataFrame(
        {
            "slide_id": np.full(len(x), slide_id, dtype=object),
            "x": x,
            "y": y,
            "width": grid.level0_length(grid.patch_px),
            "mpp": grid.working_mpp,
            "probability": np.asarray(values, np.float32)[rows, cols],
        }
    )
