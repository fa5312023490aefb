"""Measure the pipeline's hot paths, each against a plain baseline in the same run.

    python benchmarks/run.py [--out docs/benchmarks.md]

Machines differ and are noisy: what counts is the ratio, the median over repeated pairs of runs of
baseline and pipeline in turn.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import openslide
import pandas as pd
import pyarrow as pa
import shapely
import simplejpeg
import tifffile
import torch
from torch.nn import functional

from wsi_pipeline.evaluation.detection_hits import SlideHits, detection_froc_hits
from wsi_pipeline.evaluation.froc import FrocHits, froc_curve, froc_metrics, lecture_hits
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.predict import predict_slab
from wsi_pipeline.models.dense import dense_logits, dense_multiply_adds, patch_multiply_adds
from wsi_pipeline.models.inference import predictor, use_mixed_precision
from wsi_pipeline.models.patchnet import Subnet, cut_patches
from wsi_pipeline.models.start import start_model
from wsi_pipeline.models.vgg16 import IMAGENET_MEAN, IMAGENET_STD
from wsi_pipeline.patches.index import PatchIndex, build_index
from wsi_pipeline.patches.sampling import PatchPool, draw
from wsi_pipeline.patches.slabs import slabs
from wsi_pipeline.phantom import plan_cohort, write_slide
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.tissue import TissueMask

# Its arrays are made beforehand, which spares it the script's conversion of lists every time.
THRESHOLD_LOOP = "the organisers' loop over thresholds, 50 of the millions timed"
LIBRARIES = (
    "wsi_pipeline",
    "torch",
    "torchvision",
    "openslide-python",
    "shapely",
    "numpy",
    "simplejpeg",
)


@dataclass(frozen=True)
class Row:
    """One measurement: how much is done a second, and how many times the baseline that is."""

    what: str
    baseline: str
    unit: str
    per_second: float
    baseline_per_second: float
    ratio: float


def compare(
    what: str, baseline: str, unit: str, pipeline: Callable[[], float],
    plain: Callable[[], float], repeats: int = 3,
) -> Row:  # fmt: skip
    """Run the two in turn; each returns how many units it did."""
    rates = [(_rate(plain), _rate(pipeline)) for _ in range(repeats)]
    return Row(
        what,
        baseline,
        unit,
        statistics.median(ours for _, ours in rates),
        statistics.median(theirs for theirs, _ in rates),
        statistics.median(ours / theirs for theirs, ours in rates),
    )


def _rate(work: Callable[[], float]) -> float:
    started = time.perf_counter()
    done = work()
    return done / (time.perf_counter() - started)


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


def labelling() -> Row:
    """Inner-square labels of a slide against a loop of shapely intersections."""
    bounds = Bounds(0, 0, 60_000, 60_000)
    grid = PatchGrid(bounds, 0.25, 1.0)
    angle = np.linspace(0, 2 * np.pi, 5000, endpoint=False)
    wave = 1 + 0.2 * np.sin(17 * angle) + 0.05 * np.sin(200 * angle)
    lesions = [
        shapely.Polygon(
            np.stack([x + r * wave * np.cos(angle), y + r * wave * np.sin(angle)], axis=1)
        )
        for x, y, r in ((12_000, 12_000, 6000), (40_000, 15_000, 9000), (30_000, 45_000, 10_000))
    ]
    tissue = TissueMask(np.ones((1875, 1875), bool), bounds, 32.0)
    cells = grid.shape[0] * grid.shape[1]

    def pipeline() -> int:
        build_index("slide", grid, tissue, lesions, 1, 0.05)
        return cells

    def plain() -> int:
        rows, cols = np.indices(grid.shape).reshape(2, -1)
        squares = [shapely.box(*box) for box in grid.inner_boxes(rows, cols)[::50]]
        for square in squares:
            any(lesion.intersection(square).area > 0 for lesion in lesions)
        return len(squares)

    return compare(
        "labelling a slide of 55,225 cells, 3 lesions of 5,000 points",
        "an intersection for each cell and lesion", "cells", pipeline, plain,
    )  # fmt: skip


def sampling() -> Row:
    """Three-step draws from the lecture's cohort against pandas."""
    rng = np.random.default_rng(0)
    grid = PatchGrid(Bounds(0, 0, 100_000, 200_000), 0.25, 1.0)
    counts = rng.multinomial(7_878_675, rng.dirichlet(np.ones(698)))

    def index(number: int, count: int) -> PatchIndex:
        columns = {
            "x": rng.integers(0, 100_000, count, np.int32),
            "y": rng.integers(0, 200_000, count, np.int32),
            "label": ((rng.random(count) < 0.1) & (number % 2 == 0)).astype(np.int8),
        }
        return PatchIndex(f"slide_{number}", grid, pa.table(columns))

    pool = PatchPool.from_indexes(index(i, count) for i, count in enumerate(counts))
    groups = {
        label: [np.arange(pool.group_start[g], pool.group_start[g + 1]) for g in range(*span)]
        for label, span in zip(pool.labels.tolist(), pairwise(pool.label_start), strict=True)
    }

    def pipeline() -> int:
        draw(pool, seed=0, name="bench", first=0, count=1_000_000)
        return 1_000_000

    def plain() -> int:
        for _ in range(20_000):
            of_label = groups[rng.choice(pool.labels)]
            rng.choice(of_label[rng.integers(len(of_label))])
        return 20_000

    return compare(
        "three-step draws, 7,878,675 patches of 698 slides", "numpy, a draw at a time", "draws",
        pipeline, plain,
    )  # fmt: skip


def inference() -> Row:
    """VGG16 on 128 px patches as heatmaps run it, against plain float32."""
    patches = np.random.default_rng(0).integers(0, 256, (32, 128, 128, 3), np.uint8)
    module = start_model("vgg16", "none")
    scaling = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = predictor(
        start_model("vgg16", "none"), **scaling, device=device,
        mixed_precision=use_mixed_precision(device, None),
    )  # fmt: skip
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in scaling.values())
    module = module.to(device).eval()

    def pipeline() -> int:
        ours(patches)
        return len(patches)

    def plain() -> int:
        images = torch.from_numpy(patches).to(device).permute(0, 3, 1, 2).contiguous() / 255
        with torch.no_grad():
            torch.sigmoid(module((images - mean) / std)).cpu()
        return len(patches)

    pipeline(), plain()
    return compare(
        f"VGG16 on 128 px patches ({device})", "float32, contiguous", "patches", pipeline, plain
    )


def dense_patchnet(patch_px: int) -> list[Row]:
    """PatchNet on the patch of every pixel of an image, against batches of patches.

    All in float32 and channels-last, so that the first ratio is that of the work, less what
    sharing costs; its baseline is the fastest of several batch sizes. The second row holds the
    arithmetic against that of a plain convolution: a ratio of 1 would be all a convolution gives.
    A GPU has a third row, for bfloat16.
    """
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subnet = Subnet(patch_px).to(device, memory_format=torch.channels_last).eval()
    side = 64
    image = torch.rand(3, side + patch_px - 1, side + patch_px - 1, device=device)

    def dense() -> int:
        dense_logits(subnet, image, 1).cpu()  # which waits for the device
        return side * side

    dense()
    what = f"PatchNet of {patch_px} px patches at stride 1 ({device}"
    multiply_adds = dense_multiply_adds(subnet, side, side, 1)
    less = patch_multiply_adds(subnet, side**2) / multiply_adds
    baseline, plain = _fastest_batches(subnet, image)
    convolve = _plain_convolution(image)
    rows = [
        compare(f"{what}; {less:.1f} times less work)", baseline, "patches", dense, plain, 5),
        compare(
            f"{what}), its arithmetic", f"a convolution 64 to 64 of {image.shape[-1]} px", "GFLOP",
            lambda: 2e-9 * multiply_adds * dense() / side**2, convolve, 5,
        ),
    ]  # fmt: skip
    return rows + ([_dense_bfloat16(what, subnet, image, dense)] if device == "cuda" else [])


def _fastest_batches(subnet: Subnet, image: torch.Tensor) -> tuple[str, Callable[[], int]]:
    """Patches one by one in the batches, of some sizes, that take the least time: name and run."""
    patches = cut_patches(image[None], subnet.patch_px, 1)[0]
    patches = patches.contiguous(memory_format=torch.channels_last)

    def run(batch: int) -> int:
        chosen = patches[: max(batch, 64)]
        with torch.no_grad():
            torch.cat([subnet(part) for part in chosen.split(batch)]).cpu()
        return len(chosen)

    def rate(batch: int) -> float:
        run(batch)
        return max(_rate(lambda: run(batch)) for _ in range(3))

    batch = max((4, 8, 16, 32, 64) if image.device.type == "cpu" else (64, 256, 1024), key=rate)
    return f"batches of {batch} patches", lambda: run(batch)


def _plain_convolution(image: torch.Tensor) -> Callable[[], float]:
    """A convolution 64 to 64, 3 x 3, float32, channels-last, of the image's size; GFLOP done."""
    size, times = image.shape[-1], 20
    weight = torch.rand(64, 64, 3, 3, device=image.device)
    values = torch.rand(1, 64, size, size, device=image.device)
    weight, values = (t.contiguous(memory_format=torch.channels_last) for t in (weight, values))

    def run() -> float:
        for _ in range(times):
            result = functional.conv2d(values, weight)
        result[0, 0, 0, 0].cpu()  # waits for all of them
        return 2e-9 * times * weight.numel() * (size - 2) ** 2

    run()
    return run


def _dense_bfloat16(
    what: str, subnet: Subnet, image: torch.Tensor, dense: Callable[[], int]
) -> Row:
    """The dense evaluation under autocast, with its largest difference of Q, against float32."""

    def logits() -> torch.Tensor:
        with torch.autocast(image.device.type, torch.bfloat16):
            return dense_logits(subnet, image, 1).cpu()

    exact = torch.sigmoid(dense_logits(subnet, image, 1).cpu())
    difference = (torch.sigmoid(logits()) - exact).abs().max().item()
    return compare(
        f"{what}; bfloat16, Q off by at most {difference:.1g})", "the same in float32", "patches",
        lambda: logits().numel(), dense, 5,
    )  # fmt: skip


def detection_froc() -> Row:
    """FROC of 129 slides with 100,000 detections each against the organisers' loop."""
    rng = np.random.default_rng(0)
    # No mask here: two lesions a slide, and detections that hit none.
    slides = [
        SlideHits(f"s{i}", 2, np.array([1, 2]), rng.random(2), rng.random(100_000), np.empty(0))
        for i in range(129)
    ]

    def pipeline() -> int:
        return _froc(detection_froc_hits("corrected", slides))

    return compare(
        f"FROC of 129 slides, 100,000 detections each (at most {_peak_mib(pipeline):,.0f} MiB)",
        THRESHOLD_LOOP, "thresholds",
        pipeline, _threshold_loop(detection_froc_hits("corrected", slides)),
    )  # fmt: skip


def patch_froc() -> Row:
    """The lecture's FROC of ten million patches against the same loop."""
    rng = np.random.default_rng(0)
    labels = pd.Series(np.arange(200) % 2, index=[f"s{i}" for i in range(200)])
    slide = rng.integers(0, 200, 10_000_000)
    patches = pd.DataFrame(
        {
            "slide_id": pd.Categorical.from_codes(slide, labels.index),
            "score": rng.random(len(slide), np.float32),
        }
    )
    lesions = pd.DataFrame({"slide_id": labels.index[labels == 1], "score": rng.random(100)})

    def pipeline() -> int:
        return _froc(lecture_hits(patches, lesions, labels))

    return compare(
        f"the lecture's FROC of 10,000,000 patches (at most {_peak_mib(pipeline):,.0f} MiB)",
        THRESHOLD_LOOP, "thresholds",
        pipeline, _threshold_loop(lecture_hits(patches, lesions, labels)),
    )  # fmt: skip


def _froc(hits: FrocHits) -> int:
    curve = froc_curve(hits)
    froc_metrics(curve, len(hits.slide_ids))
    return len(curve.table)


def _threshold_loop(hits: FrocHits) -> Callable[[], int]:
    thresholds = np.unique(hits.fp_score)[:: len(hits.fp_score) // 50]

    def plain() -> int:
        for threshold in thresholds:
            (hits.fp_score >= threshold).sum()
            (hits.lesion_score >= threshold).sum()
        return len(thresholds)

    return plain


def _peak_mib(work: Callable[[], int]) -> float:
    """Most memory that numpy and Python allocate during the work."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"))
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        path = phantom_slide(Path(folder))
        rows = [
            *decoding(path, 1),
            *decoding(path, 2),
            reading(path),
            labelling(),
            sampling(),
            inference(),
            *dense_patchnet(17),
            *dense_patchnet(21),
            *dense_patchnet(31),
            detection_froc(),
            patch_froc(),
        ]
    out.write_text(page(rows))
    print(out.read_text())


def page(rows: list[Row]) -> str:
    """The figures as Markdown, with what they were measured on."""
    table = "\n".join(
        f"| {r.what} | {r.per_second:,.0f} {r.unit}/s | {r.baseline} |"
        f" {r.baseline_per_second:,.0f} {r.unit}/s | {r.ratio:,.1f} |"
        for r in rows
    )
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"""# Benchmarks

Written by `make bench`. Each row compares the pipeline with a plain baseline in the same run, in
turn; the ratio is the median of the pairs' ratios. Absolute figures vary with the machine.

| what | pipeline | baseline | baseline's rate | times faster |
|---|---|---|---|---|
{table}

Machine: {platform.machine()}, {os.cpu_count()} cores, {device}; Python
{platform.python_version()}, {libraries}. Command: `python benchmarks/run.py`.
"""


if __name__ == "__main__":
    main()
