"""Slides painted to fail: H&E, lung, fat and IHC on glass with what scanners and labs add to it.

Painted at the resolution of the tissue mask. Light passes dyes by Beer and Lambert's law: the glass
times ten to the power of minus the optical density.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

MPP = 8.0
SHAPE = (300, 400)
# Optical density of a unit of each dye in red, green and blue: Ruifrok and Johnston, Quantification
# of histochemical staining by color deconvolution, Anal Quant Cytol Histol 23 (2001).
HAEMATOXYLIN, EOSIN, DAB = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
INKS = {
    "blue": (0.75, 0.45, 0.15), "green": (0.80, 0.25, 0.50), "black": (1.0, 1.0, 1.0),
    "red": (0.08, 0.75, 0.65),
}  # fmt: skip
GLASS = (243, 242, 243)
WARM, COOL, GREY = (242, 236, 226), (222, 229, 243), (200, 200, 201)


@dataclass(frozen=True, eq=False)
class Case:
    """A slide and what is tissue in it.

    Parameters
    ----------
    pixels : uint8 array, shape (h, w, 3)
    tissue : bool array, shape (h, w)
    counts : bool array, shape (h, w), optional
        Where the answer counts; everywhere by default.
    mpp : float
    """

    pixels: np.ndarray
    tissue: np.ndarray
    counts: np.ndarray | None = None
    mpp: float = MPP


def painted_cases() -> dict[str, Case]:
    """Every painted slide by its name."""
    return {name: make() for name, make in _CASES.items()}


def he_density(where: np.ndarray, strength: float = 1.0, seed: int = 0) -> np.ndarray:
    """Optical density of H&E tissue in a mask, float64 array (h, w, 3)."""
    haematoxylin = (
        0.25 + 0.16 * _noise(where.shape, 6, seed) + 0.08 * _noise(where.shape, 1, seed + 1)
    )
    eosin = 0.28 + 0.08 * _noise(where.shape, 9, seed + 2) + 0.05 * _noise(where.shape, 1, seed + 3)
    dyes = np.stack([haematoxylin, eosin], -1).clip(0.05, None) * strength
    return where[..., None] * (dyes @ np.stack([HAEMATOXYLIN, EOSIN]))


def shone_through(density: np.ndarray, glass=GLASS, noise: float = 1.5) -> np.ndarray:
    """Pixels of an optical density over glass, uint8."""
    light = np.asarray(glass, float) * 10.0 ** -ndimage.gaussian_filter(density, (0.7, 0.7, 0))
    light = light + np.random.default_rng(7).normal(0, noise, density.shape)
    return light.round().clip(0, 255).astype(np.uint8)


def blob(row: float, col: float, rows: float, cols: float, seed: int = 0) -> np.ndarray:
    """An irregular ellipse: bool array of `SHAPE`; centre and radii, px."""
    y, x = np.indices(SHAPE)
    distance = np.hypot((y - row) / rows, (x - col) / cols)
    return distance + 0.12 * _noise(SHAPE, 14, seed) < 1


def stroke(start, end, width_px: float) -> np.ndarray:
    """A straight line from (row, col) to (row, col): bool array of `SHAPE`."""
    y, x = np.indices(SHAPE)
    along = np.subtract(end, start)
    length = np.hypot(*along)
    t = ((y - start[0]) * along[0] + (x - start[1]) * along[1]) / length**2
    t = t.clip(0, 1)
    off = np.hypot(y - start[0] - t * along[0], x - start[1] - t * along[1])
    return off < width_px / 2


def _noise(shape, scale_px: float, seed: int) -> np.ndarray:
    """Smooth noise of mean 0 and variance 1."""
    rough = np.random.default_rng(seed).normal(size=shape)
    smooth = ndimage.gaussian_filter(rough, scale_px, mode="wrap")
    return smooth / smooth.std()


def _two_pieces() -> np.ndarray:
    return blob(110, 110, 70, 75, 1) | blob(200, 290, 62, 60, 2)


def _on_glass(glass, **options) -> Case:
    tissue = _two_pieces()
    return Case(shone_through(he_density(tissue), glass, **options), tissue)


def _vignette() -> Case:
    tissue = _two_pieces()
    y, x = np.indices(SHAPE)
    light = 1 - 0.15 * ((y / SHAPE[0] - 0.5) ** 2 + (x / SHAPE[1] - 0.5) ** 2) / 0.5
    return Case(shone_through(he_density(tissue), light[..., None] * np.array(GREY)), tissue)


def _drift() -> Case:
    """Glass that is a little warmer on the right than on the left."""
    tissue = _two_pieces()
    right = np.linspace(0, 1, SHAPE[1]) * np.ones(SHAPE)
    glass = 240 - right[..., None] * (0, 10, 12)
    return Case(shone_through(he_density(tissue), glass), tissue)


def _two_glasses(brighter, glass) -> Case:
    """A third of the slide has another glass, or a filling that is not quite white."""
    tissue = _two_pieces()
    glasses = np.where((np.indices(SHAPE)[1] > 360)[..., None], brighter, glass)
    glasses[:80, 230:] = brighter
    return Case(shone_through(he_density(tissue), glasses), tissue)


def _frame(colour) -> Case:
    case = _on_glass(GLASS)
    pixels = case.pixels.copy()
    noise = np.random.default_rng(3).integers(-1, 2, pixels.shape)
    frame = np.ones(SHAPE, bool)
    frame[12:-12, 12:-60] = False
    pixels[frame] = (np.array(colour) + noise * (max(colour) > 5)).clip(0, 255)[frame]
    return Case(pixels, case.tissue & ~frame)


def _gaps(colour, glass=GLASS) -> Case:
    """Strips and a block that the scanner left out, through tissue as well."""
    case = _on_glass(glass)
    pixels, gap = case.pixels.copy(), np.zeros(SHAPE, bool)
    gap[:, 95:103] = gap[150:, 180:240] = gap[180:210, 270:310] = True
    pixels[gap] = colour
    return Case(pixels, case.tissue & ~gap)


def _pen(ink: str) -> Case:
    """Strokes beside tissue and one along its edge; over the tissue either answer is right."""
    tissue = _two_pieces()
    pen = stroke((20, 220), (130, 380), 12) | stroke((260, 40), (280, 180), 14)
    pen |= stroke((120, 330), (190, 385), 12)
    density = he_density(tissue) + pen[..., None] * np.array(INKS[ink])
    return Case(shone_through(density), tissue, ~(pen & tissue))


def _coverslip() -> Case:
    """The edge of a coverslip: a dark and a bright line, and glue of another tint beyond."""
    tissue = _two_pieces()
    density = he_density(tissue)
    density[:, 372:375] += 0.35
    density[:, 375:377] -= 0.02
    density[:, 377:] += (0.02, 0.025, 0.035)
    density[8:11] += 0.25
    return Case(shone_through(density), tissue)


def _bubbles() -> Case:
    tissue = _two_pieces()
    density = he_density(tissue)
    y, x = np.indices(SHAPE)
    for row, col, radius in ((60, 300, 42), (240, 100, 36), (130, 200, 15)):
        distance = np.abs(np.hypot(y - row, x - col) - radius)
        density += (0.5 * np.exp(-((distance / 2.5) ** 2)))[..., None] * (1.0, 1.03, 1.08)
    return Case(shone_through(density), tissue)


def _dust() -> Case:
    """Grey specks, blurred ones out of focus, and dark fibres."""
    tissue = _two_pieces()
    density, random = he_density(tissue), np.random.default_rng(5)
    specks = np.zeros(SHAPE)
    specks[random.integers(0, SHAPE[0], 60), random.integers(0, SHAPE[1], 60)] = 1
    blurred = np.zeros(SHAPE)
    blurred[random.integers(0, SHAPE[0], 8), random.integers(0, SHAPE[1], 8)] = 1
    dust = 6 * ndimage.gaussian_filter(specks, 1.2) + 60 * ndimage.gaussian_filter(blurred, 6)
    dust = dust + 0.6 * stroke((30, 210), (70, 260), 3)
    return Case(shone_through(density + dust[..., None]), tissue)


def _cells(side_px: float, seed: int) -> np.ndarray:
    """Distance to the walls between cells of about this size, px."""
    rows, cols = (int(side / side_px) + 1 for side in SHAPE)
    random = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"), -1).reshape(-1, 2)
    at = ((at + random.uniform(0.1, 0.9, at.shape)) * side_px).astype(int)
    seeds = np.zeros(SHAPE, int)
    inside = (at < SHAPE).all(1)
    seeds[tuple(at[inside].T)] = np.arange(1, inside.sum() + 1)
    rows_of, cols_of = ndimage.distance_transform_edt(seeds == 0, return_indices=True)[1]
    cell = seeds[rows_of, cols_of]
    wall = (cell != np.roll(cell, 1, 0)) | (cell != np.roll(cell, 1, 1))
    return ndimage.distance_transform_edt(~wall)


def _meshwork(side_px: float, wall_density: float) -> Case:
    """Dark tissue, and beside it pale walls around empty cells: fat or lung."""
    dense, mesh = blob(110, 90, 60, 55, 1), blob(170, 260, 105, 95, 4)
    walls = mesh * np.exp(-((_cells(side_px, 6) / 1.0) ** 2)) * wall_density
    pale = walls[..., None] * (0.12, 0.75, 0.25) / 0.75
    return Case(shone_through(he_density(dense, 1.5) * dense[..., None] + pale), dense | mesh)


def _ihc(brown: bool) -> Case:
    tissue = _two_pieces()
    blue = (0.16 + 0.06 * _noise(SHAPE, 2, 1)).clip(0.03, None)
    density = tissue[..., None] * blue[..., None] * HAEMATOXYLIN
    if brown:
        positive = tissue & (_noise(SHAPE, 10, 2) > 0.6)
        density = density + positive[..., None] * 0.8 * DAB
    return Case(shone_through(density), tissue)


def _fold() -> Case:
    """A strip of folded tissue that lies over glass."""
    tissue = _two_pieces()
    strip = stroke((60, 230), (110, 340), 12)
    return Case(
        shone_through(he_density(tissue) + he_density(strip, 2.6, 9) * strip[..., None]),
        tissue | strip,
    )


def _pale(**options) -> Case:
    tissue = _two_pieces()
    return Case(shone_through(he_density(tissue, 0.3), **options), tissue)


def _full() -> Case:
    """Tissue from edge to edge, half of it pale, with few empty places."""
    everywhere = np.ones(SHAPE, bool)
    strength = np.where(np.indices(SHAPE)[1] < 200, 0.5, 1.3)[..., None]
    holes = _noise(SHAPE, 2, 8) > 2.2
    return Case(shone_through(he_density(everywhere & ~holes) * strength), everywhere)


def _empty(glass) -> Case:
    nothing = np.zeros(SHAPE, bool)
    return Case(shone_through(np.zeros((*SHAPE, 3)), glass), nothing)


_CASES: dict[str, Callable[[], Case]] = {
    "H&E on clear glass": lambda: _on_glass(GLASS),
    "warm glass, saturation 0.066": lambda: _on_glass(WARM),
    "cool glass, saturation 0.086": lambda: _on_glass(COOL),
    "grey glass with a vignette": _vignette,
    "glass whose tint drifts": _drift,
    "grey filling (245) beside warm glass": lambda: _two_glasses((245, 245, 245), WARM),
    "bare glass beside yellow mounting": lambda: _two_glasses((244, 243, 244), (238, 232, 212)),
    "frame (0, 0, 0)": lambda: _frame((0, 0, 0)),
    "frame (2, 0, 2)": lambda: _frame((2, 0, 2)),
    "frame (12, 10, 14)": lambda: _frame((12, 10, 14)),
    "black gaps between scanned areas": lambda: _gaps((3, 2, 4)),
    "left out (255) beside warm glass": lambda: _gaps((255, 255, 255), WARM),
    "blue pen": lambda: _pen("blue"),
    "green pen": lambda: _pen("green"),
    "black pen": lambda: _pen("black"),
    "red pen": lambda: _pen("red"),
    "coverslip edge": _coverslip,
    "air bubbles": _bubbles,
    "dust and fibres": _dust,
    "fat beside dark tissue": lambda: _meshwork(9, 0.25),
    "pale fat beside dark tissue": lambda: _meshwork(9, 0.12),
    "lung beside dark tissue": lambda: _meshwork(18, 0.35),
    "IHC, brown and pale blue": lambda: _ihc(True),
    "IHC, pale blue alone": lambda: _ihc(False),
    "fold over glass": _fold,
    "faded H&E": _pale,
    "faded H&E, noisy scanner": lambda: _pale(noise=4),
    "faded H&E, overexposed glass": lambda: _pale(glass=(258, 258, 258)),
    "tissue from edge to edge": _full,
    "empty warm glass": lambda: _empty(WARM),
}
