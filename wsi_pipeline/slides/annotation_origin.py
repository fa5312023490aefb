"""What the coordinates of an annotation file count from."""

from pathlib import Path
from typing import Literal

from wsi_pipeline.errors import AnnotationError
from wsi_pipeline.geometry import Bounds
from wsi_pipeline.slides.annotation_files import recognise
from wsi_pipeline.slides.annotation_geojson import drawn_in_qupath, geojson_shapes

FrameOrigin = Literal["slide", "bounds", "lower left"]
Matrix = tuple[float, float, float, float, float, float]


def file_to_level0(
    origin: FrameOrigin, scale: float, *, bounds: Bounds, size: tuple[int, int]
) -> Matrix:
    """From a file's coordinates to level-0 px.

    Parameters
    ----------
    origin : "slide", "bounds" or "lower left"
        What the file counts from: the level-0 frame, the corner of the scanned bounds, or the
        frame's lower left corner, with y upwards.
    scale : float
        Level-0 px of a unit of the file.
    bounds : Bounds
    size : (int, int)
        Width and height of the frame, level-0 px.

    Returns
    -------
    tuple of 6 floats
        ``a, b, d, e, x, y``: level-0 px are (a x + b y + x, d x + e y + y), see
        `shapely.affinity.affine_transform`.
    """
    if origin == "lower left":
        return scale, 0, 0, -scale, 0, size[1]
    corner = (bounds.x, bounds.y) if origin == "bounds" else (0, 0)
    return scale, 0, 0, scale, *corner


def stated_origin(path: str | Path, origin: FrameOrigin | Literal["auto"]) -> FrameOrigin:
    """What a file counts from; "auto" is told from its form, see `uses_bounds_origin`."""
    if origin != "auto":
        return origin
    return "bounds" if uses_bounds_origin(path) else "slide"


def uses_bounds_origin(path: str | Path) -> bool:
    """Whether the file counts from the scanned bounds, not from the level-0 frame.

    QuPath crops a slide to its bounds before anything is drawn, so its GeoJSON counts from there.
    That of other programs, known by where they put the class, counts from the frame.

    Raises
    ------
    AnnotationError
        If the file is in none of the five formats.
    """
    path = Path(path)
    try:
        parse, document = recognise(path)
        return parse is geojson_shapes and drawn_in_qupath(document)
    except AnnotationError as error:
        raise AnnotationError(f"{path}: {error}") from error
