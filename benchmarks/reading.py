"""Reading patches of a slide, against OpenSlide and against the bare decoder."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import openslide
import simplejpeg
import tifffile

from benchmarks.measure import Row, compare
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.heatmaps.predict import predict_slab
from wsi_pipeline.patches.slabs import slabs
from wsi_pipeline.phantom import plan_cohort, write_slide
from wsi_pipeline.slides.reader import Slide


def phantom_slide(folder: Path) -> Path:
    """A slide of 8192 px a side, in JPEG tiles of 256 px."""
    (plan,) = plan_cohort(1, 0, size=(8192, 8192), mpp=0.25)
    write_slide(plan, folder)
    return folder / "slides" / f"{plan.slide_id}.tif"


def decoding(path: Path, threads: int) -> list[Row]:
    """All patches side by side, from so many threads: against OpenSlide's reads, and the decoder.

    The second row's baseline is all that reading could be: the same JPEGs, already in memory, each
    decoded and thrown away.
    """
    origins = np.mgrid[0:8192:512, 0:8192:512].reshape(2, -1).T.tolist()
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        places = zip(page.dataoffsets, page.databytecounts, strict=True)
        stored = path.read_bytes()
        jpegs = [stored[start : start + count] for start, count in places]
    slide, handle = Slide(path), openslide.OpenSlide(path)

    def of_openslide(x: int, y: int) -> np.ndarray:
        return np.asarray(handle.read_region((x, y), 0, (512, 512)).convert("RGB"))

    def megapixels(work: Callable, arguments: list) -> Callable[[], float]:
        def run() -> float:
            with ThreadPoolExecutor(threads) as pool:
                return sum(array.size for array in pool.map(work, arguments)) / 3e6

        return run

    def in_one_thread_each(run: Callable[[], float]) -> Callable[[], float]:
        def limited() -> float:
            with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
                return run()

        return limited

    ours = in_one_thread_each(megapixels(lambda origin: slide.read(*origin, 512, 512), origins))
    theirs = megapixels(lambda origin: of_openslide(*origin), origins)
    what = f"512 px patches at stride 512, {threads} thread{'s'[: threads - 1]}"
    slide.read(0, 0, 4096, 4096)  # its first read holds the level against OpenSlide's
    return [
        compare(what, "OpenSlide's read_region, to RGB", "MP", ours, theirs, 5),
        compare(
            what, "simplejpeg on the tiles' bytes", "MP",
            ours, megapixels(simplejpeg.decode_jpeg, jpegs), 5,
        ),
    ]  # fmt: skip


def reading(path: Path) -> Row:
    """Overlapping patches of a slide: one read a slab against one read a patch."""
    with Slide(path) as slide:
        grid = PatchGrid(slide.bounds, slide.mpp, 1.0)
        rows, cols = (axis.ravel() for axis in np.mgrid[8:24, 8:24])
        (slab,) = slabs(grid, rows, cols, chunk=8 * 8)

        def pipeline() -> int:
            predict_slab(slide, grid, slab, lambda p: np.zeros(len(p), np.float32), batch_size=32)
            return len(rows)

        def plain() -> int:
            for x, y in zip(*grid.patch_origins(rows, cols), strict=True):
                slide.read(int(x), int(y), grid.patch_px, grid.patch_px)
            return len(rows)

        pipeline()  # the first read holds the level against OpenSlide's
        return compare(
            "reading 512 px patches at stride 256", "a read for each patch", "patches",
            pipeline, plain,
        )  # fmt: skip
