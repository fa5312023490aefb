"""Shapes of annotation files: rings with a class, nothing decided yet."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from wsi_pipeline.errors import AnnotationError

MAX_COORDINATE = 2**31  # the patch index holds level-0 px as int32

Role = Literal["tumour", "exclusion"]


@dataclass(frozen=True)
class Shape:
    """One shape of a file.

    Attributes
    ----------
    name : str
        For messages.
    classes : tuple of str
        Its class, then what that is a part of (ASAP's parents of groups) or derived from
        (QuPath's "Tumor: Necrosis" of "Tumor"), the nearest first; empty for a shape without one.
    rings : tuple of float64 arrays, shape (n, 2)
        Outer ring and holes; empty where its kind has no area or is nothing that a person drew.
    kind : str
        "area", or what else it is: "point", "line", "cell" ...
    role : "tumour", "exclusion" or None
        Set where the format itself says.
    layer : str or None
        An exclusion cuts the shapes of its own layer; without one, all of the file.
    label : str
        What the shape is called, where its format has names beside classes.
    """

    name: str
    classes: tuple[str, ...]
    rings: tuple[np.ndarray, ...] = ()
    kind: str = "area"
    role: Role | None = None
    layer: str | None = None
    label: str = ""

    @property
    def group(self) -> str:
        """Its own class; '' is none."""
        return self.classes[0] if self.classes else ""


def ring_of(points, name: str) -> np.ndarray:
    """A shape's vertices as a float64 array of shape (n, 2), n >= 3, without the closing point."""
    try:
        ring = np.asarray(points)
    except ValueError:  # ragged
        ring = np.empty(0, dtype=object)
    if ring.dtype.kind not in "iuf" or ring.ndim != 2 or ring.shape[1] not in (2, 3):
        raise AnnotationError(
            f"{name}: its vertices are {short(points)}, not a list of numeric points [x, y]"
            + (": nested one level too shallow" if ring.ndim == 1 and ring.dtype != object else "")
        )
    ring = ring[:, :2].astype(np.float64)
    bad = ~(np.abs(ring) < MAX_COORDINATE).all(axis=1)
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise AnnotationError(
            f"{name}: vertex {i + 1} is {ring[i].tolist()}, not finite or 2^31 px and more"
        )
    if len(ring) > 1 and (ring[0] == ring[-1]).all():
        ring = ring[:-1]
    if len(ring) < 3:
        raise AnnotationError(f"{name}: has {len(ring)} vertices, an area needs 3")
    return ring


def named(number: int, name) -> str:
    """What messages call a shape."""
    return f"shape {number}" + (f" ({name})" if name else "")


def short(value) -> str:
    """A value as text, cut."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(node, key: str, name: str) -> list:
    """A list under a key; AnnotationError names another value."""
    value = node.get(key) if isinstance(node, dict) else None
    if not isinstance(value, list):
        raise AnnotationError(f"{name}: {key!r} is {short(value)}, not a list")
    return value


def mapping(node: dict, key: str, name: str) -> dict:
    """An object under a key, {} for none; AnnotationError names another value."""
    value = node.get(key)
    if value is not None and not isinstance(value, dict):
        raise AnnotationError(f"{name}: {key!r} is {short(value)}, not an object")
    return value or {}
