"""ASAP's files: the TIFF through OpenSlide, the XML through our own reader."""

import tracemalloc
from xml.etree import ElementTree

import numpy as np
import openslide
import pandas as pd
import pytest
import shapely
import tifffile
from planted import GRIDS, LESION, SLIDE_SIZES, lesion_box, planted

from wsi_pipeline.config import AnnotationConfig
from wsi_pipeline.errors import RunError
from wsi_pipeline.export.asap import write_asap_annotations, write_asap_heatmap
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.regions import heatmap_regions
from wsi_pipeline.slides.annotations import read_annotation

RULES = {name: getattr(AnnotationConfig(), name) for name in ("positive", "exclusion", "ignored")}
GREY = round(255 * LESION)
NOTHING = pd.DataFrame({"probability": [], "x": [], "y": []})


@pytest.mark.parametrize("name", GRIDS)
def test_openslide_opens_the_heatmap_at_the_slides_size_with_the_lesion_in_its_place(
    name, tmp_path
):
    grid, size = GRIDS[name], SLIDE_SIZES[name]
    path = tmp_path / "s_likelihood_map.tif"
    write_asap_heatmap(path, planted(grid), grid=grid, slide_size=size)
    with openslide.OpenSlide(path) as slide:
        assert slide.dimensions == size
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(grid.mpp, rel=1e-5)
        halved = [tuple(-(-side // 2**level) for side in size) for level in range(10)]
        assert list(slide.level_dimensions) == halved and max(halved[-1]) <= 32
        assert slide.level_downsamples[:6] == pytest.approx([1, 2, 4, 8, 16, 32], rel=4e-3)
        x0, y0, x1, y1 = lesion_box(grid)
        left, top = int(x0) - 100, int(y0) - 100
        shown = np.asarray(slide.read_region((left, top), 0, (500, 500)))[..., 0]
        rows, cols = np.nonzero(shown == GREY)
        # The px whose centres lie in the lesion: exact to a px of the slide.
        assert (cols.min() + left, rows.min() + top) == (np.ceil(x0 - 0.5), np.ceil(y0 - 0.5))
        assert (cols.max() + left, rows.max() + top) == (np.ceil(x1 - 1.5), np.ceil(y1 - 1.5))
        # The same place in a coarse level.
        level = 3
        step = 2**level
        coarse = np.asarray(slide.read_region((left, top), level, (60, 60)))[..., 0]
        rows, cols = np.nonzero(coarse == GREY)
        assert abs((cols.mean() + 0.5) * step + left - (x0 + x1) / 2) <= step
        assert abs((rows.mean() + 0.5) * step + top - (y0 + y1) / 2) <= step


def test_what_is_not_predicted_is_black_also_beyond_the_scanned_bounds(tmp_path):
    grid, path = GRIDS["bounds"], tmp_path / "h.tif"
    write_asap_heatmap(path, np.ones(grid.shape), grid=grid, slide_size=(12000, 8000))
    with openslide.OpenSlide(path) as slide:
        corner = np.asarray(slide.read_region((1200, 540), 0, (100, 100)))[..., 0]
    # The first heatmap pixel begins (48 - 32) / 2 * 2 = 16 px after the bounds.
    assert (corner[: 567 + 16 - 540] == 0).all() and (corner[:, : 1234 + 16 - 1200] == 0).all()
    assert (corner[567 + 16 - 540 :, 1234 + 16 - 1200 :] == 255).all()


def test_coarse_levels_hold_the_means_of_what_is_known(tmp_path):
    grid = PatchGrid(Bounds(0, 0, 2048, 1024), 0.5, 1.0, 32, 32, 32)
    values = np.random.default_rng(0).random(grid.shape)
    values[4, 6] = values[:2, :2] = np.nan
    write_asap_heatmap(tmp_path / "h.tif", values, grid=grid, slide_size=(2048, 1024))
    with tifffile.TiffFile(tmp_path / "h.tif") as tiff:
        found = [page.asarray() for page in tiff.pages]
    grey = np.round(255 * np.nan_to_num(values))
    np.testing.assert_array_equal(found[5], grey)  # 32 px of the slide: a heatmap pixel
    means = np.round(255 * values.reshape(16, 2, 32, 2).mean(axis=(1, 3)))
    means[0, 0] = 0
    means[2, 3] = np.round(255 * (values[4, 7] + values[5, 6] + values[5, 7]) / 3)
    np.testing.assert_array_equal(found[6], means)


@pytest.mark.parametrize("size", [(9000, 7000), (90, 20000)])
def test_the_file_keeps_the_rules_of_asaps_own_reader(size, tmp_path):
    grid = PatchGrid(Bounds(0, 0, *size), 0.25, 1.0, 64, 32, 32)
    write_asap_heatmap(tmp_path / "h.tif", np.ones(grid.shape), grid=grid, slide_size=size)
    with tifffile.TiffFile(tmp_path / "h.tif") as tiff:
        widths = [page.imagewidth for page in tiff.pages]
        assert all(page.is_tiled and page.dtype == np.uint8 for page in tiff.pages)
        assert {int(page.compression) for page in tiff.pages} == {32946}  # not 8
        assert {int(page.photometric) for page in tiff.pages} == {1}
        assert not tiff.pages[0].description  # "xml" in it is another format
    assert widths == sorted(set(widths), reverse=True)


def test_a_heatmap_of_another_shape_than_its_grid_is_refused(tmp_path):
    grid = GRIDS["plain"]
    with pytest.raises(RunError, match=r"shape \(3, 4\), its grid \(146, 188\)"):
        write_asap_heatmap(
            tmp_path / "h.tif", np.ones((3, 4)), grid=grid, slide_size=SLIDE_SIZES["plain"]
        )
    assert not list(tmp_path.iterdir())


def test_a_large_slide_takes_little_memory_and_disk(tmp_path):
    grid = PatchGrid(Bounds(0, 0, 60_000, 50_000), 0.25, 1.0, 512, 256, 256)
    values = np.full(grid.shape, np.nan)
    values[40:60, 50:80] = np.random.default_rng(0).random((20, 30))
    tracemalloc.start()
    write_asap_heatmap(tmp_path / "h.tif", values, grid=grid, slide_size=(60_000, 50_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6 and (tmp_path / "h.tif").stat().st_size < 40e6


def ring_and_core(grid):
    """A ring with another region in its hole, and a lower area around all that."""
    values = np.full(grid.shape, 0.1)
    values[2:12, 2:12] = 0.8
    values[4:10, 4:10] = 0.1
    values[6:8, 6:8] = 0.95
    values[20, 20] = np.nan
    return values


@pytest.mark.parametrize("name", GRIDS)
def test_our_reader_reads_the_regions_back_and_takes_no_detection_for_a_lesion(name, tmp_path):
    grid = GRIDS[name]
    regions = [r for t in (0.5, 0.9) for r in heatmap_regions(ring_and_core(grid), grid, t)]
    assert len(regions) == 3
    detections = pd.DataFrame({"probability": [0.95], "x": [100.0], "y": [120.0]})
    write_asap_annotations(tmp_path / "s.xml", regions=regions, detections=detections)
    found = read_annotation(tmp_path / "s.xml", **RULES)
    expected = shapely.union_all([region.polygon for region in regions])
    assert shapely.union_all(found.lesions).symmetric_difference(expected).area < 1e-6
    assert len(found.lesions) == 2


def test_only_holes_with_another_region_in_them_are_cut(tmp_path):
    grid, values = GRIDS["plain"], np.zeros(GRIDS["plain"].shape)
    values[10:90, 10:90] = 0.6
    values[12:90:4, 12:90:4] = 0.0  # 20 x 20 holes of a cell
    values[15:25, 15:25] = np.maximum(values[15:25, 15:25], 0.5)  # nine of them
    regions = [r for t in (0.05, 0.55) for r in heatmap_regions(values, grid, t)]
    write_asap_annotations(tmp_path / "s.xml", regions=regions, detections=NOTHING)
    text = (tmp_path / "s.xml").read_text()
    # Those nine are not holes of the lower threshold: an exclusion would cut its region.
    assert text.count('PartOfGroup="Exclusion"') == 2 * (400 - 9)
    (lesion,) = read_annotation(tmp_path / "s.xml", **RULES).lesions
    assert lesion.symmetric_difference(regions[0].polygon).area < 1e-6


def test_a_region_around_a_thousand_others_is_cut_without_a_loss(tmp_path):
    grid = GRIDS["plain"]
    values = np.full(grid.shape, 0.6)
    values[1:-1:4, 1:-1:4] = 0.5
    low, high = (heatmap_regions(values, grid, threshold)[0] for threshold in (0.5, 0.6))
    assert len(high.polygon.interiors) > 1500
    write_asap_annotations(tmp_path / "s.xml", regions=[low, high], detections=NOTHING)
    root = ElementTree.parse(tmp_path / "s.xml").getroot()
    parts = [
        shapely.Polygon([(float(point.get("X")), float(point.get("Y"))) for point in outline[0]])
        for outline in root.iterfind("Annotations/Annotation[@PartOfGroup='probability >= 0.6']")
    ]
    assert sum(part.area for part in parts) == pytest.approx(high.polygon.area, rel=1e-12)
    assert shapely.union_all(parts).symmetric_difference(high.polygon).area < 1e-3


def test_a_plain_hole_is_an_exclusion_and_cuts_nothing_in_two(tmp_path):
    grid = GRIDS["plain"]
    values = np.where(np.isnan(planted(grid)), np.nan, 0.1)
    values[10:20, 10:20] = 0.8
    values[12:14, 12:14] = 0.1
    (region,) = heatmap_regions(values, grid, 0.5)
    write_asap_annotations(tmp_path / "s.xml", regions=[region], detections=NOTHING)
    text = (tmp_path / "s.xml").read_text()
    assert text.count('Type="Polygon"') == 2 and text.count('PartOfGroup="Exclusion"') == 1
    (lesion,) = read_annotation(tmp_path / "s.xml", **RULES).lesions
    assert lesion.symmetric_difference(region.polygon).area < 1e-6
