"""Tissue masks."""

import warnings

import numpy as np
import pytest
import shapely
from slide_files import damage_tile, write_mrxs, write_pyramid_tiff

from wsi_pipeline.errors import SlideReadError
from wsi_pipeline.geometry import Bounds
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.tissue import TissueMask, tissue_mask

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
    """Half pale, half deep pink: Otsu alone would call the pale half glass."""
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


def test_separates_lymph_nodes_from_fat(test_data):
    folder = test_data / "google-medical-imaging"
    tissue = tissue_mask(
        Slide(folder / "multi_frame_jpeg_camelyon_challenge_image.dcm"), **SETTINGS
    )
    nodes = [(110, 130, 200, 560), (690, 140, 760, 600), (430, 190, 480, 300)]
    fat_and_glass = [(270, 150, 340, 420), (830, 350, 880, 600), (0, 0, 50, 700)]
    assert (tissue.fraction(nodes) > 0.9).all()
    assert (tissue.fraction(fat_and_glass) < 0.1).all()
