"""Heatmaps as OME-TIFF: a pyramid of float32 images with their place on the slide."""

import hashlib
from collections.abc import Sequence
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import numpy as np
import tifffile

from wsi_pipeline.files import replace_atomically
from wsi_pipeline.geometry import PatchGrid

TILE_PX = 256
CLASSIC_BYTES = 2**32 - 2**25
"""Of pixels: heatmaps of more are written as BigTIFF."""
RED = int.from_bytes(bytes.fromhex("FF0000FF"), signed=True)
"""As OME-XML states a colour: the OME-Zarr's, opaque."""


def write_ome_tiff(
    path, levels: Sequence[np.ndarray], *, grid: PatchGrid, slide_id: str, model: str
) -> None:
    """Write a heatmap as OME-TIFF, whole or not at all.

    Positions are in micrometres of the slide's level-0 frame, as OME-Zarr states them: level-0
    pixel 0 has its centre at 0.

    Parameters
    ----------
    path : path-like
        Usually ``SLIDE.ome.tif``.
    levels : sequence of float32 array, shape (rows, cols)
        The heatmap's pyramid, each level half the size of the one before (rounded up); NaN where
        nothing was predicted. The coarser levels are the first image's SubIFDs.
    grid : PatchGrid
    slide_id, model : str
        Names of the image and of its channel.

    Raises
    ------
    RunError
        If the first level is not of the grid's shape.
    """
    first, *coarser = (np.asarray(level, np.float32) for level in levels)
    grid.check_shape(first)
    x_um, y_um = grid.first_pixel_um()
    spacing_um = grid.pixel_spacing_um()
    metadata: dict[str, Any] = {
        "axes": "YX",
        "UUID": str(uuid5(NAMESPACE_OID, f"{model}/{slide_id}/{_hash(first)}")),
        "Name": slide_id,
        "Description": f"Probability of tumour by the model {model}. NaN: not predicted",
        "PhysicalSizeX": spacing_um, "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": spacing_um, "PhysicalSizeYUnit": "µm",
        "Channel": {"Name": [model], "Color": [RED]},
        "Plane": {
            "PositionX": [x_um], "PositionXUnit": ["µm"],
            "PositionY": [y_um], "PositionYUnit": ["µm"],
        },
    }  # fmt: skip
    stored: dict[str, Any] = {
        "tile": (TILE_PX, TILE_PX), "compression": "zlib", "photometric": "minisblack",
    }  # fmt: skip
    bigtiff = first.nbytes + sum(level.nbytes for level in coarser) > CLASSIC_BYTES
    with (
        replace_atomically(path) as part,
        tifffile.TiffWriter(part, ome=True, bigtiff=bigtiff) as tiff,
    ):
        tiff.write(first, subifds=len(coarser), metadata=metadata, **stored)
        for level in coarser:
            tiff.write(level, subfiletype=1, **stored)


def _hash(values: np.ndarray) -> str:
    """Of the content: the same heatmap gives the same file."""
    return hashlib.sha256(values.tobytes()).hexdigest()
