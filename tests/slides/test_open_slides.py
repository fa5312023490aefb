"""Which slides stay open."""

import weakref

import numpy as np
import pytest
from slide_files import write_pyramid_tiff

from wsi_pipeline.errors import SlideError
from wsi_pipeline.slides.open_slides import OPEN_SLIDES, cached_slide


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (301, 402, 3)).astype(np.uint8)


def test_cached_slides_are_reused_and_the_oldest_is_closed(tmp_path, noise):
    paths = [tmp_path / f"{i}.tiff" for i in range(OPEN_SLIDES + 1)]
    for path in paths:
        write_pyramid_tiff(path, [noise], mpp=0.25)
    first = cached_slide(paths[0])
    assert cached_slide(str(paths[0])) is first
    assert cached_slide(paths[0], mpp=0.3) is not first
    handle = weakref.ref(first._file.handle)
    del first
    for path in paths[1:]:
        cached_slide(path)
    assert handle() is None


def test_replaced_file_is_opened_anew(tmp_path, noise):
    path = write_pyramid_tiff(tmp_path / "a.tiff", [noise], mpp=0.25)
    assert cached_slide(path).size == (402, 301)
    write_pyramid_tiff(path, [noise[:200]], mpp=0.25)
    assert cached_slide(path).size == (402, 200)


def test_cached_slide_names_a_missing_file(tmp_path):
    with pytest.raises(SlideError, match=r"nope\.svs"):
        cached_slide(tmp_path / "nope.svs")
