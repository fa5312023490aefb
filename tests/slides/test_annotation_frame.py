"""Whether an annotation that lies off tissue is told from where it would lie on it."""

from functools import partial

import numpy as np
import pytest
import shapely
from shapely.affinity import affine_transform
from slide_files import write_mrxs, write_pyramid_tiff

from wsi_pipeline.geometry import Bounds
from wsi_pipeline.slides.annotation_frame import (
    better_ways,
    share_on_tissue,
    share_scanned,
)
from wsi_pipeline.slides.annotation_origin import file_to_level0
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.tissue import TissueMask

LESION = shapely.box(420, 110, 520, 180)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """600 x 400 px at 0.25 um, a second level of half the size."""
    pixels = np.full((400, 600, 3), 200, np.uint8)
    path = tmp_path_factory.mktemp("s") / "s.tif"
    write_pyramid_tiff(path, [pixels, pixels[::2, ::2]], mpp=0.25)
    with Slide(path) as opened:
        yield opened


@pytest.fixture
def mask():
    """Tissue at x 400 to 540, y 100 to 190, in mask pixels of 10."""
    tissue = np.zeros((40, 60), bool)
    tissue[10:19, 40:54] = True
    return TissueMask(tissue, Bounds(0, 0, 600, 400), 10.0)


@pytest.mark.parametrize(
    ("to_file", "way"),
    [
        ((1, 0, 0, 1, 0, 0), "catalog.annotation.origin: slide, scale: 1"),
        ((0.5, 0, 0, 0.5, 0, 0), "catalog.annotation.origin: slide, scale: 2"),
        ((0.25, 0, 0, 0.25, 0, 0), "catalog.annotation.origin: slide, scale: um"),
        ((1, 0, 0, -1, 0, 400), "catalog.annotation.origin: lower left, scale: 1"),
        ((0, 1, 1, 0, 0, 0), "x and y exchanged in the file"),
        ((-1, 0, 0, 1, 600, 0), "the file mirrored, left for right"),
    ],
)
def test_the_way_to_read_a_file_is_found_from_where_tissue_is(slide, mask, to_file, way):
    drawn = affine_transform(LESION, to_file)
    assert better_ways(drawn, slide, partial(share_on_tissue, mask=mask)) == {way: 1.0}


def test_another_slides_file_fits_in_no_way(slide, mask):
    drawn = shapely.box(20, 300, 60, 330)
    assert better_ways(drawn, slide, partial(share_on_tissue, mask=mask)) == {}


def test_the_bounds_of_a_slide_are_tried_where_it_has_any(tmp_path):
    pixels = np.full((300, 400, 3), 200, np.uint8)
    with Slide(write_mrxs(tmp_path / "a.mrxs", pixels, bounds_x=500, bounds_y=700)) as slide:
        x, y = slide.bounds.x, slide.bounds.y
        assert (x, y) != (0, 0)
        frame = {"bounds": slide.bounds, "size": slide.size}
        assert file_to_level0("bounds", 1.0, **frame) == (1, 0, 0, 1, x, y)
        scanned = partial(share_scanned, slide=slide)
        from_bounds, from_frame = shapely.box(10, 10, 60, 60), shapely.box(x, y, x + 9, y + 9)
        assert "catalog.annotation.origin: bounds, scale: 1" in better_ways(
            from_bounds, slide, scanned
        )
        assert "catalog.annotation.origin: slide, scale: 1" in better_ways(
            from_frame, slide, scanned
        )


def test_the_share_on_tissue_is_that_of_the_area(mask):
    assert share_on_tissue(shapely.box(300, 100, 500, 180), mask) == pytest.approx(0.5)
    apart = shapely.MultiPolygon([shapely.box(420, 110, 450, 140), shapely.box(0, 0, 30, 30)])
    assert share_on_tissue(apart, mask) == pytest.approx(0.5)
    assert share_on_tissue(shapely.box(402, 102, 403, 103), mask) == 1  # within a mask pixel
    assert share_on_tissue(shapely.box(900, 100, 950, 150), mask) == 0
    assert share_on_tissue(shapely.MultiPolygon(), mask) == 0


def test_a_sliver_between_the_points_counts_by_one_within_it(mask):
    sliver = shapely.Polygon([(410, 110), (530, 185), (530.5, 185)])
    assert share_on_tissue(sliver, mask) == 1
