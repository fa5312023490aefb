"""ASAP's files: the TIFF through OpenSlide, the XML through our own reader."""

import tracemalloc

import numpy as np
import openslide
import pandas as pd
import pytest
import shapely
from planted import GRIDS, LESION, SLIDE_SIZES, lesion_box, planted

from wsi_pipeline.config import AnnotationConfig
from wsi_pipeline.export.asap import write_asap_annotations, write_asap_heatmap
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.regions import heatmap_regions
from wsi_pipeline.slides.annotations import read_annotation

RULES = {name: getattr(AnnotationConfig(), name) for name in ("positive", "exclusion", "ignored")}
GREY = round(255 * LESION)


@pytest.mark.parametrize("name", GRIDS)
def test_openslide_opens_the_heatmap_at_the_slides_size_with_the_lesion_in_its_place(
    name, tmp_path
):
    grid, size = GRIDS[name], SLIDE_SIZES[name]
    path = tmp_path / "s_likelihood_map.tif"
    write_asap_heatmap(path, planted(grid), grid=grid, slide_size=size)
    with openslide.OpenSlide(path) as slide:
        assert slide.dimensions == size
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(grid.mpp, rel=1e-6)
        expected = [2**level for level in range(slide.level_count)]
        assert slide.level_downsamples == pytest.approx(expected, rel=2e-3)
        assert max(slide.level_dimensions[-1]) <= 512
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


def test_a_plain_hole_is_an_exclusion_and_cuts_nothing_in_two(tmp_path):
    grid = GRIDS["plain"]
    values = np.where(np.isnan(planted(grid)), np.nan, 0.1)
    values[10:20, 10:20] = 0.8
    values[12:14, 12:14] = 0.1
    (region,) = heatmap_regions(values, grid, 0.5)
    nothing = pd.DataFrame({"probability": [], "x": [], "y": []})
    write_asap_annotations(tmp_path / "s.xml", regions=[region], detections=nothing)
    text = (tmp_path / "s.xml").read_text()
    assert text.count('Type="Polygon"') == 2 and text.count('PartOfGroup="Exclusion"') == 1
    (lesion,) = read_annotation(tmp_path / "s.xml", **RULES).lesions
    assert lesion.symmetric_difference(region.polygon).area < 1e-6
