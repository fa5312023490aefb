"""NGFF 0.5 and 0.4: what a heatmap's store tells viewers, and how each version keeps arrays."""

from dataclasses import dataclass
from typing import Any, Literal

from numcodecs import Blosc
from zarr.codecs import ZstdCodec

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.geometry import PatchGrid

COLOR = "FF0000"
"""Red, as the highest values are in the report."""

_ZARR_FORMAT: dict[str, Literal[2, 3]] = {"0.4": 2, "0.5": 3}


@dataclass(frozen=True)
class Channel:
    """How viewers show a heatmap at first: black at `low`, red at `high`.

    Parameters
    ----------
    label : str
        The layer's name: the model's, or what else the values are of.
    low, high : float
        In the unit of the values; by default those of a probability.
    """

    label: str
    low: float = 0.0
    high: float = 1.0


def zarr_format(ngff: str) -> Literal[2, 3]:
    """The Zarr format that a version of NGFF is kept in.

    Raises
    ------
    ConfigError
        If `ngff` is neither "0.5" nor "0.4".
    """
    if ngff not in _ZARR_FORMAT:
        raise ConfigError(f"ngff is {ngff!r}: it must be one of {', '.join(_ZARR_FORMAT)}")
    return _ZARR_FORMAT[ngff]


def group_attributes(
    ngff: str, *, grid: PatchGrid, levels: int, slide_id: str, channel: Channel
) -> dict[str, Any]:
    """Attributes of the group: the pyramid in micrometres, and its only channel."""
    multiscales = _multiscales(slide_id, grid, levels)
    omero = _omero(slide_id, channel)
    if ngff == "0.5":
        return {"ome": {"version": ngff, "multiscales": [multiscales], "omero": omero}}
    return {"multiscales": [{"version": ngff, **multiscales}], "omero": {"version": ngff, **omero}}


def array_layout(ngff: str) -> dict[str, Any]:
    """Keywords of `zarr.Group.create_array`: compression, names of files and dimensions.

    Java readers of 0.4 (QuPath's) know Blosc but not Zstandard by itself. Within Blosc, zlib: it is
    part of every build of Blosc and notices damage. LZ4 shrinks few probabilities; Blosc keeps
    those that it does not shrink as they are, and a file cut short is then read without an error.
    """
    if ngff == "0.5":
        return {"compressors": ZstdCodec(), "dimension_names": ("y", "x")}
    return {
        "compressors": Blosc(cname="zlib", clevel=5, shuffle=Blosc.SHUFFLE),
        "chunk_key_encoding": {"name": "v2", "separator": "/"},
    }


def _multiscales(name: str, grid: PatchGrid, levels: int) -> dict[str, Any]:
    """The pyramid; the same in 0.4 and 0.5."""
    return {
        "name": name,
        "axes": [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"],
        "datasets": [
            {
                "path": str(level),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [grid.pixel_spacing_um(2**level)] * 2},
                    {"type": "translation", "translation": [*grid.first_pixel_um(2**level)[::-1]]},
                ],
            }
            for level in range(levels)
        ],
        "type": "mean",
    }


def _omero(name: str, channel: Channel) -> dict[str, Any]:
    """How to show it; without this block viewers show black or grey."""
    low, high = float(channel.low), float(channel.high)
    return {
        "name": name,
        "channels": [
            {
                "label": channel.label,
                "color": COLOR,
                "window": {"min": low, "max": high, "start": low, "end": high},
                "active": True,
                "inverted": False,
                "coefficient": 1,
                "family": "linear",
            }
        ],
        "rdefs": {"model": "color", "defaultT": 0, "defaultZ": 0},
    }
