"""What each slide of a cohort holds, before anything is drawn."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.slides.splits import assign_splits

SMALLEST_SIDE_UM = 1000.0
SMALL_LESION_UM = (120.0, 190.0)  # a small metastasis: few patches meet it
LARGEST_LESION_UM = 4000.0
TUMOUR_PATTERN = (True, False, True, True, False)
SPLIT_SHARES = {"train": 0.55, "validation": 0.15, "test": 0.3}
TILE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}
TILES_OF_A_STAIN = 64
NAEVUS_UM = (120, 240)


@dataclass(frozen=True)
class SlidePlan:
    """All that decides a slide's pixels; plain values, so that it travels to a worker.

    Parameters
    ----------
    slide_id, patient_id : str
    seed : int
        The slide's own; everything random in it derives from here.
    size : (int, int)
        Width and height, level-0 px.
    mpp : float
        Micrometres per level-0 px.
    lesion_diameters_um : tuple of float
        Longest diameter of each lesion; none for a normal slide.
    naevus_diameters_um : tuple of float
        Longest diameter of each benign naevus: a sheet of cells like a tumour's, told from it by
        its brown pigment alone. It is normal tissue: neither annotated nor in the mask.
    split : str or None
        train, validation or test, where the tiles come in separate folders for them.
    normal_tiles, lesion_tiles : tuple of str
        Image files that the slide is pieced together from; empty: it is drawn.
    """

    slide_id: str
    patient_id: str
    seed: int
    size: tuple[int, int]
    mpp: float
    lesion_diameters_um: tuple[float, ...]
    naevus_diameters_um: tuple[float, ...] = ()
    split: str | None = None
    normal_tiles: tuple[str, ...] = ()
    lesion_tiles: tuple[str, ...] = ()

    @property
    def label(self) -> int:
        """1 tumour, 0 normal."""
        return int(bool(self.lesion_diameters_um))


def plan_cohort(
    slides: int,
    seed: int,
    *,
    size: tuple[int, int] = (4096, 4096),
    mpp: float = 0.5,
    textures: str | Path | None = None,
    normal: str = "H",
    lesion: str = "AC",
    naevi: int = 0,
) -> list[SlidePlan]:
    """Plan a cohort: two slides in five are normal, patients have one or two.

    Parameters
    ----------
    slides : int
    seed : int
    size : (int, int)
        Width and height of each slide, level-0 px.
    mpp : float
        Micrometres per level-0 px; with `textures`, that of the tiles: they are laid as they are.
    textures : path-like, optional
        Folder of real tiles, in folders named `normal` and `lesion`, to piece the slides
        together from. Where these come within ``training`` and ``test``, test slides are made
        of test tiles only, all others of training tiles, and every slide has a split.
    normal, lesion : str
        Names of the folders of tiles without and with tumour.
    naevi : int
        Benign naevi in each slide: what a classifier of form takes for tumour.

    Raises
    ------
    ConfigError
        If a side is under 1 mm, the number of slides is not positive, or the folder of
        textures lacks a folder of tiles.
    """
    if slides < 1:
        raise ConfigError(f"slides is {slides}: a cohort has at least one")
    if not mpp > 0 or min(size) * mpp < SMALLEST_SIDE_UM:
        raise ConfigError(
            f"size is {size[0]} x {size[1]} px at {mpp} um per px: each side must measure at least"
            f" {SMALLEST_SIDE_UM:g} um to hold tissue with lesions"
        )
    pools = {} if textures is None else _tile_pools(Path(textures), normal, lesion)
    table = pd.DataFrame({"patient_id": list(_patients(slides, seed)), "annotation": None})
    table["label"] = [int(_is_tumour(number)) for number in range(slides)]
    table["split"] = None
    if "test" in pools:
        table = assign_splits(table, SPLIT_SHARES, seed)
    return [
        _plan_slide(row.Index, row.patient_id, row.split, seed, size, mpp, pools, naevi)
        for row in table.itertuples()
    ]


def generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers for one purpose: the same whatever else was drawn before."""
    return np.random.default_rng([seed, *name.encode()])


def _plan_slide(number, patient, split, seed, size, mpp, pools, naevi) -> SlidePlan:
    slide_id = f"phantom_{number:03d}"
    rng = generator(seed, slide_id)
    slide_seed = int(rng.integers(2**32))
    tiles = pools.get("test" if split == "test" else "training", {})
    stained_alike = _stained_alike(tiles, rng)
    return SlidePlan(
        slide_id=slide_id,
        patient_id=patient,
        seed=slide_seed,
        size=tuple(size),
        mpp=mpp,
        lesion_diameters_um=_lesion_diameters(number, size, mpp, rng),
        naevus_diameters_um=_naevus_diameters(naevi, slide_seed),
        split=split,
        normal_tiles=stained_alike.get("normal", ()),
        lesion_tiles=stained_alike.get("lesion", ()),
    )


def _patients(slides: int, seed: int) -> Iterator[str]:
    rng = generator(seed, "patients")
    left, patient = slides, 0
    while left:
        count = min(left, int(rng.integers(1, 3)))
        yield from [f"patient_{patient:03d}"] * count
        left, patient = left - count, patient + 1


def _is_tumour(number: int) -> bool:
    return TUMOUR_PATTERN[number % len(TUMOUR_PATTERN)]


def _lesion_diameters(number, size, mpp, rng) -> tuple[float, ...]:
    """Of a tumour slide: one large, perhaps a smaller, and in every other one a small."""
    if not _is_tumour(number):
        return ()
    largest = min(0.4 * min(size) * mpp, LARGEST_LESION_UM)
    diameters = [largest * rng.uniform(0.75, 1.0)]
    diameters += list(np.exp(rng.uniform(np.log(200), np.log(0.5 * largest), rng.integers(0, 2))))
    if sum(map(_is_tumour, range(number))) % 2 == 0:
        diameters.append(rng.uniform(*SMALL_LESION_UM))
    return tuple(round(float(diameter), 1) for diameter in sorted(diameters, reverse=True))


def _naevus_diameters(naevi: int, slide_seed: int) -> tuple[float, ...]:
    diameters = generator(slide_seed, "naevi").uniform(*NAEVUS_UM, naevi)
    return tuple(round(float(diameter), 1) for diameter in sorted(diameters, reverse=True))


def _tile_pools(folder: Path, normal: str, lesion: str) -> dict[str, dict[str, list[Path]]]:
    """Tiles by their folder's split, ``training`` and perhaps ``test``, and by class."""
    names = {"normal": normal, "lesion": lesion}
    split = [name for name in ("training", "test") if (folder / name).is_dir()]
    if len(split) == 1:
        raise ConfigError(
            f"{folder}: has a folder {split[0]!r} only; give both 'training' and 'test', or none"
        )
    roots = {name: folder / name for name in split} or {"training": folder}
    return {
        pool: {cls: _tile_files(root / name) for cls, name in names.items()}
        for pool, root in roots.items()
    }


def _stained_alike(
    tiles: dict[str, list[Path]], rng: np.random.Generator
) -> dict[str, tuple[str, ...]]:
    """Of each class the tiles nearest in mean colour to one tile drawn from all.

    Tiles come from many slides; a slide made of any of them would be a patchwork of stains.
    """
    if not tiles:
        return {}
    colours = {
        cls: np.array([_mean_colour(file) for file in files]) for cls, files in tiles.items()
    }
    anchor = rng.choice(np.concatenate(list(colours.values())))
    chosen = {}
    for cls, files in tiles.items():
        distance = np.linalg.norm(colours[cls] - anchor, axis=1)
        nearest = np.sort(np.argsort(distance, kind="stable")[:TILES_OF_A_STAIN])
        chosen[cls] = tuple(str(files[i]) for i in nearest)
    return chosen


@cache
def _mean_colour(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        image.draft("RGB", (16, 16))
        return np.asarray(image.convert("RGB"), np.float32).mean(axis=(0, 1))


def _tile_files(folder: Path) -> list[Path]:
    try:
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in TILE_SUFFIXES)
    except OSError:
        files = []
    if not files:
        raise ConfigError(
            f"{folder}: no tiles here. Textures are folders of images ({', '.join(TILE_SUFFIXES)})"
            f" named as the settings normal and lesion, such as DIR/H and DIR/AC, or the same"
            f" within DIR/training and DIR/test"
        )
    return files
