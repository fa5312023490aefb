"""Tissue pieced together from real tiles: known lesions with the pixels of real H&E."""

import numpy as np
from PIL import Image

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.geometry import Bounds
from wsi_pipeline.phantom.plan import SlidePlan, generator
from wsi_pipeline.phantom.stamps import turned

SEAM_PX = 24  # neighbours fade into each other over so many pixels
# Of each pixel value, against a white of 255.
OPTICAL_DENSITY = -np.log(np.maximum(np.arange(256), 1) / 255).astype(np.float32)


class Mosaic:
    """The texture of one slide, made of its plan's tiles.

    Normal tissue and tumour are two layers of the same kind, each a lattice of tiles drawn at
    random, turned and mirrored, with soft seams; both therefore have the same seams, and only
    the tiles tell them apart.

    Parameters
    ----------
    plan : SlidePlan
        With tiles.
    """

    def __init__(self, plan: SlidePlan):
        self._normal = _Layer(plan.normal_tiles, plan.seed, "normal tiles")
        self._tumour = _Layer(plan.lesion_tiles, plan.seed, "lesion tiles")

    def density(self, window: Bounds, tumour: np.ndarray) -> np.ndarray:
        """Optical densities of a window: see `Histology.density`."""
        if not tumour.any():
            return self._normal.density(window)
        if tumour.all() and tumour.min() == 1:
            return self._tumour.density(window)
        normal = self._normal.density(window)
        return normal + tumour[..., None] * (self._tumour.density(window) - normal)


class _Layer:
    """Tiles of one class, laid without end."""

    def __init__(self, files: tuple[str, ...], seed: int, name: str):
        tiles = [_load(file) for file in files]
        self._side = min(min(tile.shape[:2]) for tile in tiles)
        if self._side <= 2 * SEAM_PX:
            raise ConfigError(f"{files[0]}: tiles must be wider than {2 * SEAM_PX} px")
        self._tiles = [tile[: self._side, : self._side] for tile in tiles]
        self._pitch = self._side - SEAM_PX
        rng = generator(seed, name)
        self._offset = rng.integers(0, self._pitch, 2)
        self._seed = int(rng.integers(2**32))
        ramp = np.minimum((np.arange(self._side, dtype=np.float32) + 0.5) / SEAM_PX, 1)
        self._weight = np.multiply.outer(ramp * ramp[::-1], ramp * ramp[::-1])[..., None]

    def density(self, window: Bounds) -> np.ndarray:
        total = np.zeros((window.height, window.width, 3), np.float32)
        x, y = window.x + self._offset[0], window.y + self._offset[1]
        for row in range(y // self._pitch - 1, (y + window.height) // self._pitch + 1):
            for col in range(x // self._pitch - 1, (x + window.width) // self._pitch + 1):
                self._add_tile(total, col, row, col * self._pitch - x, row * self._pitch - y)
        return total

    def _add_tile(self, total: np.ndarray, col: int, row: int, left: int, top: int) -> None:
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + self._side, total.shape[1]), min(top + self._side, total.shape[0])
        if x0 >= x1 or y0 >= y1:
            return
        pick, turn = np.random.default_rng([self._seed, col + 1, row + 1]).random(2)
        tile = turned(self._tiles[int(pick * len(self._tiles))], int(turn * 8))
        part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        total[y0:y1, x0:x1] += OPTICAL_DENSITY[tile[part]] * self._weight[part]


def _load(file: str) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))
