"""Reading a slide's tissue patches, against OpenSlide and against the bare decoder."""

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import openslide
import simplejpeg
import tifffile

from benchmarks.measure import Row, compare
from wsi_pipeline.config import TissueConfig
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.patches.index import build_index
from wsi_pipeline.patches.slabs import Slab, read_patches, slabs
from wsi_pipeline.phantom import plan_cohort, write_slide
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.tissue import tissue_mask

REPEATS = 5


def rows(quick: bool) -> list[Row]:
    """All tissue patches of a phantom slide, from one and from two threads."""
    side = 4096 if quick else 16_384
    with tempfile.TemporaryDirectory() as folder:
        path = phantom_slide(Path(folder), side)
        return [row for threads in (1, 2) for row in tissue_patches(path, threads)]


def phantom_slide(folder: Path, side: int) -> Path:
    """A slide of so many px a side, in JPEG tiles of 256 px."""
    (plan,) = plan_cohort(1, 0, size=(side, side), mpp=0.25)
    write_slide(plan, folder)
    return folder / "slides" / f"{plan.slide_id}.tif"


def tissue_patches(path: Path, threads: int) -> list[Row]:
    """The patches of 512 px at strides of 512 and 256 px, as training and heatmaps see them.

    Against a loop over OpenSlide's reads, in so many threads; and against all that reading could
    be: the same tiles' JPEGs, already in memory, each decoded once and thrown away. Megapixels are
    those under a patch, each once, except in a loop of reads.
    """
    with Slide(path) as slide:
        mask = tissue_mask(slide, **TissueConfig().model_dump())
        grids = {
            step: PatchGrid(slide.bounds, slide.mpp, 1.0, 512, step, step) for step in (512, 256)
        }
        work = {}
        for step, grid in grids.items():
            table = build_index("slide", grid, mask, [], 0, 0.05).table
            x, y = table["x"].to_numpy(), table["y"].to_numpy()
            (slab,) = slabs(grid, *grid.cells_at(x, y), chunk=max(grid.shape))
            check_pixels(path, slide, grid, slab)
            work[step] = (x, y, slab)
        found = []
        name = f"{threads} thread{'s'[: threads - 1]}"

        def ours(step: int) -> Callable[[], float]:
            def run() -> float:
                with mock.patch.dict(os.environ, OMP_NUM_THREADS=str(threads)):
                    return sum(
                        len(views) for _, views in read_patches(slide, grids[step], work[step][2])
                    )

            return run

        for step in (512, 256):
            x, y, slab = work[step]
            jpegs = tiles_under(path, x, y)
            what = f"512 px patches at stride {step}, {name}"
            found += [
                compare(
                    what,
                    "OpenSlide's read_region, to RGB",
                    "patches",
                    ours(step),
                    openslide_loop(path, x, y, threads),
                    REPEATS,
                ),
                compare(
                    what,
                    "simplejpeg on their tiles' bytes, each once",
                    "patches",
                    ours(step),
                    bare_decoding(jpegs, threads, len(x)),
                    REPEATS,
                ),
            ]
        scale = len(work[256][0])
        found.append(
            compare(
                f"all patches at stride 256, {name}",
                "all patches at stride 512",
                "slides",
                lambda: ours(256)() / scale,
                lambda: ours(512)() / len(work[512][0]),
                REPEATS,
            )
        )
    return found


def check_pixels(path: Path, slide: Slide, grid: PatchGrid, slab: Slab) -> None:
    """Hold every patch against OpenSlide's."""
    assert slide.backend(0) == "tiles", slide.backend(0)
    handle = openslide.OpenSlide(path)
    x, y = grid.patch_origins(slab.rows, slab.cols)
    for positions, patches in read_patches(slide, grid, slab):
        for place, patch in zip(range(positions.start, positions.stop), patches, strict=True):
            region = handle.read_region((int(x[place]), int(y[place])), 0, (512, 512))
            white = np.full((512, 512, 3), 255, np.uint8)
            alpha = np.asarray(region)[..., 3:] > 0
            assert np.array_equal(patch, np.where(alpha, np.asarray(region)[..., :3], white))


def openslide_loop(path: Path, x: np.ndarray, y: np.ndarray, threads: int) -> Callable[[], int]:
    """A read for each patch, as tutorials have it."""
    handle = openslide.OpenSlide(path)
    origins = list(zip(x.tolist(), y.tolist(), strict=True))

    def read(origin: tuple[int, int]) -> int:
        np.asarray(handle.read_region(origin, 0, (512, 512)).convert("RGB"))
        return 1

    def run() -> int:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(read, origins))

    return run


def bare_decoding(jpegs: list[bytes], threads: int, patches: int) -> Callable[[], int]:
    """Each JPEG decoded, and thrown away."""

    def share(number: int) -> None:
        for jpeg in jpegs[number::threads]:
            simplejpeg.decode_jpeg(jpeg)

    def run() -> int:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(share, range(threads)))
        return patches

    return run


def tiles_under(path: Path, x: np.ndarray, y: np.ndarray) -> list[bytes]:
    """The JPEGs of the tiles that the patches touch."""
    stored = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        across, down = page.imagewidth // page.tilewidth, page.imagelength // page.tilelength
        touched = {
            row * across + col
            for left, top in zip(x.tolist(), y.tolist(), strict=True)
            for row, col in product(
                range(max(top // 256, 0), min((top + 511) // 256 + 1, down)),
                range(max(left // 256, 0), min((left + 511) // 256 + 1, across)),
            )
        }
        places = [(page.dataoffsets[tile], page.databytecounts[tile]) for tile in sorted(touched)]
    return [stored[start : start + count] for start, count in places]
