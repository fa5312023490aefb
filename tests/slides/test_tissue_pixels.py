"""Tissue in pixels: each thing that was once taken for tissue, or tissue that was once lost."""

import numpy as np
import pytest

from benchmarks.tissue_cases import SHAPE, Case, painted_cases
from wsi_pipeline.config import TissueConfig
from wsi_pipeline.slides.tissue_pixels import find_tissue, glass_colours

SETTINGS = TissueConfig().model_dump(exclude={"mpp"})
CASES = painted_cases()
GLASS, PINK = (242, 240, 243), (200, 100, 150)


def tissue(case: Case, **settings) -> np.ndarray:
    return find_tissue(case.pixels, mpp=case.mpp, **SETTINGS | settings).mask


def lost_and_wrong(found: np.ndarray, case: Case) -> tuple[float, float]:
    """Tissue that was not found, and what was found beside it, as shares of the tissue."""
    counts = np.ones(SHAPE, bool) if case.counts is None else case.counts
    area = (case.tissue & counts).sum()
    return (
        (case.tissue & counts & ~found).sum() / area,
        (found & counts & ~case.tissue).sum() / area,
    )


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"red pen", "empty warm glass"}))
def test_finds_the_tissue_of_a_painted_slide_and_nothing_else(name):
    """Lung: cells at its ragged edge are open to the glass."""
    lost, wrong = lost_and_wrong(tissue(CASES[name]), CASES[name])
    assert lost < (0.1 if "lung" in name else 0.03)
    assert wrong < 0.02


@pytest.mark.parametrize("colour", ["(0, 0, 0)", "(2, 0, 2)", "(12, 10, 14)"])
def test_not_a_pixel_of_a_black_frame_is_tissue(colour):
    case = CASES[f"frame {colour}"]
    assert not tissue(case)[(case.pixels < 30).all(-1)].any()


def test_an_empty_slide_of_tinted_glass_has_no_tissue():
    assert not tissue(CASES["empty warm glass"]).any()


@pytest.mark.parametrize("colour", [0, 255, 240])
def test_a_picture_smaller_than_a_hole_is_not_filled(colour):
    pixels = np.full((5, 7, 3), colour, np.uint8)
    assert not tissue(Case(pixels, np.zeros((5, 7), bool))).any()


def test_red_ink_is_not_told_from_blood_and_eosin():
    """Known: better some ink than a lost haemorrhage. Exclude it by a mask."""
    _, wrong = lost_and_wrong(tissue(CASES["red pen"]), CASES["red pen"])
    assert wrong > 0.1


@pytest.mark.parametrize("ink", ["blue", "green"])
def test_ink_is_kept_where_the_stain_is_blue_or_green(ink):
    case = CASES[f"{ink} pen"]
    found = find_tissue(case.pixels, mpp=case.mpp, **SETTINGS)
    assert found.ink_share > 0.1
    kept = find_tissue(case.pixels, mpp=case.mpp, **SETTINGS | {"drop_ink": False})
    assert kept.ink_share == 0
    assert lost_and_wrong(kept.mask, case)[1] > 0.1


def test_blue_haematoxylin_alone_is_not_ink():
    case = CASES["IHC, pale blue alone"]
    assert find_tissue(case.pixels, mpp=case.mpp, **SETTINGS).ink_share == 0


def test_a_black_block_in_tissue_stays_out_where_holes_of_its_size_are_filled():
    pixels = np.full((200, 200, 3), PINK, np.uint8)
    pixels[:50] = GLASS
    pixels[100:120, 100:120] = (6, 5, 7)  # 160 um
    pixels[150:170, 100:120] = GLASS
    mask = tissue(Case(pixels, np.zeros((200, 200), bool)))
    assert not mask[101:119, 101:119].any()
    assert mask[150:170, 100:120].all()


def test_the_imaged_area_is_neither_black_nor_filled_in_with_white():
    pixels = np.full((200, 300, 3), GLASS, np.uint8)
    pixels[:, :100], pixels[:, 200:] = 255, 3
    found = find_tissue(pixels, mpp=8.0, **SETTINGS)
    assert found.imaged[:, 100:200].all()
    assert not found.imaged[:, :100].any() and not found.imaged[:, 200:].any()


# The glass


def test_the_glass_is_the_brightest_of_what_may_be_glass():
    """Pale tissue covers most of the slide, and a tenth is glass."""
    pixels = np.full((100, 100, 3), (235, 215, 225), np.uint8)
    pixels[:10] = GLASS
    pixels[10:20] = 255  # left out
    assert glass_colours(pixels).tolist() == [list(GLASS)]


def test_even_yellow_mounting_is_glass_beside_bare_glass_and_even_pink_tissue_is_not():
    pixels = np.full((100, 100, 3), (238, 232, 212), np.uint8)
    pixels[:30] = GLASS
    assert glass_colours(pixels).tolist() == [list(GLASS), [238, 232, 212]]
    pixels[30:] = (238, 222, 232)
    assert glass_colours(pixels).tolist() == [list(GLASS)]


def test_without_glass_in_view_it_is_white():
    pixels = np.full((100, 100, 3), PINK, np.uint8)
    assert glass_colours(pixels).tolist() == [[245, 245, 245]]
    assert tissue(Case(pixels, np.ones((100, 100), bool))).all()
