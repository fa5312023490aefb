import numpy as np
import openslide
import pytest
import shapely
import tifffile
from hypothesis import example, given, settings
from hypothesis import strategies as st
from slide_files import write_pyramid_tiff

from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.lesion_pixels import raster_downsample, rasterise, read_mask

# --- polygons to pixels -------------------------------------------------------------------------


def test_the_mask_pixel_is_that_of_the_organisers():
    assert raster_downsample(0.243) == 32
    assert raster_downsample(0.486) == 16
    assert raster_downsample(10) == 1


def test_a_mask_covers_the_whole_slide():
    assert rasterise([], (100_000, 220_000), 32).shape == (6875, 3125)
    assert rasterise([], (33, 32), 32).shape == (1, 2)
    assert rasterise([], (3200, 3201), 0.243 * 32 / 0.25).shape == (103, 103)


@given(
    st.lists(st.tuples(st.floats(0, 90), st.floats(0, 60)), min_size=3, max_size=8),
    st.sampled_from([1, 3, 7.776, 31.1]),
)
@example([(31.0, 21.0)] * 3, 1)  # all of it cut away
@settings(max_examples=40)
def test_a_pixel_is_lesion_iff_its_centre_is_inside(points, downsample):
    tumour = shapely.MultiPoint(points).convex_hull.buffer(0.1)
    lesions = [
        part
        for part in shapely.get_parts(tumour.difference(shapely.box(30, 20, 45.3, 40.7)))
        if part.geom_type == "Polygon" and not part.is_empty
    ]
    mask = rasterise(lesions, (91, 61), downsample)
    for row, col in np.ndindex(mask.shape):
        centre = shapely.Point((col + 0.5) * downsample, (row + 0.5) * downsample)
        assert mask[row, col] == any(lesion.contains(centre) for lesion in lesions)


def test_a_lesion_too_thin_for_a_pixel_centre_is_kept_where_asked():
    lesions = [shapely.box(100, 100, 101, 120), shapely.box(320, 320, 640, 640)]
    assert rasterise(lesions, (1000, 1000), 32).sum() == 100
    mask = rasterise(lesions, (1000, 1000), 32, keep_thin=True)
    assert mask.sum() == 101
    assert mask[110 // 32, 100 // 32]


def test_a_lesion_off_the_slide_is_refused():
    with pytest.raises(RunError, match="a lesion at level-0 px x 2000, y 0 lies off"):
        rasterise([shapely.box(2000, 0, 2100, 100)], (1000, 1000), 32)


# --- the challenge's mask files -----------------------------------------------------------------


def grey(mask, value=255):
    return np.repeat(mask.astype(np.uint8)[..., np.newaxis] * np.uint8(value), 3, axis=-1)


def enlarged(mask, times):
    return np.kron(mask, np.ones((times, times), bool))


def test_the_level_of_a_pyramid_is_read_as_openslide_reads_it(tmp_path):
    mask = np.random.default_rng(0).random((20, 30)) < 0.3
    levels = [grey(enlarged(mask, 2 ** (5 - level))) for level in range(6)]
    levels[5][0, 0] = 254  # not lesion to the script
    path = write_pyramid_tiff(tmp_path / "mask.tif", levels, tile=16, compression="zlib")
    found = read_mask(path)
    with openslide.OpenSlide(path) as slide:
        pixels = np.array(slide.read_region((0, 0), 5, slide.level_dimensions[5]))
    assert np.array_equal(found, pixels[:, :, 0] == 255)
    assert found.sum() > 100 and not found[0, 0]


def test_a_level_that_is_not_stored_is_sampled_from_a_finer_one(tmp_path):
    mask = np.random.default_rng(1).random((13, 9)) < 0.5
    fine = enlarged(mask, 32)[:-3, :-20]  # the last row and column are cut short
    tifffile.imwrite(tmp_path / "plain.tif", fine.astype(np.uint8), rowsperstrip=50)
    assert np.array_equal(read_mask(tmp_path / "plain.tif"), mask)
    levels = [grey(enlarged(mask, 32)), grey(enlarged(mask, 8)), grey(enlarged(~mask, 1))[:, :-2]]
    write_pyramid_tiff(tmp_path / "some.tif", levels, tile=64, compression="zlib")
    assert np.array_equal(read_mask(tmp_path / "some.tif"), mask)
    assert np.array_equal(read_mask(tmp_path / "some.tif", level=2), enlarged(mask, 8))


def test_masks_of_0_and_1_and_empty_ones_are_read(tmp_path):
    mask = np.random.default_rng(2).random((64, 64)) < 0.5
    tifffile.imwrite(tmp_path / "ones.tif", mask.astype(np.uint8))
    assert np.array_equal(read_mask(tmp_path / "ones.tif", level=0), mask)
    tifffile.imwrite(tmp_path / "bits.tif", mask)
    assert np.array_equal(read_mask(tmp_path / "bits.tif", level=0), mask)
    tifffile.imwrite(tmp_path / "empty.tif", np.zeros((64, 64), np.uint8))
    assert not read_mask(tmp_path / "empty.tif").any()


def test_masks_that_cannot_be_read_are_refused_by_name(tmp_path):
    tifffile.imwrite(tmp_path / "classes.tif", np.array([[0, 1, 2]], np.uint8))
    with pytest.raises(RunError, match=r"classes\.tif: its largest value is 2"):
        read_mask(tmp_path / "classes.tif", level=0)
    (tmp_path / "text.tif").write_text("no TIFF")
    with pytest.raises(RunError, match=r"text\.tif: cannot be read as a mask"):
        read_mask(tmp_path / "text.tif")
    path = tmp_path / "damaged.tif"
    tifffile.imwrite(path, np.ones((64, 64), np.uint8), tile=(32, 32), compression="zlib")
    with tifffile.TiffFile(path) as file:
        offset = file.pages.first.dataoffsets[2]
    path.write_bytes(path.read_bytes()[:offset] + b"not zlib" + path.read_bytes()[offset + 8 :])
    with pytest.raises(RunError, match=r"damaged\.tif: cannot be read as a mask"):
        read_mask(path, level=0)
    with pytest.raises(RunError, match=r"none\.tif: cannot be read as a mask"):
        read_mask(tmp_path / "none.tif")
