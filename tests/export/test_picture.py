"""Pictures of heatmaps, read back with Pillow."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import shapely
from PIL import Image
from planted import GRIDS, lesion_box, planted
from slide_files import write_mrxs

from wsi_pipeline.errors import ExportError, RunError
from wsi_pipeline.export.picture import (
    picture_frame,
    read_picture,
    write_bare_overlay,
    write_overlay,
)
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.regions import Region, heatmap_regions
from wsi_pipeline.slides.reader import Slide

NO_DETECTIONS = pd.DataFrame(columns=["probability", "x", "y"], dtype=float)
YELLOW, WHITE, BLACK = (255, 255, 0), (255, 255, 255), (0, 0, 0)
RED = (165, 0, 38)
"""ColorBrewer's RdYlBu at its end: probability 1."""


def slide_of(grid):
    """What `picture_frame` asks of a slide."""
    return SimpleNamespace(
        path="s.tif", mpp=grid.mpp, bounds=grid.bounds, as_read=lambda downsample: downsample
    )


def draw(path, grid, values, frame, *, regions=(), detections=NO_DETECTIONS, image=None):
    """Write a picture, over a grey slide unless told otherwise, and read it back."""
    image = np.full((*frame.shape, 3), 128, np.uint8) if image is None else image
    write_overlay(
        path, image=image, frame=frame, values=values, grid=grid, regions=regions,
        detections=detections, model="net@1", slide_id="s",
    )  # fmt: skip
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")), picture.format


def extent(mask):
    """x0, y0, x1, y1 of the pixels of a mask, the last ones included whole."""
    y, x = np.nonzero(mask)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


def level0(box_px, grid, frame):
    """Of a box in the picture, from where it starts and how large its pixels are."""
    corner = np.array([grid.bounds.x, grid.bounds.y] * 2)
    return corner + box_px * frame.working_mpp / grid.mpp


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("px_per_cell", [7.3, 1.9])
def test_the_lesions_colour_lies_where_it_is_to_half_a_picture_pixel(name, px_per_cell, tmp_path):
    grid, values = GRIDS[name], planted(GRIDS[name])
    frame = picture_frame(slide_of(grid), grid.pixel_spacing_um() / px_per_cell)
    write_bare_overlay(tmp_path / "s.png", frame=frame, values=values, grid=grid)
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.mode == "RGBA" and picture.size == frame.shape[::-1]
        pixels = np.asarray(picture)
    found = level0(extent((pixels[..., 0] > 150) & (pixels[..., 2] < 60)), grid, frame)
    step = grid.stride_px * grid.downsample
    assert np.abs(found - lesion_box(grid)).max() <= step / px_per_cell / 2 + 1e-6
    assert set(np.unique(pixels[..., 3])) == {0, 153}  # 0.6 of 255
    top = level0(extent(pixels[..., 3] > 0), grid, frame)[1]  # the first 5 rows are no tissue
    assert abs(top - grid.heatmap_box((5, 0), (1, 1))[1]) <= step / px_per_cell / 2 + 1e-6


@pytest.mark.parametrize("name", GRIDS)
def test_where_pixels_are_coarser_than_the_heatmap_they_show_the_mean(name, tmp_path):
    grid, values = GRIDS[name], np.full(GRIDS[name].shape, np.nan, np.float32)
    values[20:24, 30:34] = [1, 0, 1, 0]
    values[20, 30:34] = np.nan
    frame = picture_frame(slide_of(grid), grid.pixel_spacing_um() * 2)
    write_bare_overlay(tmp_path / "s.png", frame=frame, values=values, grid=grid)
    pixels = np.asarray(Image.open(tmp_path / "s.png"))
    coloured = pixels[..., 3] > 0
    x0, y0, x1, y1 = grid.heatmap_box((20, 30), (4, 4))
    step = 2 * grid.stride_px * grid.downsample
    assert np.abs(level0(extent(coloured), grid, frame) - [x0, y0, x1, y1]).max() <= step / 2
    middle = pixels[coloured][:, :3]
    assert len(np.unique(middle, axis=0)) == 1 and middle[0].min() > 180  # pale yellow: 0.5


def test_over_a_slide_with_bounds_the_heatmap_covers_what_it_is_about(tmp_path):
    scanned = np.full((1000, 1200, 3), 230, np.uint8)
    scanned[320:480, 384:576] = 100  # rows 10 to 14, columns 12 to 17 of the heatmap
    path = write_mrxs(tmp_path / "s.mrxs", scanned, bounds_x=300, bounds_y=500)
    with Slide(path) as slide:
        grid = PatchGrid(slide.bounds, slide.mpp, 1.0, 64, 32, 32)
        frame = picture_frame(slide, 0.5)
        image = read_picture(slide, frame)
    values = np.full(grid.shape, np.nan, np.float32)
    values[10:15, 12:18] = 1
    pixels, _ = draw(tmp_path / "s.png", grid, values, frame, image=image)
    covered = np.round(0.4 * 100 + 0.6 * np.array(RED))
    assert pixels.shape[0] > 500 and pixels.shape[1] == 600  # the legend is below
    at = extent((pixels[:500] == covered).all(-1))
    np.testing.assert_array_equal(at, [192, 160, 288, 240])
    assert not (pixels[:400] == 100).all(-1).any()


def test_regions_are_outlined_and_detections_are_circles(tmp_path):
    grid = GRIDS["bounds"]
    values = planted(grid)
    frame = picture_frame(slide_of(grid), 2.5)
    region = heatmap_regions(values, grid, 0.9)
    detections = pd.DataFrame({"probability": [0.9], "x": [5234.0], "y": [4567.0]})
    pixels, _ = draw(
        tmp_path / "s.png", grid, np.full_like(values, np.nan), frame,
        regions=region, detections=detections,
    )  # fmt: skip
    height, width = frame.shape
    slide = pixels[:height, :width]
    found = level0(extent((slide == YELLOW).all(-1)), grid, frame)
    assert np.abs(found - lesion_box(grid)).max() <= 2 * frame.downsample  # a line of 2 px
    white = (slide == WHITE).all(-1)
    white[-100:] = False  # the scale bar's box
    circle = level0(extent(white), grid, frame)
    np.testing.assert_allclose((circle[:2] + circle[2:]) / 2, [5234, 4567], atol=frame.downsample)


def test_the_scale_bar_is_as_long_as_it_says(tmp_path):
    grid = GRIDS["plain"]  # 4,500 um wide: the longest bar under a quarter is 1 mm
    frame = picture_frame(slide_of(grid), 4.0)
    pixels, _ = draw(tmp_path / "s.png", grid, planted(grid), frame)
    rows = (pixels[: frame.shape[0]] == BLACK).all(-1)
    assert rows.sum(axis=1).max() in (250, 251)


@pytest.mark.parametrize(
    ("ending", "expected"), [("png", "PNG"), ("jpg", "JPEG"), ("JPEG", "JPEG")]
)
def test_the_name_says_the_format_and_the_same_picture_is_the_same_bytes(
    ending, expected, tmp_path
):
    grid = GRIDS["plain"]
    frame = picture_frame(slide_of(grid), 16.0)
    path, again = tmp_path / f"s.{ending}", tmp_path / f"t.{ending}"
    for at in (path, again):
        _, found = draw(at, grid, planted(grid), frame)
    assert found == expected and path.read_bytes() == again.read_bytes()


def test_a_tiny_picture_gets_a_legend_as_wide_as_needed(tmp_path):
    grid = GRIDS["plain"]
    frame = picture_frame(slide_of(grid), 450.0)
    region = Region(shapely.box(0, 0, 3000, 3000), 0.5, 0.9, 0.7, 1.0)
    pixels, _ = draw(tmp_path / "s.png", grid, planted(grid), frame, regions=[region])
    assert frame.shape == (8, 10) and pixels.shape[1] > 300


def test_a_picture_that_is_too_large_is_refused_with_a_resolution_that_fits():
    grid = PatchGrid(Bounds(0, 0, 100_000, 80_000), 0.25, 1.0)
    with pytest.raises(ExportError, match="has 50000 x 40000 px") as refused:
        picture_frame(slide_of(grid), 0.5)
    assert "Choose a coarser resolution: 2.3 um per px" in str(refused.value)
    height, width = picture_frame(slide_of(grid), 2.3).shape
    assert height * width <= 100e6
    ribbon = PatchGrid(Bounds(0, 0, 100, 140_000), 0.25, 1.0)
    with pytest.raises(ExportError, match="65000 px on a side") as refused:
        picture_frame(slide_of(ribbon), 0.5)
    assert "0.55 um per px" in str(refused.value)
    assert max(picture_frame(slide_of(ribbon), 0.55).shape) <= 65_000


def test_a_resolution_finer_than_the_slide_is_refused():
    for picture_mpp in (0.4, float("nan")):
        with pytest.raises(ExportError, match=r"finer than the slide s\.tif, which has 0\.5"):
            picture_frame(slide_of(GRIDS["plain"]), picture_mpp)


def test_bad_input_is_refused_and_leaves_no_file(tmp_path):
    grid = GRIDS["plain"]
    frame = picture_frame(slide_of(grid), 16.0)
    with pytest.raises(ExportError, match=r"s\.gif: a picture ends in \.png, \.jpg, \.jpeg"):
        draw(tmp_path / "s.gif", grid, planted(grid), frame)
    with pytest.raises(ExportError, match=r"s\.jpg: a picture ends in \.png\."):
        write_bare_overlay(tmp_path / "s.jpg", frame=frame, values=planted(grid), grid=grid)
    with pytest.raises(RunError, match="its grid"):
        draw(tmp_path / "s.png", grid, np.zeros((2, 2)), frame)
    with pytest.raises(ExportError, match="slide's image has the shape"):
        draw(tmp_path / "s.png", grid, planted(grid), frame, image=np.zeros((2, 2, 3), np.uint8))
    assert not list(tmp_path.iterdir())
