"""The training feed: patches from slides and from the cache, alone and with a model in training."""

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
import zarr

from benchmarks.measure import Row, busy_share, busy_text, compare, rate, row_of, watched_gpu
from wsi_pipeline.config import AugmentConfig, TissueConfig
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.jobs.unit import LargeFile, Output, SmallFile
from wsi_pipeline.models.inference import normalise
from wsi_pipeline.models.precision import native_precision
from wsi_pipeline.models.start import start_model
from wsi_pipeline.models.vgg16 import IMAGENET_MEAN, IMAGENET_STD
from wsi_pipeline.patches.cache import SHARD, PatchCache, create_cache, open_cache
from wsi_pipeline.patches.index import PatchIndex, build_index
from wsi_pipeline.patches.overlapping_reads import read_patch
from wsi_pipeline.patches.sampling import PatchPool
from wsi_pipeline.patches.slabs import slabs
from wsi_pipeline.phantom import plan_cohort, write_slide
from wsi_pipeline.slides.open_slides import cached_slide
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.tissue import tissue_mask
from wsi_pipeline.stages.cache import CacheStore
from wsi_pipeline.training.augment import augment
from wsi_pipeline.training.dataset import Batch, PatchDataset, PatchLoader
from wsi_pipeline.training.loop import fit
from wsi_pipeline.training.recipe import Feed, Recipe

PATCH_PX = 512
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MODEL_PX = 512 if GPU else 64
"""VGG16 at 512 px takes a CPU a minute a batch: there the feed could not be seen."""
MODEL_BATCH = 32 if GPU else 4
LOADER_WORKERS = max(1, (os.cpu_count() or 1) - 2) if GPU else 1
JPEG_2000 = "luna/1065626.svs"
MPP = 0.5
BATCH = 16
AUGMENT, TISSUE = AugmentConfig().model_dump(), TissueConfig().model_dump()


def rows(quick: bool) -> list[Row]:
    """Images a second of the feed alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = _phantoms(folder, 2 if quick else 4, 2048 if quick else 4096)
        sources = [("JPEG tiles at level 0", paths[0], 1.0), ("resampled", paths[0], 1.5)]
        if data := os.environ.get("WSI_TEST_DATA"):
            sources.append(("JPEG 2000", Path(data) / JPEG_2000, 1.0))
        count = 20 if quick else 200
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # as in a loader process
            found = [_one_process(folder, *source, count) for source in sources]
            found.append(_by_zarr(folder, paths[0], count))
        return [*found, _loaders(folder, paths, 8 if quick else 40)]


def training_rows(quick: bool) -> list[Row]:
    """Images a second of a model in training alone, with its feed, and of this feed alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = _phantoms(folder, 2 if quick else 4, 4096 if GPU else 2048)
        steps = (60 if quick else 250) if GPU else (3 if quick else 12)
        return _with_model(folder, paths, steps, 1 if quick else 3 if GPU else 2)


def _phantoms(folder: Path, count: int, side_px: int) -> list[Path]:
    plans = plan_cohort(count, 0, size=(side_px, side_px), mpp=MPP)
    for plan in plans:
        write_slide(plan, folder)
    return [folder / "slides" / f"{plan.slide_id}.tif" for plan in plans]


def _one_process(folder: Path, what: str, path: Path, downsample: float, count: int) -> Row:
    """Random patches in one process: cached against decoded."""
    with Slide(path, MPP) as slide:
        index = _index(slide, downsample, PATCH_PX)
        cache = _cache(folder, path, index)
        corners = _corners(index, count)
        slide.backend(0)  # else the first reads find out where its tiles are

        def from_slide() -> int:
            for corner in corners:
                read_patch(slide, index.grid, *corner)
            return count

        stored = sum(file.stat().st_size for file in cache.path.rglob("0") if file.is_file())
        size = f"{stored / index.table.num_rows / 1e3:.0f} kB a patch"
        return compare(
            f"cached {PATCH_PX} px patches, one process ({size})", f"from the slide, {what}",
            "images", lambda: _read_all(cache, corners), from_slide, 5,
        )  # fmt: skip


def _by_zarr(folder: Path, path: Path, count: int) -> Row:
    """The cache's own reading of a chunk against zarr-python's."""
    with Slide(path, MPP) as slide:
        index = _index(slide, 1.0, PATCH_PX)
    cache = _cache(folder, path, index)
    corners = _corners(index, count)
    cells = np.transpose(index.grid.cells_at(*np.transpose(corners))).tolist()
    array = zarr.open_array(cache.path, mode="r")

    def by_zarr() -> int:
        for cell in cells:
            array[*cell]
        return count

    return compare(
        "the same cached patches, JPEG's", "zarr-python on the same file", "images",
        lambda: _read_all(cache, corners), by_zarr,
    )  # fmt: skip


def _read_all(cache: PatchCache, corners: list[tuple[int, int]]) -> int:
    for corner in corners:
        cache.read(*corner)
    return len(corners)


def _loaders(folder: Path, paths: list[Path], steps: int) -> Row:
    """The feed alone: batches of 512 px from two loader processes, at work already."""
    dataset = _dataset(folder, paths, PATCH_PX)
    loaders = [
        PatchLoader(data, batch_size=BATCH, workers=2)
        for data in (dataset, replace(dataset, caches=None))
    ]

    def run(loader: PatchLoader) -> int:
        return sum(len(labels) for _, labels, _ in loader.batches(0, steps))

    for loader in loaders:
        run(loader)
    cached, slides = (partial(run, loader) for loader in loaders)
    return compare(
        f"feed of cached {PATCH_PX} px patches, 2 loader processes", "the feed from JPEG slides",
        "images", cached, slides,
    )  # fmt: skip


class _Run(NamedTuple):
    """Images a second of one run, and the share of its time in which the GPU was busy, or NaN."""

    rate: float
    busy: float = np.nan


def _with_model(folder: Path, paths: list[Path], steps: int, repeats: int) -> list[Row]:
    """Training steps of VGG16 on batches from slides and from the cache, and on one in memory."""
    dataset = _dataset(folder, paths, MODEL_PX)
    settings = {"batch_size": MODEL_BATCH, "workers": LOADER_WORKERS, "pin": GPU}
    cached = PatchLoader(dataset, **settings)
    slides = PatchLoader(replace(dataset, caches=None), **settings)
    one = next(slides.batches(0, 1))
    validation = one[0], torch.arange(MODEL_BATCH) % 2, one[2]  # both labels, always
    train = partial(_train, validation=validation, steps=steps)
    feed_steps = steps if GPU else 64
    for loader in (slides, cached):
        _feed(loader, feed_steps)
    ways = {
        "memory": lambda: train(lambda first, count: [one] * count),
        "slides": lambda: train(slides.batches),
        "cache": lambda: train(cached.batches),
        "feed": lambda: _Run(rate(partial(_feed, slides, feed_steps))),
    }
    runs = [{name: way() for name, way in ways.items()} for _ in range(repeats)]
    rates, busy = ({name: [run[name][i] for run in runs] for name in ways} for i in range(2))
    device = "cuda" if GPU else "cpu"
    model = f"VGG16 trained on {MODEL_PX} px patches ({device})"
    alone = f"on a batch in memory{busy_text(busy['memory'])}"
    feed = f"feed of {MODEL_PX} px patches from slides, {LOADER_WORKERS} loader processes"
    return [
        row_of(feed, f"{model} {alone}", "images", rates["feed"], rates["memory"]),
        *(
            row_of(
                f"{model}, from the {source}{busy_text(busy[source])}", alone, "images",
                rates[source], rates["memory"],
            )
            for source in ("slides", "cache")
        ),
    ]  # fmt: skip


def _feed(loader: PatchLoader, steps: int) -> int:
    return sum(len(labels) for _, labels, _ in loader.batches(0, steps))


def _train(batches: Callable, *, validation: Batch, steps: int) -> _Run:
    """Train for a second epoch: the first one sets up device and loader."""
    asked, trained = [], []  # when an epoch's batches were asked for, and its last step was done

    def of_epoch(*steps: int) -> Iterable[Batch]:
        asked.append(time.perf_counter())
        return batches(*steps)

    def of_validation() -> list[Batch]:
        trained.append(time.perf_counter())
        return [validation]

    with tempfile.TemporaryDirectory() as out, watched_gpu() as samples:
        history = fit(
            start_model("vgg16", "none"), Recipe(max_epochs=2, precision=native_precision(DEVICE)),
            Feed(of_epoch, of_validation, _prepare, steps),
            folder=out, fingerprint="", device=DEVICE, save_best=lambda *_: None,
        )  # fmt: skip
    return _Run(history["images_per_second"].iloc[1], busy_share(samples, asked[1], trained[1]))


def _prepare(images: torch.Tensor, numbers: torch.Tensor | None) -> torch.Tensor:
    if numbers is not None:
        images = augment(images, numbers, seed=0, **AUGMENT)
    return normalise(images, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _dataset(folder: Path, paths: list[Path], patch_px: int) -> PatchDataset:
    indexes = []
    for path in paths:
        with Slide(path, MPP) as slide:
            indexes.append(_index(slide, 1.0, patch_px))
    caches = [_cache(folder, *of_slide) for of_slide in zip(paths, indexes, strict=True)]
    slides = [(path, MPP) for path in paths]
    return PatchDataset(PatchPool.from_indexes(indexes), slides, 0, "train", caches)


def _index(slide: Slide, downsample: float, patch_px: int) -> PatchIndex:
    """Patches with tissue, 400 at the most, half a patch apart; labels in turn."""
    grid = PatchGrid(slide.bounds, MPP, downsample, patch_px, patch_px // 2, patch_px // 2)
    found = build_index(slide.path.stem, grid, tissue_mask(slide, **TISSUE), [], 0, 0.5)
    table = found.table.slice(0, 400)
    label = pa.array(np.arange(table.num_rows) % 2, pa.int8())
    return replace(found, table=table.set_column(table.column_names.index("label"), "label", label))


def _corners(index: PatchIndex, count: int) -> list[tuple[int, int]]:
    chosen = np.random.default_rng(0).integers(0, index.table.num_rows, count)
    x, y = (index.table[axis].to_numpy()[chosen].tolist() for axis in "xy")
    return list(zip(x, y, strict=True))


def _cache(folder: Path, path: Path, index: PatchIndex) -> PatchCache:
    """The slide's cache, as the stage makes it; made only once."""
    grid = index.grid
    name = f"{path.stem}-{grid.patch_px}-{grid.downsample}"
    store = CacheStore(name, LargeFile.at(path), MPP, SmallFile("", name), Output(folder))
    if not store.out.exists():
        create_cache(store.part, grid=grid, made_of={})
        cells = grid.cells_at(index.table["x"].to_numpy(), index.table["y"].to_numpy())
        for slab in slabs(grid, *cells, SHARD):
            store.fill(cached_slide(str(path), MPP), grid, slab)
        store.finish([])
    return open_cache(store.out)
