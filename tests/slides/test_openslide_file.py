"""Opening a slide's file, and what it states of itself."""

import math
from pathlib import Path

import pytest

from wsi_pipeline.errors import SlideError
from wsi_pipeline.geometry import Bounds
from wsi_pipeline.slides.openslide_file import level0_mpp, open_file, scanned_bounds

PATH = Path("a.tiff")


def stating(mpp_x, mpp_y):
    return {"openslide.mpp-x": str(mpp_x), "openslide.mpp-y": str(mpp_y)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("openslide-python/unopenable.tiff", "Unsupported TIFF compression"),
        ("histolab/kidney-48-5.tif", "not a format that OpenSlide reads.*tiled, pyramidal"),
        ("labels.csv", "no such file"),
        ("README.md", "not a format that OpenSlide reads$"),
    ],
)
def test_what_openslide_cannot_open_is_named(test_data, name, message):
    with pytest.raises(SlideError, match=f"{name.split('/')[-1]}: .*{message}"):
        open_file(test_data / name)


def test_bounds_are_those_stated_or_the_whole_frame():
    stated = {"openslide.bounds-x": "7", "openslide.bounds-y": "0"}
    assert scanned_bounds(stated, (402, 301)) == Bounds(0, 0, 402, 301)
    stated |= {"openslide.bounds-width": "90", "openslide.bounds-height": "80"}
    assert scanned_bounds(stated, (402, 301)) == Bounds(7, 0, 90, 80)


@pytest.mark.parametrize("properties", [{}, {"openslide.mpp-x": "0.25"}])
def test_missing_resolution_is_an_error_that_names_file_and_remedy(properties):
    with pytest.raises(SlideError, match=r"a\.tiff.*mpp column.*catalog\.mpp"):
        level0_mpp(PATH, properties)
    assert level0_mpp(PATH, properties, 0.3) == 0.3


@pytest.mark.parametrize("given", [0, -0.25, math.nan, math.inf])
def test_given_resolution_must_be_positive_and_finite(given):
    with pytest.raises(SlideError, match=r"a\.tiff: mpp is given as"):
        level0_mpp(PATH, stating(0.25, 0.25), given)


def test_resolution_of_a_printer_is_not_taken_for_a_microscopes(test_data):
    path = test_data / "openslide-python/boxes.tiff"  # 72 dpi: 25,400 / 72 um per px
    properties = open_file(path).properties
    with pytest.raises(SlideError, match=r"boxes\.tiff: the slide states 352\.778"):
        level0_mpp(path, properties)
    assert level0_mpp(path, properties, 1) == 1


def test_resolutions_of_x_and_y_a_little_apart_give_their_geometric_mean():
    assert level0_mpp(PATH, stating(0.25, 0.26)) == pytest.approx(math.sqrt(0.25 * 0.26))


def test_resolutions_of_x_and_y_far_apart_are_refused():
    with pytest.raises(SlideError, match=r"0\.25 um per px in x and 0\.27 in y, more than 5%"):
        level0_mpp(PATH, stating(0.25, 0.27))
    assert level0_mpp(PATH, stating(0.25, 0.27), 0.25) == 0.25
