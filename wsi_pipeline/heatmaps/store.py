"""Heatmaps as OME-Zarr: one pyramid of 2-D images for each slide, which viewers lay over it.

NGFF 0.5 (Zarr 3) or 0.4 (Zarr 2). Pixel (row, col) of level 0 is the grid's cell (row, col);
NaN means not predicted: no tissue there, or not readable. Besides the NGFF metadata the group
carries, under ``wsi_pipeline``, the slide, the model and the grid: a heatmap explains itself.

Metadata are not consolidated: there are few arrays, and Zarr 3 does not specify it.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr

from wsi_pipeline.errors import RunError, WsiError
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.heatmaps.ngff import Channel, array_layout, group_attributes, zarr_format
from wsi_pipeline.heatmaps.pyramid import block_means
from wsi_pipeline.patches.slabs import Slab

SCHEMA = 1
"""Of values, levels and the block ``wsi_pipeline``. It stays when only what viewers are told
changes: nobody predicts slides again for a colour."""
COARSEST_PX = 64
"""The pyramid ends at the first level whose longer side is this or less."""


@dataclass(frozen=True)
class Heatmap:
    """A heatmap on disk; pixels are read when asked for.

    Parameters
    ----------
    path : Path
    slide_id, model : str
    precision : str or None
        What the values were computed in, float32 or bfloat16; None: not on record.
    grid : PatchGrid
        Says where the pixels lie on the slide.
    ngff : str
        "0.4" or "0.5".
    levels : tuple of zarr.Array
        float32 (rows, cols); each level halves the one before it.
    """

    path: Path
    slide_id: str
    model: str
    precision: str | None
    grid: PatchGrid
    ngff: str
    levels: tuple[zarr.Array, ...]

    @property
    def modified(self) -> datetime:
        """When its metadata were written, in UTC."""
        metadata = self.path / ("zarr.json" if self.ngff == "0.5" else ".zattrs")
        return datetime.fromtimestamp(metadata.stat().st_mtime, UTC)

    def values(
        self, level: int = 0, rows: slice = slice(None), cols: slice = slice(None)
    ) -> np.ndarray:
        """Pixels of a level, or of a window in it.

        Parameters
        ----------
        level : int
        rows, cols : slice
            The window; only the chunks under it are read.

        Returns
        -------
        float32 array, shape (rows, cols)
            Probabilities in [0, 1]; of an explanation's map, in the method's units. NaN where not
            predicted.

        Raises
        ------
        RunError
            If a chunk is damaged.
        """
        try:
            return np.asarray(self.levels[level][rows, cols])
        except (OSError, RuntimeError, ValueError) as error:
            raise RunError(f"{self.path}: level {level} is damaged: {error}") from error

    def at(self, x, y) -> np.ndarray:
        """Values of patches.

        Parameters
        ----------
        x, y : array_like of int, shape (N,)
            Upper left corners, level-0 px, as in the patch index.

        Returns
        -------
        float32 array, shape (N,)
            NaN where not predicted.

        Raises
        ------
        RunError
            If a patch lies outside the heatmap's grid, or a chunk is damaged.
        """
        rows, cols = self.grid.cells_at(x, y)
        height, width = self.grid.shape
        outside = (rows < 0) | (cols < 0) | (rows >= height) | (cols >= width)
        if outside.any():
            first = int(np.argmax(outside))
            raise RunError(
                f"{self.path}: the patch at x {np.asarray(x)[first]}, y {np.asarray(y)[first]}"
                f" lies outside the heatmap of {height} x {width} cells: another grid's patch?"
            )
        return self.values()[rows, cols]


def create_heatmap(
    path,
    *,
    grid: PatchGrid,
    slide_id: str,
    model: str,
    precision: str | None = None,
    chunk: int = 16,
    ngff: str = "0.5",
    channel: Channel | None = None,
) -> None:
    """Write an empty heatmap (all NaN), with all its levels and metadata; replaces an old one.

    Parameters
    ----------
    path : path-like
        The store's folder. Fill it under a temporary name and rename it when finished.
    grid : PatchGrid
    slide_id, model : str
    precision : str, optional
        What the values are computed in, float32 or bfloat16.
    chunk : int
        Side of a chunk, heatmap px.
    ngff : {"0.5", "0.4"}
    channel : Channel, optional
        How viewers show it; by default as a probability, under the model's name.

    Raises
    ------
    ConfigError
        If `ngff` is neither of the two.
    """
    shapes = _level_shapes(grid.shape)
    own: dict[str, Any] = {
        "schema": SCHEMA,
        "slide_id": slide_id,
        "model": model,
        "precision": precision,
        "grid": grid.to_dict(),
    }
    group = zarr.create_group(
        path,
        overwrite=True,
        zarr_format=zarr_format(ngff),
        attributes={
            **group_attributes(
                ngff,
                grid=grid,
                levels=len(shapes),
                slide_id=slide_id,
                channel=channel or Channel(model),
            ),
            "wsi_pipeline": own,
        },
    )
    for level, shape in enumerate(shapes):
        group.create_array(
            str(level),
            shape=shape,
            chunks=(chunk, chunk),
            dtype=np.float32,
            fill_value=np.nan,
            **array_layout(ngff),
        )


def write_chunk(path, slab: Slab, values: np.ndarray) -> None:
    """Write one chunk of level 0.

    A slab owns its chunk: writers in any number of processes need no lock, and writing a chunk
    again replaces all of it.

    Parameters
    ----------
    path : path-like
    slab : Slab
    values : float array, shape (N,)
        In the order of the slab's cells.

    Raises
    ------
    RunError
        If the store is damaged, or the slab was made for chunks of another size.
    """
    array = _open(path, "r+").levels[0]
    side = array.chunks[0]
    first = side * np.array(slab.chunk)
    cells = np.stack([slab.rows, slab.cols]) - first[:, np.newaxis]
    if cells.min() < 0 or cells.max() >= side:
        raise RunError(
            f"{path}: cells of slab {slab.chunk} lie outside that chunk of {side} x {side} cells"
        )
    block = np.full((side, side), np.nan, np.float32)
    block[tuple(cells)] = values
    rows, cols = np.minimum(side, array.shape - first)  # the last chunks reach over the edge
    array.blocks[slab.chunk] = block[:rows, :cols]


def chunk_file(path, chunk: tuple[int, int], ngff: str) -> Path:
    """The file of a chunk of level 0; Zarr writes none for a chunk that is all NaN."""
    row, col = chunk
    return Path(path) / "0" / (f"{row}/{col}" if ngff == "0.4" else f"c/{row}/{col}")


def finish_heatmap(path) -> None:
    """Fill the pyramid above level 0; doing it again changes nothing.

    A pixel is the mean of the two by two (at odd edges fewer) below it that are not NaN. A band of
    two rows of chunks is in memory at a time, and as much again three times while it is halved:
    some 110 MB for a heatmap 27,000 px wide in chunks of 128 px, however high it is.

    Raises
    ------
    RunError
        If the store is damaged.
    """
    heatmap = _open(path, "r+")
    for level, coarser in enumerate(heatmap.levels[1:]):
        step = coarser.chunks[0]
        for first in range(0, coarser.shape[0], step):
            below = heatmap.values(level, slice(2 * first, 2 * (first + step)))
            coarser[first : first + step] = block_means(below)


def write_heatmap(
    path, values: np.ndarray, *, grid: PatchGrid, slide_id: str, model: str,
    precision: str | None = None, chunk: int, ngff: str, channel: Channel | None = None,
) -> None:  # fmt: skip
    """Write a heatmap that is in memory, whole, with its pyramid; replaces an old one.

    Parameters
    ----------
    path, grid, slide_id, model, precision, chunk, ngff, channel
        As for `create_heatmap`.
    values : float array, shape `grid.shape`
        In any unit; `channel` says which values viewers show if they are no probabilities.

    Raises
    ------
    RunError
        If the values are of another shape.
    ConfigError
        As `create_heatmap`.
    """
    if values.shape != grid.shape:
        raise RunError(f"{path}: values of shape {values.shape} for a grid of {grid.shape}")
    create_heatmap(
        path, grid=grid, slide_id=slide_id, model=model, precision=precision, chunk=chunk,
        ngff=ngff, channel=channel,
    )  # fmt: skip
    _open(path, "r+").levels[0][:] = values
    finish_heatmap(path)


def open_heatmap(path) -> Heatmap:
    """Open a heatmap for reading.

    Raises
    ------
    RunError
        If there is none, it is not of this pipeline or of another schema, or it is damaged.
    """
    return _open(path, "r")


def _array(group: zarr.Group, name: str) -> zarr.Array:
    if not isinstance(array := group[name], zarr.Array):
        raise TypeError(f"{name} is no array")
    return array


def _open(path, mode: Literal["r", "r+"]) -> Heatmap:
    path = Path(path)
    try:
        group = zarr.open_group(path, mode=mode)
        own: Any = group.attrs["wsi_pipeline"]
        if own["schema"] != SCHEMA:
            raise RunError(f"schema {own['schema']}, while this version reads {SCHEMA}")
        grid = PatchGrid.from_dict(own["grid"])
        shapes = _level_shapes(grid.shape)
        levels = tuple(_array(group, str(level)) for level in range(len(shapes)))
        if [level.shape for level in levels] != shapes:
            raise RunError(f"levels {[level.shape for level in levels]} are not {shapes}")
        ngff = "0.5" if group.metadata.zarr_format == 3 else "0.4"
        of = own["slide_id"], own["model"], own.get("precision")
        return Heatmap(path, *of, grid, ngff, levels)
    except (OSError, AttributeError, KeyError, TypeError, ValueError, WsiError) as error:
        raise RunError(
            f"{path}: no heatmap of this pipeline, or a damaged one:"
            f" {type(error).__name__}: {error}"
        ) from error


def _level_shapes(shape: tuple[int, int]) -> list[tuple[int, int]]:
    shapes = [shape]
    while max(shapes[-1]) > COARSEST_PX:
        rows, cols = shapes[-1]
        shapes.append((-(-rows // 2), -(-cols // 2)))
    return shapes
