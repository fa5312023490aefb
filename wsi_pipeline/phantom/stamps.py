"""Small pictures of nuclei and glands: hematoxylin and eosin, to be pressed onto a canvas.

A canvas and a stamp hold concentrations, (hematoxylin, eosin), in the last axis.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

SOFT_EDGE_UM = 0.5


@dataclass(frozen=True)
class Stamp:
    """What is left of the canvas, and what is laid over it.

    Parameters
    ----------
    keep : float32 array, shape (S, S, 1)
        1 - opacity.
    add : float32 array, shape (S, S, 2)
        Concentrations times opacity.
    """

    keep: np.ndarray
    add: np.ndarray

    @classmethod
    def of(cls, opacity: np.ndarray, concentration: np.ndarray) -> "Stamp":
        """From opacity, shape (S, S), and concentrations, shape (S, S, 2)."""
        opacity = opacity.astype(np.float32)[..., None]
        return cls(1 - opacity, (concentration * opacity).astype(np.float32))

    def turned(self, turn: int) -> "Stamp":
        """One of the eight turns and mirrorings of the square; a view."""
        return Stamp(turned(self.keep, turn), turned(self.add, turn))

    def press(self, canvas: np.ndarray, x: int, y: int) -> None:
        """Lay it with its centre at pixel (x, y) of the canvas; what reaches over is cut off."""
        size = len(self.keep)
        left, top = x - size // 2, y - size // 2
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + size, canvas.shape[1]), min(top + size, canvas.shape[0])
        if x0 >= x1 or y0 >= y1:
            return
        part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        canvas[y0:y1, x0:x1] *= self.keep[part]
        canvas[y0:y1, x0:x1] += self.add[part]


def turned(picture: np.ndarray, turn: int) -> np.ndarray:
    """One of the eight turns and mirrorings of a square picture, `turn` 0 to 7; a view."""
    picture = picture[:: -1 if turn & 1 else 1, :: -1 if turn & 2 else 1]
    return picture.swapaxes(0, 1) if turn & 4 else picture


def nucleus(
    rng: np.random.Generator,
    mpp: float,
    *,
    length_um: float,
    width_um: float,
    hematoxylin: float,
    vesicular: float = 0.0,
    nucleoli: int = 0,
    angle: float | None = None,
) -> Stamp:
    """An ellipse with granular chromatin.

    Parameters
    ----------
    rng : numpy.random.Generator
    mpp : float
    length_um, width_um : float
        Axes.
    hematoxylin : float
        Mean concentration of the chromatin.
    vesicular : float, 0 to 1
        How far the inside is cleared, leaving a rim: open chromatin.
    nucleoli : int
        Dark spots of 1 to 2 um.
    angle : float, optional
        Of the long axis, radians; random when not given.
    """
    angle = rng.uniform(0, np.pi) if angle is None else angle
    x, y = _grid_um(length_um / 2 + 1, mpp)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    theta = np.arctan2(v, u)
    wobble = (
        1
        + 0.07 * np.cos(2 * theta + rng.uniform(0, 6.3))
        + 0.04 * np.cos(3 * theta + rng.uniform(0, 6.3))
    )
    radius = np.hypot(u / length_um, v / width_um) * 2 / wobble
    depth_um = (1 - radius) * width_um / 2
    soft = max(SOFT_EDGE_UM, mpp)
    chromatin = _noise(rng, x.shape, 0.6 / mpp)
    density = hematoxylin * np.clip(1 + 0.3 * chromatin, 0.3, 2)
    rim = np.clip(1 - (depth_um - 0.4) / 1.2, 0, 1)
    density *= 1 - vesicular * (1 - rim)
    eosin = np.full_like(density, 0.15)
    for _ in range(nucleoli):
        at, spot_um = rng.normal(0, 0.14, 2) * (length_um, width_um), rng.uniform(0.7, 1.2)
        spot = np.clip((spot_um - np.hypot(u - at[0], v - at[1])) / soft + 0.5, 0, 1)
        density = np.maximum(density, 1.3 * hematoxylin * spot)
        eosin = np.maximum(eosin, 0.5 * spot)
    return Stamp.of(np.clip(depth_um / soft + 0.5, 0, 1), np.stack([density, eosin], axis=-1))


def gland(rng: np.random.Generator, mpp: float, radius_um: float) -> Stamp:
    """A gland cut across: a ring of nuclei at the base, paler cytoplasm, a lumen."""
    x, y = _grid_um(radius_um * 1.3, mpp)
    outline = _wavy_circle(rng, 0.08)
    angle = np.arctan2(y, x)
    radius = np.hypot(x, y) / (radius_um * outline(angle))
    depth_um = (1 - radius) * radius_um
    lumen = _smooth_step(rng.uniform(0.15, 0.4) * _wavy_circle(rng, 0.12)(angle) - radius, 0.06)
    grain = _noise(rng, x.shape, 0.8 / mpp)
    clouds = _noise(rng, x.shape, 3 / mpp)
    mucin = _smooth_step(0.75 - radius, 0.2) * rng.uniform(0.1, 0.5)
    hematoxylin = 0.16 + 0.02 * grain + 0.03 * clouds
    eosin = (0.5 + 0.06 * grain + 0.08 * clouds) * (1 - mucin)
    content = np.stack([hematoxylin, eosin], axis=-1) * (1 - 0.92 * lumen[..., None])
    for theta in _steps_around(rng, 2 * np.pi * radius_um * 0.82, step_um=6.6):
        distance_um = radius_um * outline(theta) * rng.normal(0.82, 0.035)
        cell = nucleus(
            rng,
            mpp,
            length_um=rng.uniform(6, 8),
            width_um=rng.uniform(4, 5),
            hematoxylin=rng.uniform(0.85, 1.2),
            vesicular=0.25,
            angle=theta + rng.normal(0, 0.2),
        )
        centre = np.array([np.cos(theta), np.sin(theta)]) * distance_um / mpp + len(x) // 2
        cell.press(content, *np.round(centre).astype(int))
    return Stamp.of(np.clip(depth_um / 1.0 + 0.5, 0, 1), content)


def cleft(rng: np.random.Generator, mpp: float, radius_um: float) -> Stamp:
    """An irregular empty space: a lumen of disordered glands, or a retraction."""
    x, y = _grid_um(radius_um * 1.8, mpp)
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.8)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    radius = np.hypot(u / stretch, v) / _wavy_circle(rng, 0.2)(np.arctan2(v, u))
    debris = np.clip(0.05 + 0.05 * _noise(rng, x.shape, 1.5 / mpp), 0, 1)
    opacity = _smooth_step((radius_um * 0.8 - radius) / radius_um, 0.08)
    return Stamp.of(opacity, np.stack([0.3 * debris, debris], axis=-1))


def _grid_um(reach_um: float, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    half = int(np.ceil(reach_um / mpp))
    y, x = np.mgrid[-half : half + 1, -half : half + 1] * mpp
    return x, y


def _noise(rng: np.random.Generator, shape, sigma_px: float) -> np.ndarray:
    smooth = gaussian_filter(rng.standard_normal(shape), sigma_px, mode="wrap")
    return smooth / smooth.std()


def _smooth_step(value: np.ndarray, width: float) -> np.ndarray:
    return np.clip(value / width + 0.5, 0, 1)


def _wavy_circle(rng: np.random.Generator, depth: float):
    """A function of the angle, about 1, of the third to the fifth harmonic."""
    order = np.arange(2, 6)
    phase, size = rng.uniform(0, 2 * np.pi, order.size), depth * rng.uniform(0.3, 1, order.size)
    return lambda angle: 1 + np.cos(np.multiply.outer(angle, order) + phase) @ (size / order * 2)


def _steps_around(rng: np.random.Generator, length_um: float, step_um: float) -> np.ndarray:
    count = max(6, round(length_um / step_um))
    return 2 * np.pi * (np.arange(count) + rng.random() + rng.normal(0, 0.12, count)) / count
