"""Frames and the conversions between them; nothing else in the package converts.

Three frames, and rasters:

- *level-0 px*: OpenSlide's level-0 frame of the whole slide, (0, 0) at the outer corner of the
  first pixel, so pixel ``i`` covers ``[i, i + 1)``. Annotations, patch indices and detections
  are in it. Scanners that store only part of the frame (MRXS, SCN) give its *bounds*.
- *working px*: the grid's frame. Its origin is the corner of the bounds; one working pixel is
  ``downsample`` level-0 pixels wide.
- *um*: physical distance from the level-0 origin, as OME-Zarr states it. There, and only there,
  coordinates name pixel *centres*: level-0 pixel ``i`` lies at ``i * mpp``.
- *raster px*: of a mask that starts at the level-0 corner, one of its pixels ``downsample``
  level-0 pixels wide.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np

from wsi_pipeline.errors import ConfigError, RunError


@dataclass(frozen=True)
class Bounds:
    """A rectangle in level-0 px: the part of the level-0 frame that was scanned."""

    x: int
    y: int
    width: int
    height: int


def level0_to_um(length_level0, mpp: float):
    """Micrometres of lengths in level-0 px, or of places measured from the level-0 corner."""
    return length_level0 * mpp


def level0_area_to_mm2(area_level0, mpp: float):
    """Square millimetres of areas in square level-0 px."""
    return area_level0 * (mpp / 1000) ** 2


def um_to_level0(length_um, mpp: float):
    """Level-0 px of lengths in micrometres: the inverse of `level0_to_um`."""
    return length_um / mpp


def pixel_centres(pixels, downsample: float) -> np.ndarray:
    """Level-0 px of the centres of a raster's pixels, which starts at the level-0 corner.

    Parameters
    ----------
    pixels : array_like of int
        Columns, or rows.
    downsample : float
        Level-0 px per pixel.
    """
    return (np.asarray(pixels) + 0.5) * downsample


def raster_places(places_level0, downsample: float) -> np.ndarray:
    """Places in a raster that starts at the level-0 corner; the whole part is the pixel.

    Parameters
    ----------
    places_level0 : array_like
        Level-0 px.
    downsample : float
        Level-0 px per pixel.
    """
    return np.asarray(places_level0) / downsample


def raster_to_level0(places_px, downsample: float):
    """Level-0 px of places in a raster that starts at the level-0 corner: the inverse."""
    return places_px * downsample


def raster_size(size_level0: tuple[float, float], downsample: float) -> tuple[int, int]:
    """Width and height of the raster that covers a slide, its last pixels cut by the slide's edge.

    Parameters
    ----------
    size_level0 : (float, float)
        Width and height, level-0 px.
    downsample : float
        Level-0 px per pixel.
    """
    width, height = (int(np.ceil(round(side / downsample, 6))) for side in size_level0)
    return width, height


def level0_box(
    x: float, y: float, width_px: int, height_px: int, downsample: float
) -> tuple[float, float, float, float]:
    """Level-0 px under a rectangle read at a working resolution: ``x0, y0, x1, y1``, not rounded.

    Parameters
    ----------
    x, y : float
        Upper left corner, level-0 px.
    width_px, height_px : int
        Working px.
    downsample : float
        Level-0 px per working px.
    """
    return x, y, x + width_px * downsample, y + height_px * downsample


@dataclass(frozen=True)
class PatchGrid:
    """Patches at regular steps whose inner squares cover the slide's bounds.

    The inner square of cell ``(row, col)`` has its upper left corner at working px
    ``(col * stride_px, row * stride_px)``; the patch is centred on it and so starts
    ``margin_px`` before it. Patches of the first and last rows and columns therefore reach
    over the edge of the slide, where reading gives background. With ``stride_px == inner_px``
    the inner squares tile the bounds without gap or overlap.

    Parameters
    ----------
    bounds : Bounds
        The tiled area, level-0 px.
    mpp : float
        Micrometres per level-0 px.
    downsample : float
        Level-0 px per working px.
    patch_px, stride_px, inner_px : int
        Side of the patch, step between patches, side of the inner square; working px.

    Raises
    ------
    ConfigError
        If a size is not positive, the inner square does not fit into the patch, or it cannot
        be centred on whole pixels (``patch_px - inner_px`` odd).
    """

    bounds: Bounds
    mpp: float
    downsample: float
    patch_px: int = 512
    stride_px: int = 256
    inner_px: int = 256

    def __post_init__(self):
        for name in ("mpp", "downsample", "patch_px", "stride_px", "inner_px"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be positive")
        if self.inner_px > self.patch_px or (self.patch_px - self.inner_px) % 2:
            raise ConfigError(
                f"inner_px is {self.inner_px} and patch_px {self.patch_px}: the inner square must"
                " fit into the patch and be centred on whole pixels (an even difference)"
            )

    @classmethod
    def of_pixels(
        cls, x: int, y: int, width_px: int, height_px: int, mpp: float, downsample: float
    ) -> "PatchGrid":
        """The grid whose cells are the pixels of a rectangle read at the working resolution.

        Its bounds are the smallest whole number of level-0 px with as many cells.

        Parameters
        ----------
        x, y : int
            Upper left corner, level-0 px.
        width_px, height_px : int
            Working px.
        mpp : float
            Micrometres per level-0 px.
        downsample : float
            Level-0 px per working px.
        """
        width, height = (int((side_px - 1) * downsample) + 1 for side_px in (width_px, height_px))
        return cls(Bounds(x, y, width, height), mpp, downsample, 1, 1, 1)

    @property
    def working_mpp(self) -> float:
        """Micrometres per working px."""
        return self.mpp * self.downsample

    def level0_length(self, length_px: float) -> float:
        """Level-0 px of a length in working px; not rounded."""
        return length_px * self.downsample

    def working_length(self, length_level0: float) -> float:
        """Working px of a length in level-0 px; not rounded."""
        return length_level0 / self.downsample

    def level0_points(self, points_px) -> np.ndarray:
        """Level-0 px of points in the working frame.

        Parameters
        ----------
        points_px : array_like, shape (..., 2)
            x, y in working px from the corner of the bounds.

        Returns
        -------
        float64 array, shape (..., 2)
            Not rounded, unlike `patch_origins`.
        """
        return np.array([self.bounds.x, self.bounds.y]) + np.asarray(points_px) * self.downsample

    @property
    def margin_px(self) -> int:
        """Working px between the patch's edge and its inner square."""
        return (self.patch_px - self.inner_px) // 2

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the grid."""
        return (
            self._cells(self.bounds.height / self.downsample),
            self._cells(self.bounds.width / self.downsample),
        )

    def check_shape(self, values) -> None:
        """Raise RunError if values are not one for each cell: an array of another shape."""
        if np.shape(values) != self.shape:
            raise RunError(f"the heatmap has the shape {np.shape(values)}, its grid {self.shape}")

    def _cells(self, extent_px: float) -> int:
        extent_px = np.ceil(round(extent_px, 6))
        return int(max(1, np.ceil((extent_px - self.inner_px) / self.stride_px) + 1))

    def patch_origins(self, rows, cols) -> tuple[np.ndarray, np.ndarray]:
        """Upper left corners of the patches, rounded to whole level-0 px.

        Parameters
        ----------
        rows, cols : array_like of int, shape (N,)

        Returns
        -------
        x, y : int32 arrays, shape (N,)
            May be negative, or end beyond the slide: the patch then reaches over its edge.
        """
        x = self.bounds.x + (np.asarray(cols) * self.stride_px - self.margin_px) * self.downsample
        y = self.bounds.y + (np.asarray(rows) * self.stride_px - self.margin_px) * self.downsample
        return np.round(x).astype(np.int32), np.round(y).astype(np.int32)

    def cells_at(self, x, y) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the patches whose upper left corners are given: the inverse.

        Parameters
        ----------
        x, y : array_like of int, shape (N,)
            Level-0 px, as `patch_origins` gives them.

        Returns
        -------
        rows, cols : int64 arrays, shape (N,)
        """
        cols = (np.asarray(x) - self.bounds.x) / self.downsample + self.margin_px
        rows = (np.asarray(y) - self.bounds.y) / self.downsample + self.margin_px
        return (
            np.round(rows / self.stride_px).astype(np.int64),
            np.round(cols / self.stride_px).astype(np.int64),
        )

    def inner_boxes(self, rows, cols) -> np.ndarray:
        """Inner squares as boxes in level-0 px.

        Returns
        -------
        float64 array, shape (N, 4)
            ``x0, y0, x1, y1``, exact (not rounded).
        """
        x = self.bounds.x + np.asarray(cols) * self.stride_px * self.downsample
        y = self.bounds.y + np.asarray(rows) * self.stride_px * self.downsample
        side = self.inner_px * self.downsample
        return np.stack([x, y, x + side, y + side], axis=-1).astype(np.float64)

    def centre_pixels(self, rows, cols) -> tuple[np.ndarray, np.ndarray]:
        """Level-0 pixels at the centres of the inner squares.

        A centre on the border of two pixels is in the second. Of an inner square that reaches so
        far over the edge that its centre is off the slide, it is the nearest pixel of the bounds.

        Parameters
        ----------
        rows, cols : array_like of int, shape (N,)

        Returns
        -------
        x, y : int64 arrays, shape (N,)
        """
        boxes = self.inner_boxes(rows, cols)
        x, y = np.floor((boxes[..., :2] + boxes[..., 2:]).T / 2).astype(np.int64)
        return (
            np.minimum(x, self.bounds.x + self.bounds.width - 1),
            np.minimum(y, self.bounds.y + self.bounds.height - 1),
        )

    def finer(self, patch_px: int, stride_px: int) -> "PatchGrid":
        """Patches of another side at another step over the same area.

        The inner square is one stride wide, one working px more where it could not be centred
        otherwise, and never wider than the patch.

        Parameters
        ----------
        patch_px, stride_px : int
            Working px of this grid.

        Raises
        ------
        ConfigError
            If one of them is not positive.
        """
        inner_px = min(stride_px, patch_px)
        inner_px += (patch_px - inner_px) % 2
        return replace(self, patch_px=patch_px, stride_px=stride_px, inner_px=inner_px)

    def cells_centred_in(self, other: "PatchGrid", rows, cols) -> np.ndarray:
        """Cells of this grid whose patches have their centres in inner squares of another.

        A centre on the border of two squares is in the later one.

        Parameters
        ----------
        other : PatchGrid
            Of the same bounds and downsample.
        rows, cols : array_like of int, shape (N,)
            Its cells.

        Returns
        -------
        int64 array, shape (N, 4)
            ``first row, end row, first column, end column`` (ends excluded) of each square's cells;
            the end is the first where there is none.

        Raises
        ------
        ConfigError
            If the grids are not of the same area and resolution.
        """
        if (other.bounds, other.downsample) != (self.bounds, self.downsample):
            raise ConfigError(
                f"grids of {self.bounds} at downsample {self.downsample} and of {other.bounds} at"
                f" {other.downsample}: they must be of the same area and resolution"
            )
        starts = np.stack([rows, rows, cols, cols], axis=-1).astype(np.int64) * other.stride_px
        starts[:, 1::2] += other.inner_px
        # The first cell k with k * stride + inner / 2 >= start, in whole numbers.
        found = -((self.inner_px - 2 * starts) // (2 * self.stride_px))
        n_rows, n_cols = self.shape
        return np.clip(found, 0, [n_rows, n_rows, n_cols, n_cols])

    def cells_over(self, box: Bounds) -> tuple[slice, slice]:
        """Rows and columns of the heatmap pixels that meet a box, level-0 px.

        A heatmap pixel is the square of one stride around its patch's centre.
        """
        margin_px = (self.inner_px - self.stride_px) / 2
        spans = (
            (box.y - self.bounds.y, box.height, self.shape[0]),
            (box.x - self.bounds.x, box.width, self.shape[1]),
        )
        step = self.stride_px * self.downsample
        found = []
        for start, length, count in spans:
            first = (start - margin_px * self.downsample) / step
            ends = np.floor(first), np.ceil(first + length / step)
            found.append(slice(*(int(np.clip(end, 0, count)) for end in ends)))
        return found[0], found[1]

    def heatmap_box(
        self, first_cell: tuple[int, int], shape: tuple[int, int]
    ) -> tuple[float, float, float, float]:
        """Where a block of heatmap pixels lies, level-0 px: see `cells_over` for a pixel's square.

        Parameters
        ----------
        first_cell, shape : (int, int)
            Row and column of the first heatmap pixel; rows and columns of the block.

        Returns
        -------
        x0, y0, x1, y1 : float
            Not rounded.
        """
        (row, col), (rows, cols) = first_cell, shape
        step = self.stride_px * self.downsample
        margin = (self.inner_px - self.stride_px) / 2 * self.downsample
        x, y = self.bounds.x + margin + col * step, self.bounds.y + margin + row * step
        return x, y, x + cols * step, y + rows * step

    def heatmap_points(self, points) -> np.ndarray:
        """Level-0 px of points in the heatmap, whose pixel (row, col) covers col to col + 1 in x.

        Parameters
        ----------
        points : array_like, shape (..., 2)
            x, y in heatmap px from the corner of its first pixel.

        Returns
        -------
        float64 array, shape (..., 2)
            Not rounded: see `heatmap_box`.
        """
        corner = np.array(self.heatmap_box((0, 0), (0, 0))[:2])
        return corner + np.asarray(points) * (self.stride_px * self.downsample)

    def heatmap_places(self, points_level0) -> np.ndarray:
        """Heatmap px of points in level-0 px; the whole part is the pixel: the inverse.

        Parameters
        ----------
        points_level0 : array_like, shape (..., 2)
            x, y.

        Returns
        -------
        float64 array, shape (..., 2)
            Beyond the heatmap's first or last pixel where a point is off it.
        """
        corner = np.array(self.heatmap_box((0, 0), (0, 0))[:2])
        return (np.asarray(points_level0) - corner) / (self.stride_px * self.downsample)

    def points_in_bounds(self, points_level0) -> np.ndarray:
        """Points counted from the corner of the scanned bounds, as QuPath counts them.

        Parameters
        ----------
        points_level0 : array_like, shape (..., 2)
            x, y in level-0 px.

        Returns
        -------
        float64 array, shape (..., 2)
            Level-0 px from the corner of the bounds; not rounded.
        """
        return np.asarray(points_level0, np.float64) - (self.bounds.x, self.bounds.y)

    def pixel_spacing_um(self, reduction: int = 1) -> float:
        """Micrometres between neighbouring heatmap pixels, `reduction` cells to a pixel."""
        return reduction * self.stride_px * self.downsample * self.mpp

    def first_pixel_um(self, reduction: int = 1) -> tuple[float, float]:
        """Centre of the heatmap's first pixel: its OME-Zarr translation.

        A heatmap pixel stands for ``reduction`` x ``reduction`` cells; its centre is the mean of
        their patches' centres.

        Returns
        -------
        x, y : float
            Micrometres, pixel-centre convention (level-0 pixel 0 lies at 0).
        """
        centre = (self.inner_px / 2 + (reduction - 1) * self.stride_px / 2) * self.downsample
        return (
            (self.bounds.x + centre - 0.5) * self.mpp,
            (self.bounds.y + centre - 0.5) * self.mpp,
        )

    def to_dict(self) -> dict:
        """Plain numbers, for a file's metadata."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "PatchGrid":
        """The inverse of `to_dict`."""
        return cls(**{**values, "bounds": Bounds(**values["bounds"])})
