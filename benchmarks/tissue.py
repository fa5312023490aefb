"""Tissue masks by several methods against hand-made and painted truth."""

import math
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import shapely
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageFilter
from scipy import ndimage
from skimage.filters import rank, threshold_otsu
from skimage.measure import find_contours
from skimage.morphology import disk

from benchmarks.measure import Row, Table, compare
from benchmarks.tissue_cases import MPP, Case, painted_cases
from wsi_pipeline.config import TissueConfig
from wsi_pipeline.geometry import Bounds
from wsi_pipeline.raster import fill
from wsi_pipeline.slides.annotation_files import recognise
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.tissue_pixels import closed, find_tissue, glass_colours, without_small

SETTINGS = TissueConfig().model_dump(exclude={"mpp"})
MORPHOLOGY = {name: SETTINGS[name] for name in ("closing_um", "min_area_um2", "max_hole_um2")}
TRUTH = Path(__file__).parent / "tissue_truth"
REAL_SLIDES = {
    "real: skin, H&E": "libvips/CMU-1-Small-Region.svs",
    "real: cell clumps, IHC": "luna/1065626.svs",
    "real: lymph nodes, H&E": (
        "google-medical-imaging/multi_frame_jpeg_camelyon_challenge_image.dcm"
    ),
}
OTSU = "Otsu's threshold on saturation, as in 0.2.0"
LEAST_GLASS = 0.05
CUTOFFS = (0.035, 0.04, 0.045, 0.05, 0.06)


def rows(quick: bool) -> list[Row | Table | str]:
    """Dice of every method on every slide, and the time of the pipeline's method."""
    cases = real_cases() | painted_cases()
    cutoffs = {
        f"{cutoff:g}": partial(pipeline, **SETTINGS | {"min_chroma": cutoff}) for cutoff in CUTOFFS
    }
    tiles = 3 if quick else 8
    pixels = np.tile(cases["fat beside dark tissue"].pixels, (tiles, tiles, 1))
    megapixels = pixels[..., 0].size / 1e6

    def timed(method: Callable) -> Callable[[], float]:
        def work() -> float:
            method(pixels, MPP)
            return megapixels

        return work

    return [
        _dice_table("Dice", METHODS, cases),
        _dice_table("`min_chroma`", cutoffs, cases, summary=True),
        compare(
            f"tissue of {megapixels:.1f} megapixels of mask", OTSU, "megapixels",
            timed(METHODS["pipeline"]), timed(METHODS["0.2.0"]), repeats=7,
        ),
        "Dice of no tissue found where there is none is 1.",
        "All methods: the same morphology (closing, small pieces, small holes) with the defaults of"
        " `tile.tissue`.",
    ]  # fmt: skip


def real_cases() -> dict[str, Case]:
    """The real slides with hand-drawn tissue; none without the folder ``WSI_TEST_DATA``."""
    folder = os.environ.get("WSI_TEST_DATA")
    return {name: _real(Path(folder) / file) for name, file in REAL_SLIDES.items() if folder}


def dice(found: np.ndarray, case: Case) -> float:
    """Overlap where it counts: twice the intersection by the sum of both areas."""
    counts = True if case.counts is None else case.counts
    found, tissue = found & counts, case.tissue & counts
    if not (found | tissue).any():
        return 1.0
    return float(2 * (found & tissue).sum() / (found.sum() + tissue.sum()))


def draw_cases(cases: dict[str, Case], columns: int = 5, width_px: int = 260) -> Image.Image:
    """A sheet of slides with the outlines of the pipeline's mask, as the docs show them.

    Black with a thin line of cyan, and the Dice coefficient of each.
    """
    count = -(-len(cases) // columns)
    figure = Figure(figsize=(columns * width_px / 100, count * width_px * 0.84 / 100), dpi=100)
    panels = figure.subplots(count, columns).ravel()
    for axes, (name, case) in zip(panels, cases.items(), strict=False):
        mask = pipeline(case.pixels, case.mpp)
        axes.imshow(case.pixels)
        for contour in find_contours(np.pad(mask.astype(float), 1), 0.5):
            axes.plot(*(contour[:, ::-1] - 1).T, color="black", lw=1.8)
            axes.plot(*(contour[:, ::-1] - 1).T, color="cyan", lw=0.9)
        axes.set_title(f"{name}\nDice {dice(mask, case):.2f}", fontsize=8)
        height, width = mask.shape
        axes.set(xlim=(-1, width), ylim=(height, -1))
    for axes in panels:
        axes.set_axis_off()
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.96, 0.03, 0.22)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _dice_table(title: str, methods: dict, cases: dict[str, Case], summary=False) -> Table:
    found = {
        name: [dice(method(case.pixels, case.mpp), case) for method in methods.values()]
        for name, case in cases.items()
    }
    figures = {
        "mean": [statistics.mean(column) for column in zip(*found.values(), strict=True)],
        "worst": [min(column) for column in zip(*found.values(), strict=True)],
    }
    lines = figures if summary else found | figures
    return Table(
        f"| {title} | " + " | ".join(methods) + " |",
        [
            f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |"
            for name, values in lines.items()
        ],
    )


def _real(path: Path) -> Case:
    with Slide(path) as slide:
        downsample = max(1.0, MPP / slide.mpp)
        size = [math.ceil(side / downsample) for side in slide.size]
        pixels, mpp = slide.read(0, 0, *size, downsample), slide.mpp * downsample
    parse, document = recognise(TRUTH / f"{path.stem}.geojson")
    shapes = list(parse(document))

    def drawn(group: str) -> np.ndarray:
        polygons = [shapely.Polygon(s.rings[0], s.rings[1:]) for s in shapes if s.group == group]
        masks = [fill(polygon, Bounds(0, 0, *size), downsample) for polygon in polygons]
        return np.any([np.zeros(size[::-1], bool), *masks], axis=0)

    tissue = drawn("tissue")
    return Case(pixels, tissue, tissue | ~drawn("uncounted"), mpp)


# Methods


def pipeline(pixels: np.ndarray, mpp: float, **settings) -> np.ndarray:
    """The pipeline's own."""
    return find_tissue(pixels, mpp=mpp, **SETTINGS | settings).mask


def saturation_otsu(pixels: np.ndarray) -> np.ndarray:
    """What 0.2.0 did: Otsu's threshold on the median-filtered saturation, at least 0.06."""
    saturation = ndimage.median_filter(_saturation(pixels), 3)
    imaged = saturation[(pixels < 255).any(-1)]
    threshold = 0.06
    if imaged.size and np.mean(imaged < threshold) >= LEAST_GLASS:
        threshold = max(threshold, threshold_otsu(imaged))
    return saturation > threshold


def saturation_fixed(pixels: np.ndarray) -> np.ndarray:
    """Saturation, median-filtered over 7 px, above 8 of 255: the defaults of CLAM."""
    blurred = Image.fromarray((_saturation(pixels) * 255).astype(np.uint8))
    return np.asarray(blurred.filter(ImageFilter.MedianFilter(7))) > 8


def grey_otsu(pixels: np.ndarray) -> np.ndarray:
    """Otsu's threshold on the grey level: the first step of histolab's and TIAToolbox's masks."""
    grey = ndimage.median_filter(_grey(pixels), 3)
    return grey < threshold_otsu(grey) if grey.min() < grey.max() else np.zeros(grey.shape, bool)


def entropy_otsu(pixels: np.ndarray) -> np.ndarray:
    """Otsu's threshold on the entropy of the grey level over 5 px around."""
    entropy = rank.entropy(_grey(pixels), disk(5))
    return entropy > threshold_otsu(entropy)


def density_otsu(pixels: np.ndarray) -> np.ndarray:
    """Otsu's threshold on the mean optical density, of a white of 255."""
    density = _density(pixels, np.full(3, 255.0))
    return density > max(0.03, threshold_otsu(density))


def density_of_glass(pixels: np.ndarray) -> np.ndarray:
    """Mean optical density relative to the slide's glass above 0.04."""
    return _density(pixels, glass_colours(pixels)[0]) > 0.04


def _with_morphology(method: Callable) -> Callable:
    def masked(pixels: np.ndarray, mpp: float) -> np.ndarray:
        mask = closed(method(pixels), MORPHOLOGY["closing_um"] / mpp)
        mask = without_small(mask, MORPHOLOGY["min_area_um2"] / mpp**2)
        return ~without_small(~mask, MORPHOLOGY["max_hole_um2"] / mpp**2)

    return masked


def _saturation(pixels: np.ndarray) -> np.ndarray:
    highest = pixels.max(-1).astype(np.float32)
    return (highest - pixels.min(-1)) / np.maximum(highest, 1)


def _grey(pixels: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(pixels).convert("L"))


def _density(pixels: np.ndarray, white: np.ndarray) -> np.ndarray:
    density = -np.log10(np.maximum(pixels, 1).astype(np.float32) / white).mean(-1)
    return ndimage.median_filter(density.astype(np.float32), 3)


METHODS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "pipeline": pipeline,
    "0.2.0": _with_morphology(saturation_otsu),
    "fixed saturation (CLAM)": _with_morphology(saturation_fixed),
    "Otsu, grey (histolab, TIAToolbox)": _with_morphology(grey_otsu),
    "Otsu, entropy": _with_morphology(entropy_otsu),
    "Otsu, optical density": _with_morphology(density_otsu),
    "optical density of glass": _with_morphology(density_of_glass),
}
