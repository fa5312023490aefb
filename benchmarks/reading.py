"""Reading a slide's tissue patches: against OpenSlide, the bare decoder and other readers."""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import openslide
import simplejpeg
import tifffile

from benchmarks.measure import Row, compare, compare_rates, rate
from wsi_pipeline.config import TissueConfig
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.patches.index import build_index
from wsi_pipeline.patches.overlapping_reads import BAND_PX, read_patches
from wsi_pipeline.patches.slabs import Slab, slabs
from wsi_pipeline.phantom import plan_cohort, write_slide
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.tissue import tissue_mask

REPEATS = 7
SIDE = 512
TILE = 256
PEERS = ("tiffslide", "tifffile", "cucim", "tiatoolbox")
PEERS_PYTHON = Path(".venv-peers/bin/python")
"""Of the environment that `make peers` makes."""


@dataclass(frozen=True)
class TissuePatches:
    """The patches of 512 px over the tissue of a slide, at one stride; level-0 px."""

    slide: Slide
    tissue: str
    stride: int
    grid: PatchGrid
    slab: Slab
    origins: np.ndarray

    def named(self, threads: int) -> str:
        """What a row says of reading them."""
        suffix = f"{threads} thread{'s'[: threads - 1]}"
        return f"{SIDE} px patches of {self.tissue} tissue at stride {self.stride}, {suffix}"


def rows(quick: bool) -> list[Row | str]:
    """All tissue patches of a slide, from one and from two threads.

    Of two slides: real tissue takes a decoder twice as long as the phantom's own, which has less
    detail.
    """
    textures: dict[str, Path | None] = {"synthetic": None}
    found: list[Row | str] = []
    if data := os.environ.get("WSI_TEST_DATA"):
        textures["real"] = Path(data) / "flagy-colorectal"
    else:
        found.append("No real tissue was read: WSI_TEST_DATA is not set.")
    if not PEERS_PYTHON.exists():
        found.append("Other readers were not measured: `make peers` installs them.")
    for tissue, texture in textures.items():
        with tempfile.TemporaryDirectory() as folder:
            path, note = phantom_slide(Path(folder), 4096 if quick else 16384, texture)
            found.append(f"{tissue.capitalize()} tissue: {note}.")
            with Slide(path) as slide:
                strides = [tissue_patches(slide, tissue, stride) for stride in (512, 256)]
                for patches in strides:
                    check_pixels(patches)
                found += [row for threads in (1, 2) for row in against_decoders(*strides, threads)]
                if PEERS_PYTHON.exists():
                    found += [
                        row for threads in (1, 2) for row in against_peers(strides[1], threads)
                    ]
    return found


def phantom_slide(folder: Path, side: int, textures: Path | None) -> tuple[Path, str]:
    """A slide of so many px a side, in JPEG tiles of 256 px; and what it is made of."""
    (plan,) = plan_cohort(1, 0, size=(side, side), mpp=0.25, textures=textures)
    write_slide(plan, folder)
    path = folder / "slides" / f"{plan.slide_id}.tif"
    made = "pieced together from H&E tiles" if textures else "drawn by the phantom"
    with tifffile.TiffFile(path) as file:
        median = np.median(file.pages[0].databytecounts)
    return path, f"{made}, {side:,} px a side, half of the {TILE} px tiles over {median:,.0f} bytes"


def tissue_patches(slide: Slide, tissue: str, stride: int) -> TissuePatches:
    """Find them as the tile stage does."""
    grid = PatchGrid(slide.bounds, slide.mpp, 1.0, SIDE, stride, stride)
    table = build_index(
        "", grid, tissue_mask(slide, **TissueConfig().model_dump()), [], 0, 0.05
    ).table
    origins = np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1)
    (slab,) = slabs(grid, *grid.cells_at(*origins.T), chunk=max(grid.shape))
    return TissuePatches(slide, tissue, stride, grid, slab, origins)


def check_pixels(patches: TissuePatches) -> None:
    """Hold every patch against OpenSlide's."""
    if (backend := patches.slide.backend(0)).name != "tiles":
        raise RuntimeError(f"the slide is read by {backend}")
    handle = openslide.OpenSlide(patches.slide.path)
    for positions, views in read_patches(patches.slide, patches.grid, patches.slab):
        for origin, view in zip(patches.origins[positions].tolist(), views, strict=True):
            region = np.asarray(handle.read_region(origin, 0, (SIDE, SIDE)))
            if not np.array_equal(view, np.where(region[..., 3:], region[..., :3], 255)):
                raise RuntimeError(f"the patch at {origin} is not OpenSlide's")


def against_decoders(wide: TissuePatches, dense: TissuePatches, threads: int) -> list[Row]:
    """Against a loop of reads by OpenSlide; and against all that reading could be.

    That is the same tiles' JPEGs, already in memory, each decoded once and thrown away; and what
    is left of that once the pixels have to stay somewhere.
    """
    found = []
    for patches in (wide, dense):
        what = patches.named(threads)
        read = reading(patches, threads)
        found += [
            compare(what, "OpenSlide's read_region, to RGB, for each", "patches",
                    read, openslide_loop(patches, threads), REPEATS),
            compare(what, "simplejpeg on their tiles, each once", "patches",
                    read, bare_decoding(patches, threads), REPEATS),
            compare(what, "the same, pixels kept in memory", "patches",
                    read, bare_decoding(patches, threads, keep=True), REPEATS),
        ]  # fmt: skip
    slides = [lambda p=p: bool(reading(p, threads)()) for p in (dense, wide)]
    baseline = f"at stride {wide.stride}"
    return [*found, compare(dense.named(threads), baseline, "slides", *slides, REPEATS)]


def against_peers(patches: TissuePatches, threads: int) -> list[Row | str]:
    """Against other libraries, each in the environment of `benchmarks/peers.py`."""
    what, read = patches.named(threads), reading(patches, threads)
    found: list[Row | str] = []
    for name in PEERS:
        try:
            found.append(
                compare_rates(what, name, "patches", lambda: rate(read),
                              lambda name=name: peer_rate(name, patches, threads), 3)
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            found.append(f"{name}, {threads} threads: {error.stderr.strip().splitlines()[-1]}")
    return found


def reading(patches: TissuePatches, threads: int) -> Callable[[], int]:
    """The pipeline's way: views of a band that moves down the slide."""

    def run() -> int:
        with mock.patch.dict(os.environ, OMP_NUM_THREADS=str(threads)):
            bands = read_patches(patches.slide, patches.grid, patches.slab)
            return sum(len(views) for _, views in bands)

    return run


def openslide_loop(patches: TissuePatches, threads: int) -> Callable[[], int]:
    """A read for each patch, as tutorials have it."""
    handle = openslide.OpenSlide(patches.slide.path)
    origins = patches.origins.tolist()

    def read(origin: list[int]) -> int:
        return len(np.asarray(handle.read_region(origin, 0, (SIDE, SIDE)).convert("RGB"))) // SIDE

    def run() -> int:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(read, origins))

    return run


def bare_decoding(patches: TissuePatches, threads: int, keep: bool = False) -> Callable[[], int]:
    """Each tile under a patch decoded, and thrown away; or kept in as much memory as bands take."""
    jpegs = tiles_under(patches)
    kept = np.zeros((BAND_PX // TILE**2 if keep else 0, TILE, TILE, 3), np.uint8)

    def decode(left: Iterator[tuple[int, bytes]]) -> None:
        for number, jpeg in left:
            pixels = simplejpeg.decode_jpeg(jpeg)
            if keep:
                kept[number % len(kept)] = pixels

    def run() -> int:
        left = iter(list(enumerate(jpegs)))  # of a list: threads may share it
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(decode, [left] * threads))
        return len(patches.origins)

    return run


def tiles_under(patches: TissuePatches) -> list[bytes]:
    """The JPEGs of the tiles that the patches touch."""
    stored = patches.slide.path.read_bytes()
    with tifffile.TiffFile(patches.slide.path) as file:
        page = file.pages[0]
        across, down = page.imagewidth // TILE, page.imagelength // TILE
        touched = {
            row * across + col
            for x, y in patches.origins.tolist()
            for row, col in product(_tiles_from(y, down), _tiles_from(x, across))
        }
        places = [(page.dataoffsets[tile], page.databytecounts[tile]) for tile in sorted(touched)]
    return [stored[start : start + count] for start, count in places]


def _tiles_from(start: int, count: int) -> range:
    return range(max(start // TILE, 0), min((start + SIDE - 1) // TILE + 1, count))


def peer_rate(name: str, patches: TissuePatches, threads: int) -> float:
    """Patches a second of another library, its start and its opening of the slide not counted."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as places:
        np.save(places.name, patches.origins)
        command = [PEERS_PYTHON, Path(__file__).with_name("peers.py"), name, patches.slide.path]
        seconds = subprocess.run(
            [*map(str, command), places.name, str(threads)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    return len(patches.origins) / float(seconds.split()[-1])
