import io
from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from shapely import Point, box

from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.report.slide_pictures import HeatmapPanel, heatmap_figure, tissue_figure
from wsi_pipeline.slides.tissue import TissueMask


def picture(image, shown, lesions, values, grid, **settings):
    panel = HeatmapPanel("heatmap", values, grid)
    data = heatmap_figure(image, shown, lesions, [panel], **settings)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def is_yellow(pixels):
    return (pixels[..., 0] > 190) & (pixels[..., 1] > 190) & (pixels[..., 2] < 120)


def extent(mask):
    y, x = np.nonzero(mask)
    return x.min(), x.max(), y.min(), y.max()


@pytest.mark.parametrize(("height", "width"), [(200, 280), (900, 60), (60, 900)])
@pytest.mark.parametrize("lesions", [[], [Point(500, 1100).buffer(80)]])
@pytest.mark.parametrize("count", [1, 2])
def test_the_figure_is_a_jpeg_and_leaves_no_global_state(height, width, lesions, count):
    grid = PatchGrid(Bounds(300, 900, width * 8, height * 8), 0.25, 1.0, 128, 64, 64)
    image = np.full((height, width, 3), 230, np.uint8)
    values = np.random.default_rng(0).random(grid.shape, np.float32)
    backend = matplotlib.get_backend()
    panels = [HeatmapPanel("heatmap", values, grid)] * count
    data = heatmap_figure(image, grid.bounds, lesions, panels, width_inches=8)
    found = Image.open(io.BytesIO(data))
    assert found.format == "JPEG"
    assert found.width == 880
    assert plt.get_fignums() == []
    assert matplotlib.get_backend() == backend


@pytest.mark.parametrize("inner_px", [64, 128], ids=["tiling squares", "overlapping squares"])
@pytest.mark.parametrize(
    "shown", [Bounds(100, 200, 6400, 6400), Bounds(3300, 200, 3200, 3200)], ids=["slide", "place"]
)
def test_outline_and_heatmap_lie_where_they_belong(shown, inner_px):
    """The same square in both panels, for the whole slide and for a part of it."""
    grid = PatchGrid(Bounds(100, 200, 6400, 6400), 0.25, 1.0, 128, 64, inner_px)
    image = np.full((400, 400, 3), 255, np.uint8)
    values = np.full(grid.shape, np.nan, np.float32)
    # The cells whose centres, 64 px apart from inner_px / 2 on, lie in the lesion.
    centres = inner_px / 2 + 64 * np.arange(values.shape[0])
    rows, cols = (centres > 640) & (centres < 2240), (centres > 4000) & (centres < 5600)
    values[np.ix_(rows, cols)] = 1.0
    lesion = box(4100, 840, 5700, 2440)

    plain = picture(image, shown, [lesion], np.full(grid.shape, np.nan), grid)
    found = picture(image, shown, [lesion], values, grid)
    middle = found.shape[1] // 2
    coloured = np.abs(found - plain).max(axis=2) > 60
    assert not coloured[:, :middle].any()
    x0, x1, y0, y1 = extent(is_yellow(found[:, :middle]))
    u0, u1, v0, v1 = extent(coloured)
    px_of_cell = (x1 - x0) * 64 / 1600
    assert max(abs(y0 - v0), abs(y1 - v1)) <= 1.1 * px_of_cell + 2
    assert abs((x1 - x0) - (u1 - u0)) <= 1.1 * px_of_cell + 4


def test_without_values_the_slide_stays_as_it_is():
    grid = PatchGrid(Bounds(0, 0, 640, 640), 0.25, 1.0, 128, 64, 64)
    image = np.full((64, 64, 3), (200, 100, 200), np.uint8)
    found = picture(image, grid.bounds, [], np.full(grid.shape, np.nan), grid)
    left, right = found[200:300, 150:250], found[200:300, 600:700]
    assert np.abs(left - (200, 100, 200)).max() < 8
    np.testing.assert_allclose(left.mean(axis=(0, 1)), right.mean(axis=(0, 1)), atol=2)


def test_colours_have_a_fixed_scale():
    grid = PatchGrid(Bounds(0, 0, 640, 640), 0.25, 1.0, 128, 64, 64)
    white = np.full((64, 64, 3), 255, np.uint8)
    low = np.full(grid.shape, 0.2, np.float32)
    mixed = low.copy()
    mixed[:3] = 0.9
    flat, found = (picture(white, grid.bounds, [], v, grid)[:, 600:700] for v in (low, mixed))
    np.testing.assert_allclose(found[300:400], flat[300:400], atol=8)
    red, _, blue = found[350].mean(axis=0)
    assert blue > red + 30
    red, _, blue = found[120].mean(axis=0)
    assert red > blue + 30


def test_holes_have_outlines_and_marks_a_circle():
    grid = PatchGrid(Bounds(0, 0, 640, 640), 0.25, 1.0, 128, 64, 64)
    image = np.zeros((64, 64, 3), np.uint8)
    nothing = np.full(grid.shape, np.nan)
    ring = box(64, 64, 576, 576) - box(256, 256, 384, 384)
    found = picture(image, grid.bounds, [ring], nothing, grid)
    yellow = is_yellow(found[:, : found.shape[1] // 2])
    x0, x1, y0, y1 = extent(yellow)
    inside = yellow[y0 + 40 : y1 - 40, x0 + 40 : x1 - 40]
    assert inside.any()
    u0, u1, _, _ = extent(inside)
    assert (u1 - u0) / (x1 - x0) == pytest.approx(128 / 512, abs=0.05)

    marked = picture(image, grid.bounds, [], nothing, grid, marks=[(320, 320)])
    plain = picture(image, grid.bounds, [], nothing, grid)
    middle = marked.shape[1] // 2
    for half in (np.s_[:, :middle], np.s_[:, middle:]):
        assert (np.abs(marked - plain).max(axis=2)[half] > 120).any()


def test_a_window_of_a_heatmap_lies_where_the_whole_one_does():
    grid = PatchGrid(Bounds(100, 200, 6400, 6400), 0.25, 1.0, 128, 64, 64)
    shown = Bounds(3300, 200, 3200, 3200)  # columns 50 to 100, rows 0 to 50
    image = np.full((400, 400, 3), 255, np.uint8)
    values = np.random.default_rng(0).random(grid.shape, np.float32)
    whole = HeatmapPanel("same", values, grid)
    window = HeatmapPanel("same", values[:50, 50:], grid, first_cell=(0, 50))
    found, expected, wrong = (
        np.asarray(Image.open(io.BytesIO(heatmap_figure(image, shown, [], [panel])))).astype(int)
        for panel in (window, whole, replace(window, first_cell=(1, 50)))
    )
    # Not to the last grey level: where a cell ends within a pixel of the picture, it is rounded.
    assert np.abs(found - expected).mean() < 1
    assert np.abs(wrong - expected).mean() > 5


def test_heatmaps_stand_side_by_side_in_their_order():
    grid = PatchGrid(Bounds(0, 0, 640, 640), 0.25, 1.0, 128, 64, 64)
    image = np.full((64, 64, 3), 255, np.uint8)
    high, low = np.full(grid.shape, 1.0), np.full(grid.shape, 0.0)
    panels = [HeatmapPanel("high", high, grid), HeatmapPanel("low", low, grid)]
    data = heatmap_figure(image, grid.bounds, [], panels, width_inches=9)
    found = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    # The scale on the right stands in the way of a plain third: look at the middle of each panel.
    middle = found[found.shape[0] // 2 - 20 : found.shape[0] // 2 + 20]
    left, centre, right = (middle[:, x : x + 40].mean(axis=(0, 1)) for x in (140, 440, 740))
    assert left.min() > 245
    assert centre[0] > centre[2] + 60  # red
    assert right[2] > right[0] + 40  # blue


def is_cyan(pixels):
    return (pixels[..., 0] < 120) & (pixels[..., 1] > 190) & (pixels[..., 2] > 190)


def test_outlines_of_tissue_and_annotation_lie_where_they_belong():
    """A mask of 512 x 256 px of 4 level-0 px, drawn on 1024 x 512: a px of it on 2 x 2."""
    mask = np.zeros((256, 512), bool)
    mask[50:150, 300:400] = True
    mask[200:, :60] = True  # to the edge
    tissue = TissueMask(mask, Bounds(100, 200, 2048, 1024), 4.0, np.full((256, 512, 3), 230, "u1"))
    lesion = box(100 + 4 * 320, 200 + 4 * 70, 100 + 4 * 360, 200 + 4 * 130)
    data = tissue_figure(tissue, [lesion], 0.5)
    with Image.open(io.BytesIO(data)) as found:
        assert (found.format, found.size) == ("JPEG", (1024, 512))
        pixels = np.asarray(found.convert("RGB"))
    assert extent(is_cyan(pixels[:, 512:])) == pytest.approx((88, 287, 100, 299), abs=2)
    assert extent(is_cyan(pixels[:, :512])) == pytest.approx((0, 119, 400, 511), abs=2)
    assert extent(is_yellow(pixels)) == pytest.approx((640, 719, 140, 259), abs=2)
    assert plt.get_fignums() == []
