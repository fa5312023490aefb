"""How large jobs go: a gigapixel slide, ten thousand slides, a hundred million patches.

Figures, not ratios: wall time, and the most memory that a process of the job ever held (the
kernel's high-water mark, ``VmHWM`` of Linux). Client and scheduler are one process.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import openslide
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from shapely.affinity import translate

from benchmarks.measure import Scale
from wsi_pipeline.config_file import dump_config, load_config
from wsi_pipeline.evaluation.froc import froc_curve, froc_metrics, lecture_hits, lesion_scores
from wsi_pipeline.evaluation.patch_level import patch_metrics, patch_metrics_by_slide
from wsi_pipeline.evaluation.patch_scores import read_scores, write_scores
from wsi_pipeline.evaluation.uncertainty import froc_intervals, intervals
from wsi_pipeline.evaluation.weighted_metrics import binary_statistic
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.jobs.record import read_done
from wsi_pipeline.patches.index import SCHEMA, PatchIndex
from wsi_pipeline.patches.sampling import PatchPool, draw
from wsi_pipeline.phantom import SlidePlan, plan_cohort, write_slide
from wsi_pipeline.phantom.layout import draw_layout
from wsi_pipeline.phantom.pyramid import TILE_PX, write_slide_pyramid
from wsi_pipeline.phantom.slide import GLASS
from wsi_pipeline.report.curves import precision_recall_figure, roc_figure
from wsi_pipeline.slides.annotation_xml import write_asap_xml
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages.run_directory import index_path, read_slides
from wsi_pipeline.stages.status import stage_status

LARGEST_PX = (105_185, 221_772)
"""Width and height of the largest slide of the Lecture."""
MPP = 0.25
MOTIF_PX, SLAB_PX = 8192, 4096
SETTINGS = Path(__file__).parents[1] / "configs" / "lecture.yaml"
SECONDS_BETWEEN_SAMPLES = 0.1
TUMOUR_SHARE = 0.1
LESIONS = 3  # of each tumour slide, which every second is


def rows(quick: bool) -> list[Scale]:
    """All of them."""
    return [*gigapixel_tiling(quick), *many_slides(quick), *large_index(quick)]


def gigapixel_tiling(quick: bool) -> list[Scale]:
    """Writing, tiling and opening a slide of the Lecture's largest size."""
    size = (20_000, 30_000) if quick else LARGEST_PX
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _, wrote = alone(write_large_slide, folder, size)
        path, table = folder / "large.tif", folder / "slides.csv"
        table.write_text("slide_id,path,annotation\nlarge,large.tif,large.xml\n")
        tiled = tile(table, folder / "run")
        patches = pq.read_metadata(index_path(folder / "run", "large")).num_rows
        again, first = alone(first_slab, path)
        what = f"a slide of {size[0]:,} x {size[1]:,} px"
        return [
            replace(wrote, what=f"{what}: a phantom", did=f"{path.stat().st_size / 1e9:.2g} GB"),
            replace(tiled, what=f"{what}: `wsi tile`", did=f"{patches:,} patches"),
            replace(
                first,
                what=f"{what}: opened, and a first slab of {SLAB_PX:,} px a side",
                did=f"OpenSlide's pixels; {again:.2f} s for the next slab",
            ),
        ]


def many_slides(quick: bool) -> list[Scale]:
    """`wsi tile` of a few slides and of ten times as many, and again with nothing left to do."""
    few, many = (20, 200) if quick else (500, 10_000)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        small, large = (small_slides(folder, count) for count in (few, many))
        what = "`wsi tile` of small slides (one, in many copies that differ in a byte)"
        runs = [
            (what, few, tile(small, folder / "few")),
            (what, many, tile(large, folder / "many")),
            ("`wsi tile` again, all done", many, tile(large, folder / "many")),
        ]
        _, looked = alone(look_at, folder / "many")
        rates = [
            replace(run, what=what, did=f"{run.did}, {count / run.seconds:,.0f} a second")
            for what, count, run in runs
        ]
        return [*rates, replace(looked, what="status and catalog of the run", did=runs[1][2].did)]


def large_index(quick: bool) -> list[Scale]:
    """Sampling and patch evaluation of a hundred million patches."""
    slides, patches = (70, 14_300) if quick else (698, 143_300)
    total = f"{slides * patches:,} patches of {slides} slides"
    draws_a_second, gathered = alone(gather_and_draw, slides, patches)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_random_scores(folder, slides, patches)
        _, evaluated = alone(evaluate, folder, slides)
    return [
        replace(
            gathered, what=f"sampling from {total}", did=f"{draws_a_second:,.0f} draws a second"
        ),
        replace(
            evaluated, what=f"evaluating {total}", did="metrics, lecture FROC, intervals, curves"
        ),
    ]  # fmt: skip


def alone(work: Callable, *arguments) -> tuple[object, Scale]:
    """What a function returns in a process of its own, and how it went."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_timed, work, arguments).result()


def _timed(work: Callable, arguments: tuple) -> tuple[object, Scale]:
    started = time.perf_counter()
    value = work(*arguments)
    return value, Scale("", "", time.perf_counter() - started, peak_mib("self"))


def tile(table: Path, run_dir: Path) -> Scale:
    """`wsi tile` of a table of slides by the lecture's settings."""
    settings = run_dir.with_suffix(".yaml")
    config = load_config(SETTINGS, out=run_dir, catalog={"csv": table})
    settings.write_text(dump_config(config))
    command = [sys.executable, Path(sys.executable).with_name("wsi"), "tile", "-c", settings]
    before = _recorded(run_dir)
    run = watched(command)
    tasks = _recorded(run_dir) - before
    return replace(run, did=f"{len(read_done(run_dir, 'tile')):,} slides", tasks=tasks)


def _recorded(run_dir: Path) -> int:
    """Units of the catalog and tile stages that are done."""
    return sum(len(read_done(run_dir, stage)) for stage in ("catalog", "tile"))


def watched(command: list) -> Scale:
    """Run a command to its end, and watch the memory of its process and of those it starts."""
    started, own, workers = time.perf_counter(), 0.0, [0.0]
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            own = max(own, peak_mib(process.pid))
            workers.append(max(map(peak_mib, _children(process.pid)), default=0.0))
            time.sleep(SECONDS_BETWEEN_SAMPLES)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Scale("", "", time.perf_counter() - started, own, max(workers))


def peak_mib(pid: int | str) -> float:
    """Most memory that a process has held by now, MiB; 0 if it is gone."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def _children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def write_large_slide(folder: Path, size: tuple[int, int]) -> None:
    """``large.tif``, copies of a phantom of 8,192 px a side, and lesions: ``large.xml``.

    A lesion is the whole outline of a piece of tissue: large and rough.
    """
    (plan,) = plan_cohort(1, 0, size=(MOTIF_PX, MOTIF_PX), mpp=MPP)
    with Slide(folder / write_slide(plan, folder)["path"]) as slide:
        motif = slide.read(0, 0, MOTIF_PX, MOTIF_PX)
    write_slide_pyramid(folder / "large.tif", size, MPP, _strips(motif, size))
    write_asap_xml(folder / "large.xml", list(_lesions(plan, size)))


def _strips(motif: np.ndarray, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The motif side by side, every third copy blank, as strips for `write_slide_pyramid`."""
    width, height = size
    for y in range(0, height, TILE_PX):
        rows = motif[y % MOTIF_PX :][: min(TILE_PX, height - y)]
        blank, copies = np.full_like(rows, GLASS), range(-(-width // MOTIF_PX))
        strip = [blank if _is_blank(y // MOTIF_PX, copy) else rows for copy in copies]
        yield np.concatenate(strip, axis=1)[:, :width]


def _is_blank(row: int, col: int) -> bool:
    return (row + col) % 3 == 2


def _lesions(plan: SlidePlan, size: tuple[int, int]) -> Iterator[shapely.Polygon]:
    """The largest piece of tissue of some copies that are whole."""
    piece = max(draw_layout(plan).tissue.geoms, key=lambda part: part.area)
    for row in range(0, size[1] // MOTIF_PX, 2):
        for col in range(row % 3, size[0] // MOTIF_PX, 6):
            if not _is_blank(row, col):
                yield translate(shapely.Polygon(piece.exterior), col * MOTIF_PX, row * MOTIF_PX)


def first_slab(path: Path) -> float:
    """Open a slide, read a slab of its middle and another; seconds that the second took.

    Raises
    ------
    ValueError
        If the first is not OpenSlide's pixels, or was not read from tiles.
    """
    with Slide(path, MPP) as slide:
        x, y = (side // 2 + 77 for side in slide.size)
        pixels = slide.read(x, y, SLAB_PX, SLAB_PX)
        backend = slide.backend(0)
        started = time.perf_counter()
        slide.read(x, y + SLAB_PX, SLAB_PX, SLAB_PX)
        seconds = time.perf_counter() - started
    with openslide.OpenSlide(path) as handle:
        theirs = np.asarray(handle.read_region((x, y), 0, (SLAB_PX, SLAB_PX)).convert("RGB"))
    if backend.name != "tiles" or not np.array_equal(pixels, theirs):
        raise ValueError(f"{path}: read by {backend}, its slab at {x}, {y} is not OpenSlide's")
    return seconds


def small_slides(folder: Path, count: int) -> Path:
    """A table of so many slides of 1 MB: a small one, with another print density in its last tile.

    Without that they would be copies of one slide, which the catalog refuses.
    """
    (plan,) = plan_cohort(1, 0, size=(2048, 2048), mpp=0.5)
    file = folder / write_slide(plan, folder)["path"]
    content = bytearray(file.read_bytes())
    density = content.rindex(b"JFIF\0") + 8
    (folder / str(count)).mkdir()
    rows = ["slide_id,path,patient_id,label"]
    for number in range(count):
        path = folder / str(count) / f"s{number:05d}.tif"
        content[density : density + 2] = (number + 1).to_bytes(2)
        path.write_bytes(content)
        rows.append(f"{path.stem},{path},p{number // 4},{number % 2}")
    table = folder / f"{count}.csv"
    table.write_text("\n".join(rows) + "\n")
    return table


def look_at(run_dir: Path) -> int:
    """What `wsi status` counts, and the slides that a stage begins with."""
    return len(stage_status(run_dir)) + len(read_slides(run_dir))


def synthetic_index(number: int, patches: int) -> PatchIndex:
    """A patch index by the real schema; one in ten patches of every second slide is tumour."""
    rng = np.random.default_rng(number)
    tumour = (rng.random(patches) < TUMOUR_SHARE) & (number % 2 == 0)
    starts = np.append(0, np.cumsum(tumour)).astype(np.int32)
    columns = [
        rng.integers(0, LARGEST_PX[0], patches, np.int32),
        rng.integers(0, LARGEST_PX[1], patches, np.int32),
        rng.random(patches, np.float32),
        tumour.astype(np.float32),
        tumour.astype(np.int8),
        pa.ListArray.from_arrays(starts, rng.integers(1, LESIONS + 1, starts[-1], np.int32)),
    ]
    table = pa.table([pa.array(column) for column in columns], schema=SCHEMA)
    return PatchIndex(f"s{number:03d}", PatchGrid(Bounds(0, 0, *LARGEST_PX), MPP, 1.0), table)


def gather_and_draw(slides: int, patches: int, count: int = 100_000, times: int = 20) -> float:
    """A pool of synthetic slides, made one at a time; draws from it a second."""
    pool = PatchPool.from_indexes(synthetic_index(i, patches) for i in range(slides))
    started = time.perf_counter()
    for number in range(times):
        draw(pool, seed=0, name="train", first=number * count, count=count)
    return times * count / (time.perf_counter() - started)


def write_random_scores(folder: Path, slides: int, patches: int) -> None:
    """What the evaluate stage keeps of each slide's patches, with a model's random scores."""
    (folder / "slides").mkdir()
    for number in range(slides):
        index = synthetic_index(number, patches)
        label = index.table["label"].to_numpy()
        score = np.random.default_rng(number).random(patches, np.float32)
        score = score ** np.where(label == 1, 0.25, 4).astype(np.float32)
        write_scores(folder, index.slide_id, index.table, score)


def evaluate(folder: Path, slides: int) -> None:
    """What the evaluate stage does with the patches of a test split."""
    ids = [f"s{number:03d}" for number in range(slides)]
    labels = pd.Series([1 - number % 2 for number in range(slides)], ids)
    patients = dict(zip(ids, ids, strict=True))
    on_lesions = pc.list_value_length(pc.field("lesions")) > 0
    lesions = lesion_scores(
        read_scores(folder, ids, ("lesions", "score"), on_lesions),
        {name: range(1, LESIONS + 1) if label else [] for name, label in labels.items()},
    )
    patches = read_scores(folder, ids)
    patch_metrics(patches["label"], patches["score"])
    patch_metrics_by_slide(patches)
    intervals(binary_statistic(patches, 0.75, "patches"), patients)
    hits = lecture_hits(patches, lesions, labels)
    froc_metrics(froc_curve(hits), slides)
    froc_intervals(hits, patients)
    roc_figure(patches["label"], patches["score"], 0.75)
    precision_recall_figure(patches["label"], patches["score"], 0.75)
