"""Pictures of places on a real file, by hand."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from slide_files import write_pyramid_tiff

from wsi_pipeline.config import AnnotationConfig
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.store import create_heatmap, finish_heatmap
from wsi_pipeline.stages.lesion_pictures import _picture_square, picture_units, read_pictures

GRID = PatchGrid(Bounds(0, 0, 512, 512), 0.5, 1.0, 64, 32, 32)


@pytest.fixture
def units(tmp_path):
    """Of a grey slide with one lesion and two false positives, and of one without any."""
    pixels = np.full((512, 512, 3), 150, np.uint8)
    pixels[200:300, 200:300] = (200, 60, 120)
    path = write_pyramid_tiff(tmp_path / "a.tif", [pixels], tile=64)
    create_heatmap(tmp_path / "a.zarr", grid=GRID, slide_id="a", model="m@1")
    finish_heatmap(tmp_path / "a.zarr")
    slides = pd.DataFrame(
        {"slide_id": ["a", "b"], "path": str(path), "mpp": 0.5, "annotation": None}
    ).astype({"annotation": object})
    slides["annotation"] = None
    lesions = pd.DataFrame(
        [("a", 3, 200.0, 200.0, 300.0, 300.0)],
        columns=["slide_id", "lesion_id", "x0", "y0", "x1", "y1"],
    )
    wrong = pd.DataFrame({"slide_id": ["a", "a"], "x": [10.0, 250.0], "y": [10.0, 250.0]})
    rules = AnnotationConfig(positive=("Tumor",), exclusion=(), origin="slide")
    return (
        list(picture_units(slides, lesions, wrong, tmp_path, tmp_path / "gallery", rules)),
        lesions,
        wrong,
    )


def test_a_unit_draws_all_places_of_its_slide(units, tmp_path):
    [unit], lesions, wrong = units
    assert unit.slide_id == "a"
    assert unit.run() == {"pictures": 3}
    of_lesions = read_pictures(tmp_path / "gallery", "lesion", lesions, "lesion_id")
    of_wrong = read_pictures(tmp_path / "gallery", "false-positive", wrong)
    assert list(of_lesions) == [("a", 3)]
    assert list(of_wrong) == [0, 1]
    pixels = np.asarray(Image.open(io.BytesIO(of_lesions["a", 3])).convert("RGB")).astype(int)
    reddish = (pixels[..., 0] - pixels[..., 1] > 80).mean()
    assert reddish > 0.05  # the lesion's colour fills a part of both panels


def test_pictures_that_could_not_be_drawn_are_left_out(units, tmp_path):
    _, lesions, wrong = units
    assert read_pictures(tmp_path / "gallery", "lesion", lesions, "lesion_id") == {}
    assert read_pictures(tmp_path / "gallery", "false-positive", wrong) == {}


def test_a_place_is_a_picture_square_it():
    assert _picture_square([100, 200, 300, 250], least=64) == Bounds(40, 65, 320, 320)  # 1.6 x 200
    assert _picture_square([100, 200, 100, 200], least=64) == Bounds(68, 168, 64, 64)
