"""Tissue drawn from stamps and noise: glands in stroma, and a poorly differentiated carcinoma.

What tells tumour from normal tissue is form, not colour: nuclei of 12 um instead of 6, of varied
shape, with open chromatin and nucleoli, in sheets instead of glands. Their density is such that
both take up about as much of each dye, and stains vary from slide to slide.

Light passes the dyes by Beer and Lambert's law, so optical densities are concentrations times
the dyes' absorbance. Everything is a function of the position in the slide: objects come from
cells of a fixed lattice with random numbers of their own, noise is periodic or a sum of waves.
A block therefore shows the same pixels whichever window it is drawn in.
"""

import numpy as np
import shapely
from scipy.ndimage import fourier_gaussian, map_coordinates

from wsi_pipeline.geometry import Bounds
from wsi_pipeline.phantom import stamps
from wsi_pipeline.phantom.layout import Layout
from wsi_pipeline.phantom.plan import generator

# Absorbance of hematoxylin and eosin in red, green and blue: Macenko et al., A method for
# normalizing histology slides for quantitative analysis, ISBI 2009 (the usual reference matrix).
STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])

CELL_UM = 90.0  # side of a lattice cell: one gland at most in each
REACH_UM = 85.0  # no object reaches farther from its place in the lattice
DRIFT_UM = 14.0  # glands leave their lattice by a smooth drift, of up to twice as much
NOISE_PX = 1024


class Histology:
    """The texture of one slide: its stain, its stamps and its noise.

    Parameters
    ----------
    seed : int
    mpp : float
    layout : Layout
    """

    def __init__(self, seed: int, mpp: float, layout: Layout):
        self._seed, self._mpp, self._layout = seed, mpp, layout
        self._tumour = layout.sheets
        shapely.prepare(self._tumour)
        self._stains = _stain_matrix(generator(seed, "stain"))
        self._stamps = _stamp_sets(generator(seed, "stamps"), mpp)
        self._fibres = _fibres(generator(seed, "fibres"), mpp)
        self._grain = _periodic_noise(generator(seed, "grain"), 0.9 / mpp)
        rng = generator(seed, "waves")
        self._thickness = Waves(rng, 400 / mpp)
        self._glandular = Waves(rng, 500 / mpp)
        self._cellular = Waves(rng, 300 / mpp)
        self._septa = Waves(rng, 110 / mpp)
        self._drift = [Waves(rng, 260 / mpp) for _ in range(2)]

    def density(self, window: Bounds, tumour: np.ndarray) -> np.ndarray:
        """Optical densities of a window.

        Parameters
        ----------
        window : Bounds
        tumour : float32 array, shape (height, width)
            Share of tumour, 0 to 1.

        Returns
        -------
        float32 array, shape (height, width, 3)
        """
        objects = self._objects(window)
        fibre, grain = (_wrapped(noise, window) for noise in (self._fibres, self._grain))
        canvas = np.stack([0.06 + 0.02 * grain, 0.62 + 0.16 * fibre + 0.05 * grain], axis=-1)
        self._press("stroma", objects["stroma"], canvas, window)
        self._press("gland", objects["gland"], canvas, window)
        if tumour.any():
            self._lay_tumour(canvas, tumour, fibre, grain, window)
            for kind in ("cleft", "tumour"):
                self._press(kind, objects[kind], canvas, window)
        self._press("lymphocyte", objects["lymphocyte"], canvas, window)
        thickness = 1 + 0.15 * self._thickness(window)
        return np.maximum(canvas, 0.01) @ self._stains * thickness[..., None]

    def _press(self, kind: str, objects: np.ndarray, canvas: np.ndarray, window: Bounds) -> None:
        stamp_set = self._stamps[kind]
        places = np.round(objects[:, :2]).astype(int) - (window.x, window.y)
        picks = (objects[:, 2] * len(stamp_set)).astype(int)
        turns = (objects[:, 3] * 8).astype(int)
        for (x, y), pick, turn in zip(places, picks, turns, strict=True):
            stamp_set[pick].turned(turn).press(canvas, x, y)

    def _lay_tumour(self, canvas, tumour, fibre, grain, window) -> None:
        """Cytoplasm of tumour cells, in nests between thin septa of stroma."""
        nest = np.clip((np.abs(self._septa(window)) - 0.1) / 0.08, 0, 1)
        cytoplasm = np.stack([0.04 + 0.02 * grain, 0.5 + 0.05 * grain + 0.05 * fibre], axis=-1)
        septum = np.stack([0.08 + 0.02 * grain, 0.6 + 0.15 * fibre], axis=-1)
        laid = septum + nest[..., None] * (cytoplasm - septum)
        canvas += tumour[..., None] * (laid - canvas)

    def _objects(self, window: Bounds) -> dict[str, np.ndarray]:
        """Objects whose stamps may reach into the window: x, y (level-0 px), pick, turn."""
        cells = _lattice_cells(window, CELL_UM / self._mpp, REACH_UM / self._mpp)
        numbers = np.stack([_cell_numbers(self._seed, col, row) for col, row in cells])
        found, start = {}, 0
        for kind, (per_side, jitter) in LATTICES.items():
            count = per_side**2
            part = numbers[:, start : start + count]
            start += count
            row, col = np.divmod(np.arange(count), per_side)
            step = np.stack([col, row], axis=-1) + 0.5 + jitter * (part[..., :2] - 0.5)
            place = (cells[:, None] + step / per_side) * (CELL_UM / self._mpp)
            if kind == "gland":
                drift = [waves.at(place[..., 0], place[..., 1]) for waves in self._drift]
                place += np.clip(np.stack(drift, axis=-1), -2, 2) * (DRIFT_UM / self._mpp)
            kept = self._chosen(kind, place, chance=part[..., 4])
            found[kind] = np.concatenate([place, part[..., 2:4]], axis=-1)[kept]
        return found

    def _chosen(self, kind: str, place: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """Which of the places of the lattice hold an object."""
        x, y = place[..., 0], place[..., 1]
        if kind == "stroma":
            return chance < 0.7 + 0.25 * self._cellular.at(x, y)
        if kind == "gland":
            return (chance < 0.8 + 0.5 * self._glandular.at(x, y)) & (self._aggregation(x, y) < 0.2)
        inside = shapely.contains_xy(self._tumour, x, y)
        if kind == "lymphocyte":
            return ~inside & (chance < self._aggregation(x, y))
        if kind == "cleft":
            return inside & (chance < 0.6)
        return inside & (np.abs(self._septa.at(x, y)) > 0.12) & (chance < 0.75)

    def _aggregation(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Density of lymphocytes, 0 to 1, falling off at the edge of an aggregate."""
        reach = self._layout.aggregates[:, 2].max()
        low, high = (f([x.ravel(), y.ravel()], axis=1) for f in (np.min, np.max))
        centre, radius = self._layout.aggregates[:, :2], self._layout.aggregates[:, 2]
        near = ((centre > low - reach) & (centre < high + reach)).all(axis=1)
        density = np.zeros_like(x)
        for (cx, cy), r in zip(centre[near], radius[near], strict=True):
            density = np.maximum(density, np.clip(2 - 2 * np.hypot(x - cx, y - cy) / r, 0, 0.95))
        return density


# Places of each kind of object in a lattice cell: so many along a side, shifted by up to half of
# `jitter` steps.
LATTICES = {
    "stroma": (7, 1.0),
    "gland": (1, 0.35),
    "cleft": (1, 1.0),
    "tumour": (6, 0.6),
    "lymphocyte": (12, 0.7),
}


class Waves:
    """A smooth random function of the position: a sum of plane waves, of variance 1.

    A product of two thin matrices evaluates it in a window, anywhere in a slide of any size.

    Parameters
    ----------
    rng : numpy.random.Generator
    wavelength_px : float
        Typical; the shortest are half as long.
    """

    def __init__(self, rng: np.random.Generator, wavelength_px: float, count: int = 24):
        angle = rng.uniform(0, np.pi, count)
        number = 2 * np.pi / wavelength_px / rng.uniform(0.5, 1.5, count)
        self._kx, self._ky = number * np.cos(angle), number * np.sin(angle)
        self._phase = rng.uniform(0, 2 * np.pi, count)

    def __call__(self, window: Bounds) -> np.ndarray:
        """Values at the window's pixels: float32 array, shape (height, width)."""
        x = np.multiply.outer(self._kx, window.x + np.arange(window.width))
        y = np.multiply.outer(window.y + np.arange(window.height), self._ky) + self._phase
        rows = np.concatenate([np.cos(y), -np.sin(y)], axis=1).astype(np.float32)
        columns = np.concatenate([np.cos(x), np.sin(x)]).astype(np.float32)
        return rows @ columns * np.float32(np.sqrt(2 / self._kx.size))

    def at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Values at points, level-0 px."""
        phase = x[..., None] * self._kx + y[..., None] * self._ky + self._phase
        return np.cos(phase).sum(axis=-1) * np.sqrt(2 / self._kx.size)


def _lattice_cells(window: Bounds, side_px: float, reach_px: float) -> np.ndarray:
    """Cells within reach of the window: int array, shape (N, 2), column and row."""
    (x0, x1), (y0, y1) = (
        np.floor([(start - reach_px) / side_px, (start + size + reach_px) / side_px]).astype(int)
        for start, size in ((window.x, window.width), (window.y, window.height))
    )
    rows, cols = np.mgrid[max(y0, -1) : y1 + 1, max(x0, -1) : x1 + 1]
    return np.stack([cols.ravel(), rows.ravel()], axis=-1)


def _cell_numbers(seed: int, col: int, row: int) -> np.ndarray:
    """Uniform numbers for all places of a cell: shape (places, 5)."""
    rng = np.random.default_rng([seed, int(col) + 1, int(row) + 1])
    return rng.random((sum(per_side**2 for per_side, _ in LATTICES.values()), 5))


def _stain_matrix(rng: np.random.Generator) -> np.ndarray:
    """The dyes' absorbance in this slide: hue and strength vary from laboratory to laboratory."""
    hue = STAINS * rng.normal(1, 0.1, STAINS.shape)
    hue /= np.linalg.norm(hue, axis=1, keepdims=True)
    return (hue * np.exp(rng.normal(0, 0.2, (2, 1)))).astype(np.float32)


def _stamp_sets(rng: np.random.Generator, mpp: float) -> dict[str, list[stamps.Stamp]]:
    def nuclei(count, length, aspect, hematoxylin, vesicular=(0, 0), nucleoli=0):
        made = []
        for _ in range(count):
            length_um = rng.uniform(*length)
            made.append(
                stamps.nucleus(
                    rng,
                    mpp,
                    length_um=length_um,
                    width_um=length_um / rng.uniform(*aspect),
                    hematoxylin=rng.uniform(*hematoxylin),
                    vesicular=rng.uniform(*vesicular),
                    nucleoli=int(rng.integers(0, nucleoli + 1)),
                )
            )
        return made

    lymphocytes = nuclei(24, (5.6, 6.8), (1, 1.15), (1.2, 1.5))
    return {
        "stroma": nuclei(48, (7, 11), (2.2, 4), (0.8, 1.1)) + lymphocytes[:4],
        "lymphocyte": lymphocytes,
        "tumour": nuclei(96, (11, 17), (1.0, 1.5), (0.85, 1.2), (0.1, 0.45), nucleoli=3)
        + lymphocytes[:8],
        "gland": [stamps.gland(rng, mpp, rng.uniform(28, 42)) for _ in range(24)],
        "cleft": [stamps.cleft(rng, mpp, rng.uniform(8, 20)) for _ in range(16)],
    }


def _fibres(rng: np.random.Generator, mpp: float) -> np.ndarray:
    """Wavy collagen: noise drawn out along x, bent by smoother noise."""
    straight = _periodic_noise(rng, (1.2 / mpp, 9 / mpp))
    bend = 9 / mpp * np.stack([_periodic_noise(rng, 25 / mpp) for _ in range(2)])
    return map_coordinates(straight, np.indices(bend[0].shape) + bend, order=1, mode="grid-wrap")


def _periodic_noise(rng: np.random.Generator, sigma_px: float | tuple) -> np.ndarray:
    """Smoothed white noise of variance 1: float32 array, periodic in both axes."""
    spectrum = np.fft.rfft2(rng.standard_normal((NOISE_PX, NOISE_PX)))
    smooth = np.fft.irfft2(fourier_gaussian(spectrum, sigma_px, n=NOISE_PX))
    return (smooth / smooth.std()).astype(np.float32)


def _wrapped(noise: np.ndarray, window: Bounds) -> np.ndarray:
    rows = (window.y + np.arange(window.height)) % NOISE_PX
    columns = (window.x + np.arange(window.width)) % NOISE_PX
    return noise[np.ix_(rows, columns)]
