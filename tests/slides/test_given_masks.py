"""Tissue masks made elsewhere, read onto the pipeline's grid."""

import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from wsi_pipeline.errors import MaskError
from wsi_pipeline.geometry import Bounds
from wsi_pipeline.slides.given_masks import MaskGrid, read_mask

WHOLE = MaskGrid(Bounds(0, 0, 4000, 2000), (4000, 2000), 20.0, (200, 100))
# The scanned part is 2000 x 1500 px at (1000, 300) of the frame.
PART = MaskGrid(Bounds(1000, 300, 2000, 1500), (4000, 2000), 20.0, (100, 75))


def write_image(path, array):
    if path.suffix == ".png":
        Image.fromarray(array).save(path)
    else:
        tifffile.imwrite(path, array)
    return path


def box(width, height, x0, y0, x1, y1, value=255):
    """A mask of a size with a box at places given as shares of it."""
    mask = np.zeros((height, width), np.uint8)
    mask[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = value
    return mask


def write_geojson(path, *rings, name="Tissue"):
    """One feature; the first ring is the outer one."""
    feature = {
        "type": "Feature",
        "properties": {"classification": {"name": name}},
        "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]] for ring in rings]},
    }
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    return path


def square(x0, y0, x1, y1):
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("width", [40, 200, 800, 4000])
def test_an_image_at_any_scale_covers_the_frame(tmp_path, suffix, width):
    array = box(width, width // 2, 0.25, 0.1, 0.75, 0.5)
    mask, notes = read_mask(write_image(tmp_path / f"m{suffix}", array), WHOLE)
    expected = np.zeros((100, 200), bool)
    expected[10:50, 50:150] = True
    assert np.array_equal(mask, expected) and notes == ()


def test_pixels_of_the_grid_are_in_where_at_least_half_of_them_is(tmp_path):
    """Each pixel of the grid is 4 x 4 of the image's."""
    array = np.zeros((400, 800), np.uint8)
    array[0:4, 0:2] = 1  # half of the first pixel
    array[0:4, 4:5] = 1  # a quarter of the second
    mask, _ = read_mask(write_image(tmp_path / "m.png", array), WHOLE)
    assert np.argwhere(mask).tolist() == [[0, 0]]


def test_sizes_may_be_rounded_up_or_down(tmp_path):
    """4000 x 2000 px at a downsample of 28.96: 138.1 x 69.06 px."""
    for width, height in ((138, 69), (139, 70), (138, 70), (139, 69)):
        array = box(width, height, 0, 0, 1, 0.5)
        mask, _ = read_mask(write_image(tmp_path / "m.png", array), WHOLE)
        assert mask[:48].all() and not mask[52:].any()


def test_an_image_of_the_scanned_bounds_is_told_by_its_aspect_ratio(tmp_path):
    """The box is the left half of the bounds; in the frame, it is from x = 1000 to 2000."""
    of_bounds = write_image(tmp_path / "b.png", box(400, 300, 0, 0, 0.5, 1))
    of_frame = write_image(tmp_path / "f.png", box(800, 400, 0.25, 0, 0.5, 1))
    expected = np.zeros((75, 100), bool)
    expected[:, :50] = True
    for path in (of_bounds, of_frame):
        mask, notes = read_mask(path, PART)
        assert np.array_equal(mask, expected) and notes == ()


def test_an_image_that_fits_frame_and_bounds_is_of_the_frame_and_noted(tmp_path):
    grid = MaskGrid(Bounds(1000, 500, 2000, 1000), (4000, 2000), 20.0, (100, 50))
    path = write_image(tmp_path / "m.png", box(400, 200, 0.25, 0, 0.5, 1))
    mask, (note,) = read_mask(path, grid)
    assert mask[:, :50].all() and not mask[:, 50:].any()
    assert note == (
        "m.png fits the slide's frame (4000 x 2000 px) and its scanned bounds (2000 x 1000 px):"
        " it was read as the frame"
    )


def test_an_image_of_another_aspect_ratio_is_refused_with_the_sizes(tmp_path):
    path = write_image(tmp_path / "m.png", np.zeros((300, 500), np.uint8))
    with pytest.raises(MaskError, match=r"m\.png: the mask has 500 x 300 px.* 4000 x 2000 px\."):
        read_mask(path, WHOLE)
    with pytest.raises(MaskError, match=r"4000 x 2000 px nor .* scanned bounds, 2000 x 1500 px\."):
        read_mask(path, PART)


def test_transposed_images_are_refused(tmp_path):
    path = write_image(tmp_path / "m.png", np.zeros((400, 200), np.uint8))
    with pytest.raises(MaskError, match="200 x 400"):
        read_mask(path, WHOLE)


def test_values_say_which_classes_count(tmp_path):
    """GrandQC: 0 is tissue and 1 background in its tissue masks."""
    path = write_image(tmp_path / "m.png", 1 - box(200, 100, 0, 0, 0.5, 1, value=1))
    mask, _ = read_mask(path, WHOLE, values=[0])
    assert mask[:, :100].all() and not mask[:, 100:].any()
    inverse, _ = read_mask(path, WHOLE)
    assert np.array_equal(inverse, ~mask)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.int32])
def test_pixel_types_of_tiff_masks(tmp_path, dtype):
    path = write_image(tmp_path / "m.tif", box(200, 100, 0, 0, 0.5, 1, value=1).astype(dtype))
    mask, _ = read_mask(path, WHOLE)
    assert mask[:, :100].all() and not mask[:, 100:].any()


def test_grey_in_three_channels_is_a_mask_and_colours_are_not(tmp_path):
    grey = np.repeat(box(200, 100, 0, 0, 0.5, 1)[..., None], 3, axis=2)
    mask, _ = read_mask(write_image(tmp_path / "m.png", grey), WHOLE)
    assert mask[:, :100].all() and not mask[:, 100:].any()
    grey[..., 0] = 50
    with pytest.raises(MaskError, match="is coloured"):
        read_mask(write_image(tmp_path / "c.png", grey), WHOLE)


def test_a_pyramid_is_read_at_the_level_next_finer_than_the_grid(tmp_path):
    """A level coarser than the grid would blur it; the finest here is wrong on purpose."""
    path = tmp_path / "m.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(np.zeros((800, 1600), np.uint8), tile=(256, 256), subifds=2)
        for width in (400, 100):
            level = box(width, width // 2, 0, 0, 0.5, 1)
            file.write(level, tile=(64, 64), subfiletype=1)
    mask, _ = read_mask(path, WHOLE)
    assert mask[:, :100].all() and not mask[:, 100:].any()


@pytest.mark.parametrize("name", ["m.png", "m.tif", "m.geojson"])
def test_what_cannot_be_read_names_the_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00nothing")
    for path in (tmp_path / name, tmp_path / f"missing_{name}"):
        with pytest.raises(MaskError, match=path.name):
            read_mask(path, WHOLE)


# Polygons


def test_polygons_count_whatever_their_class_and_holes_do_not(tmp_path):
    outer, hole = square(1000, 200, 3000, 1000), square(2000, 400, 2400, 800)
    path = write_geojson(tmp_path / "m.geojson", outer, hole, name="anything")
    mask, _ = read_mask(path, WHOLE)
    expected = np.zeros((100, 200), bool)
    expected[10:50, 50:150] = True
    expected[20:40, 100:120] = False
    assert np.array_equal(mask, expected)


def test_geojson_counts_from_the_bounds_or_from_the_frame_as_it_is_told(tmp_path):
    path = write_geojson(tmp_path / "m.geojson", square(1000, 300, 2000, 1700))
    from_frame, _ = read_mask(path, PART, origin="slide")
    assert from_frame[:70, :50].all() and not from_frame[:, 50:].any()
    from_bounds, _ = read_mask(path, PART)
    assert from_bounds[15:, 50:].all() and not from_bounds[:, :50].any()


def test_polygons_off_the_frame_are_refused_with_frame_and_reach(tmp_path):
    path = write_geojson(tmp_path / "m.geojson", square(3000, 0, 5000, 1000))
    with pytest.raises(MaskError, match=r"50% .*4000 x 2000 px.*\(3000, 0\) to \(5000, 1000\)"):
        read_mask(path, WHOLE)
    a_little = write_geojson(tmp_path / "n.geojson", square(3000, 0, 4004, 1000))
    assert read_mask(a_little, WHOLE)[0].any()


def test_a_file_without_areas_is_refused(tmp_path):
    path = tmp_path / "m.geojson"
    path.write_text('{"type": "Point", "coordinates": [1, 2]}')
    with pytest.raises(MaskError, match="holds no polygon"):
        read_mask(path, WHOLE)
