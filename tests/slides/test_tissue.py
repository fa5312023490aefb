"""Tissue masks."""

import warnings

import numpy as np
import pytest
import shapely
from PIL import Image
from slide_files import damage_tile, write_mrxs, write_pyramid_tiff

from wsi_pipeline.errors import SlideReadError
from wsi_pipeline.geometry import Bounds
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.tissue import GivenMasks, TissueMask, tissue_mask

SETTINGS = {
    "mpp": 8.0,
    "min_chroma": 0.045,
    "drop_ink": True,
    "closing_um": 24.0,
    "min_area_um2": 10_000.0,
    "max_hole_um2": 40_000.0,
}
PINK, GLASS = (200, 100, 150), (242, 240, 243)


def slide_of(tmp_path, pixels, mpp=4.0):
    path = tmp_path / "slide.tiff"
    return Slide(write_pyramid_tiff(path, [pixels], mpp=mpp, compression=None))


def glass(height, width):
    noise = np.random.default_rng(0).normal(0, 1.5, (height, width, 3))
    return np.clip(np.array(GLASS) + noise, 0, 255).round().astype(np.uint8)


# fraction


def test_fraction_equals_the_overlap_of_polygons():
    random = np.random.default_rng(1)
    mask = random.random((11, 14)) < 0.4
    tissue = TissueMask(mask, Bounds(30, -20, 14 * 7, 11 * 7), downsample=6.5)
    rows, cols = np.nonzero(mask)
    x, y = 30 + cols * 6.5, -20 + rows * 6.5
    area = shapely.union_all(shapely.box(x, y, x + 6.5, y + 6.5))
    corners = random.uniform((10, -40), (110, 40), (200, 2))
    boxes = np.hstack([corners, corners + random.uniform(0.5, 60, (200, 2))])
    squares = shapely.box(*boxes.T)
    expected = shapely.area(shapely.intersection(squares, area)) / shapely.area(squares)
    assert tissue.fraction(boxes) == pytest.approx(expected, abs=1e-9)
    assert expected.min() == 0 and expected.max() > 0.6


def test_fraction_by_hand():
    tissue = TissueMask(np.array([[True, False], [True, True]]), Bounds(0, 0, 20, 20), 10.0)
    boxes = [
        (0, 0, 20, 20),  # 3 of 4 pixels
        (5, 0, 15, 10),  # half of one, half of none
        (15, 5, 25, 15),  # a quarter of the box lies in the last pixel, half outside
        (-10, -10, 10, 10),  # a quarter of the box
        (30, 30, 40, 40),  # outside
    ]
    assert tissue.fraction(boxes).tolist() == [0.75, 0.5, 0.25, 0.25, 0]
    assert tissue.fraction(np.empty((0, 4))).shape == (0,)


def test_fraction_of_rows_of_boxes_is_that_of_each_box():
    mask = np.random.default_rng(2).random((11, 14)) < 0.4
    tissue = TissueMask(mask, Bounds(30, -20, 14 * 7, 11 * 7), downsample=6.5)
    y, x = np.mgrid[-50:90:7.3, 0:150:11.1].reshape(2, -1)  # from beyond the mask to beyond it
    boxes = np.stack([x, y, x + 20, y + np.where(x < 60, 9, 15)], axis=1)
    shares = tissue.fraction(boxes)
    assert shares.tolist() == [tissue.fraction([box])[0] for box in boxes]
    assert 0 == shares.min() < shares.max()


# tissue_mask


def test_finds_a_painted_piece_where_it_is(tmp_path):
    pixels = glass(600, 800)
    pixels[200:400, 300:500] = PINK
    tissue = tissue_mask(slide_of(tmp_path, pixels), **SETTINGS)
    assert (tissue.mask.shape, tissue.downsample) == ((300, 400), pytest.approx(2))
    assert tissue.bounds == Bounds(0, 0, 800, 600)
    inside, around = (304, 204, 496, 396), (280, 180, 520, 420)
    assert tissue.fraction([inside]) == 1
    assert tissue.fraction([around]) == pytest.approx(200**2 / 240**2, rel=0.05)
    assert tissue.mask.sum() == pytest.approx(100**2, rel=0.05)


def test_counts_from_the_bounds_of_a_slide_that_has_them(tmp_path):
    pixels = glass(300, 400)
    pixels[100:200, 100:300] = PINK
    slide = Slide(write_mrxs(tmp_path / "a.mrxs", pixels, bounds_x=300, bounds_y=100, mpp=4.0))
    tissue = tissue_mask(slide, **SETTINGS)
    assert tissue.bounds == Bounds(300, 100, 400, 300)
    assert tissue.mask.shape == (150, 200)
    assert tissue.fraction([(404, 204, 596, 296), (300, 100, 390, 400)]).tolist() == [1, 0]


def test_small_pieces_go_and_small_holes_are_filled(tmp_path):
    """At 4 um per px, 10 000 um2 are 25 x 25 px and 40 000 um2 are 50 x 50 px."""
    pixels = glass(600, 800)
    pixels[100:500, 100:500] = PINK
    pixels[130:170, 130:170] = GLASS
    pixels[300:380, 300:380] = GLASS
    pixels[50:66, 700:716] = PINK
    pixels[400:440, 700:740] = PINK
    tissue = tissue_mask(slide_of(tmp_path, pixels), **SETTINGS | {"closing_um": 0})
    small_hole, hole = (140, 140, 160, 160), (310, 310, 370, 370)
    small_piece, piece = (680, 30, 736, 86), (705, 405, 735, 435)
    assert tissue.fraction([small_hole, hole, small_piece, piece]).tolist() == [1, 0, 0, 1]


def test_closing_joins_pieces_nearer_than_its_diameter(tmp_path):
    pixels = glass(600, 800)
    pixels[100:500, 100:200] = PINK
    pixels[100:500, 208:300] = PINK
    pixels[100:500, 340:440] = PINK
    gap, wide_gap = (200, 150, 208, 450), (304, 150, 336, 450)
    slide = slide_of(tmp_path, pixels)
    assert tissue_mask(slide, **SETTINGS).fraction([gap, wide_gap]).tolist() == [1, 0]
    open_gap = tissue_mask(slide, **SETTINGS | {"closing_um": 0}).fraction([gap])
    assert open_gap < 0.5


def test_tissue_at_the_edge_reaches_the_edge(tmp_path):
    pixels = glass(600, 800)
    pixels[:200, :200] = PINK
    tissue = tissue_mask(slide_of(tmp_path, pixels), **SETTINGS | {"closing_um": 100})
    assert tissue.fraction([(0, 0, 190, 190)]) == 1


@pytest.mark.parametrize("kind", ["white", "glass"])
def test_an_empty_slide_has_no_tissue(tmp_path, kind):
    pixels = glass(600, 800) if kind == "glass" else np.full((600, 800, 3), 255, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not tissue_mask(slide_of(tmp_path, pixels), **SETTINGS).mask.any()


def test_a_slide_full_of_tissue_is_not_cut_in_two(tmp_path):
    """Half pale, half deep pink: the pale half is not the glass."""
    pixels = np.full((600, 800, 3), (230, 190, 210), np.uint8)
    pixels[:, 400:] = (180, 60, 120)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tissue_mask(slide_of(tmp_path, pixels), **SETTINGS).mask.all()


def test_a_slide_coarser_than_the_mask_is_masked_at_level_0(tmp_path):
    pixels = glass(300, 200)
    pixels[100:200, 50:150] = PINK
    tissue = tissue_mask(slide_of(tmp_path, pixels, mpp=29.0), **SETTINGS)
    assert (tissue.mask.shape, tissue.downsample) == ((300, 200), 1)
    assert tissue.mask.sum() == pytest.approx(100**2, rel=0.02)


# What a person should check, and masks made elsewhere


def test_nothing_or_nearly_everything_is_a_note(tmp_path):
    check = "check tile.tissue.min_chroma"
    empty = tissue_mask(slide_of(tmp_path, glass(600, 800)), **SETTINGS)
    assert empty.notes == (f"nothing is tissue: {check}",)
    full = tissue_mask(slide_of(tmp_path, np.full((600, 800, 3), PINK, np.uint8)), **SETTINGS)
    assert full.notes == (f"100% of the imaged area is tissue: {check}",)


def test_nearly_everything_is_of_what_was_imaged(tmp_path):
    """A tenth of the frame was scanned, all of it tissue."""
    pixels = np.full((600, 800, 3), 255, np.uint8)
    pixels[:, :80] = PINK
    (note,) = tissue_mask(slide_of(tmp_path, pixels), **SETTINGS).notes
    assert note.startswith("98% of the imaged area")  # the px at the edge is half white


def test_a_slide_with_tissue_and_glass_has_no_note(tmp_path):
    pixels = glass(600, 800)
    pixels[:, :700] = PINK
    assert tissue_mask(slide_of(tmp_path, pixels), **SETTINGS).notes == ()


def test_much_ink_is_a_note_that_names_the_setting(tmp_path):
    pixels = glass(600, 800)
    pixels[100:400, 100:400] = (60, 110, 180)
    pixels[100:400, 500:700] = PINK
    slide = slide_of(tmp_path, pixels)
    (note,) = tissue_mask(slide, **SETTINGS).notes
    assert "blue or green ink" in note and "tile.tissue.drop_ink" in note
    stained = tissue_mask(slide, **SETTINGS | {"drop_ink": False})
    assert stained.notes == () and stained.fraction([(110, 110, 390, 390)]) == 1


def test_a_given_mask_replaces_ours_and_excluded_parts_are_taken_out(tmp_path):
    pixels = glass(600, 800)
    pixels[200:400, 300:500] = PINK
    slide = slide_of(tmp_path, pixels)
    tissue, exclude = np.zeros((2, 60, 80), np.uint8)
    tissue[:, :40], exclude[:30] = 255, 255
    given = []
    for name, mask in (("tissue", tissue), ("exclude", exclude)):
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
        given.append(str(tmp_path / f"{name}.png"))
    boxes = [(10, 10, 390, 290), (10, 310, 390, 590), (310, 210, 490, 290), (410, 310, 490, 390)]
    for masks, expected in (
        (GivenMasks(given[0], None), [1, 1, 0.5, 0]),
        (GivenMasks(None, given[1]), [0, 0.06, 0, 1]),
        (GivenMasks(*given), [0, 1, 0, 0]),
    ):
        found = tissue_mask(slide, **SETTINGS, given=masks).fraction(boxes)
        assert found == pytest.approx(expected, abs=0.02)


def test_a_note_on_a_given_mask_names_the_mask(tmp_path):
    Image.fromarray(np.zeros((60, 80), np.uint8)).save(tmp_path / "empty.png")
    given = GivenMasks(str(tmp_path / "empty.png"))
    tissue = tissue_mask(slide_of(tmp_path, glass(600, 800)), **SETTINGS, given=given)
    assert tissue.notes == ("nothing is tissue: check the given mask",)


# What cannot be decoded.


def damaged_slide(tmp_path, *tiles):
    """Tissue everywhere, in 4 x 4 tiles of 256 px that are 256 px of the mask."""
    path = tmp_path / "damaged.tiff"
    write_pyramid_tiff(path, [np.full((1024, 1024, 3), PINK, np.uint8)], tile=256, mpp=8.0)
    for tile in tiles:
        damage_tile(path, tile)
    return Slide(path)


def test_what_cannot_be_decoded_counts_as_no_tissue_and_is_told(tmp_path):
    """Not even where holes of its size are filled."""
    settings = SETTINGS | {"max_hole_um2": 1e9}
    tissue = tissue_mask(damaged_slide(tmp_path, 5), **settings)
    expected = np.ones((1024, 1024), bool)
    expected[256:512, 256:512] = False  # the second tile of the second row
    assert np.array_equal(tissue.mask, expected)
    assert np.array_equal((tissue.pixels == 255).all(-1), ~expected)
    assert len(tissue.unread) == 16  # of each block of 64 px over it
    for reason in tissue.unread:
        assert "damaged.tiff: the region at level-0 px (" in reason
        assert "cannot be decoded" in reason


def test_of_a_whole_slide_nothing_is_lost(tmp_path):
    tissue = tissue_mask(damaged_slide(tmp_path), **SETTINGS)
    assert tissue.mask.all() and tissue.unread == ()


def test_a_slide_of_which_nothing_can_be_decoded_is_an_error(tmp_path):
    with pytest.raises(SlideReadError, match=r"damaged\.tiff"):
        tissue_mask(damaged_slide(tmp_path, *range(16)), **SETTINGS)


# Real slides. Pictures of these masks were looked at.


def test_agrees_with_histolab_on_a_real_slide(test_data):
    slide = Slide(test_data / "libvips/CMU-1-Small-Region.svs")
    tissue = tissue_mask(slide, **SETTINGS)

    # histolab dilates its mask: it holds ours and is larger.
    theirs = np.load(test_data / "histolab/tissue-mask-cmu-1-small-region.npy")
    rows, cols = np.indices(theirs.shape).reshape(2, -1)
    side_x, side_y = 2220 / theirs.shape[1], 2967 / theirs.shape[0]
    corners = [cols * side_x, rows * side_y, (cols + 1) * side_x, (rows + 1) * side_y]
    ours = tissue.fraction(np.stack(corners, -1)).reshape(theirs.shape) > 0.5
    assert (ours & theirs).sum() > 0.99 * ours.sum()
    assert (ours & theirs).sum() > 0.75 * (ours | theirs).sum()


def test_finds_the_five_fragments_of_a_nearly_empty_slide(test_data):
    tissue = tissue_mask(Slide(test_data / "luna/1065626.svs"), **SETTINGS)
    assert 0.002 < tissue.mask.mean() < 0.01
    fragments = [(4800, 6250, 5150, 6550), (5230, 6400, 5480, 6700), (4280, 6700, 4500, 7050)]
    fragments += [(7250, 6850, 7650, 7150), (7850, 6950, 8500, 7600)]
    empty = [(0, 0, 2500, 10000), (5000, 0, 11900, 6000), (0, 8000, 11900, 10200)]
    assert (tissue.fraction(fragments) > 0.25).all()
    assert (tissue.fraction(empty) == 0).all()


def test_finds_lymph_nodes_and_the_strands_in_the_fat_around_them(test_data):
    """Vessels and strands of the fat are tissue; its empty cells are too pale at 29 um per px."""
    folder = test_data / "google-medical-imaging"
    tissue = tissue_mask(
        Slide(folder / "multi_frame_jpeg_camelyon_challenge_image.dcm"), **SETTINGS
    )
    nodes = [(110, 130, 200, 560), (690, 140, 760, 600), (430, 190, 480, 300)]
    vessels = [(284, 505, 298, 525), (320, 208, 332, 216), (316, 514, 324, 524)]
    fat = [(270, 150, 340, 420), (830, 350, 880, 600)]
    glass_and_dust = [
        (0, 0, 50, 700),
        (455, 445, 490, 480),
        (515, 295, 540, 320),
        (375, 0, 390, 20),
    ]
    assert (tissue.fraction(nodes) > 0.9).all()
    assert (tissue.fraction(vessels) > 0.8).all()
    assert ((tissue.fraction(fat) > 0.1) & (tissue.fraction(fat) < 0.4)).all()
    assert (tissue.fraction(glass_and_dust) == 0).all()


@pytest.mark.parametrize("name", ["slide", "slide2", "plain"])
def test_a_frame_of_any_black_neither_counts_nor_hides_the_tissue(test_data, name):
    """Tissue is a disk of 255 px around (384, 511); the frame is right of x = 900."""
    slide = Slide(test_data / f"cases/dark_frame_is_tissue/{name}.tif")
    tissue = tissue_mask(slide, **SETTINGS)
    assert tissue.fraction([(880, 0, 1024, 768)]) == 0
    plain = tissue_mask(Slide(slide.path.with_name("plain.tif")), **SETTINGS)
    assert np.array_equal(tissue.mask, plain.mask)
    assert 0.28 < tissue.mask.mean() < 0.3
