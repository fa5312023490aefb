"""Fine pixels where coarse cells point: which they are, and their values."""

import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from slide_files import ArraySlide

from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.fine import BLOCK, coarse_slabs, predict_pixels, wanted_pixels
from wsi_pipeline.models.inference import dense_predictor
from wsi_pipeline.models.patchnet import Subnet
from wsi_pipeline.models.patchnet_heatmaps import global_heatmap
from wsi_pipeline.patches.slabs import Slab

pytestmark = pytest.mark.usefixtures("one_thread")

# Inner squares of 24 px tile 260 x 190 px: 8 x 11 coarse cells.
COARSE = PatchGrid(Bounds(0, 0, 260, 190), 0.5, 1.0, patch_px=32, stride_px=24, inner_px=24)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (190, 260, 3), np.uint8)


def subnet(patch_px):
    torch.manual_seed(0)
    return Subnet(patch_px, filters=4, layers=2)


def predictor(patch_px, stride_px):
    settings = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "device": "cpu", "precision": "float32"}
    return dense_predictor(subnet(patch_px), stride_px=stride_px, **settings)


def centre_value(patch_px, stride_px):
    """A model that tells the red of each patch's centre, and keeps the sizes it was asked for."""
    sizes = []

    def predict(image):
        assert image.dtype == np.uint8
        centres = image[patch_px // 2 :, patch_px // 2 :, 0][::stride_px, ::stride_px]
        rows, cols = ((n - patch_px) // stride_px + 1 for n in image.shape[:2])
        sizes.append((rows, cols))
        return (centres[:rows, :cols] / 255).astype(np.float32)

    return predict, sizes


def heatmap_of(slide, grid, cells, chunk, predict):
    values = np.full(grid.shape, np.nan, np.float32)
    unread = []
    for slab in coarse_slabs(grid, COARSE, *cells, chunk):
        wanted = wanted_pixels(grid, COARSE, slab, chunk)
        assert np.isnan(values[wanted.rows, wanted.cols]).all()  # each pixel in one chunk
        values[wanted.rows, wanted.cols], lost = predict_pixels(slide, grid, wanted, predict)
        unread += lost
    return values, unread


def all_cells():
    return np.divmod(np.arange(np.prod(COARSE.shape)), COARSE.shape[1])


def some_cells():
    return np.array([0, 2, 2, 7]), np.array([0, 4, 5, 10])


def wanted_of(grid, cells):
    """The rule of `fine`, a comparison for each pixel and cell."""
    y, x = (np.arange(n) * grid.stride_px + grid.inner_px / 2 for n in grid.shape)
    wanted = np.zeros(grid.shape, bool)
    for row, col in zip(*cells, strict=True):
        in_rows = (y >= row * 24) & (y < row * 24 + 24)
        wanted |= in_rows[:, np.newaxis] & (x >= col * 24) & (x < col * 24 + 24)
    return wanted


@pytest.mark.parametrize("chunk", [5, 16, 400])
@pytest.mark.parametrize(("patch_px", "stride_px"), [(17, 1), (16, 5), (31, 8), (11, 30)])
def test_only_pixels_centred_in_suspicious_cells_are_predicted(pixels, patch_px, stride_px, chunk):
    grid = COARSE.finer(patch_px, stride_px)
    predict, _ = centre_value(patch_px, stride_px)
    values, unread = heatmap_of(ArraySlide(pixels), grid, some_cells(), chunk, predict)
    assert unread == []
    wanted = wanted_of(grid, some_cells())
    assert wanted.any()
    np.testing.assert_array_equal(np.isfinite(values), wanted)
    # Each is the red of the pixel at its patch's centre.
    rows, cols = np.nonzero(wanted)
    y, x = (n * stride_px + (grid.inner_px - patch_px) // 2 + patch_px // 2 for n in (rows, cols))
    white = np.pad(pixels, ((0, 99), (0, 99), (0, 0)), constant_values=255)
    np.testing.assert_allclose(values[wanted], white[y, x, 0] / 255, atol=1e-6)


@pytest.mark.parametrize(("patch_px", "stride_px", "chunk"), [(11, 3, 17), (11, 3, 64), (16, 8, 9)])
def test_values_are_those_of_the_whole_slide_evaluated_at_once(pixels, patch_px, stride_px, chunk):
    grid = COARSE.finer(patch_px, stride_px)
    predict = predictor(patch_px, stride_px)
    values, _ = heatmap_of(ArraySlide(pixels), grid, all_cells(), chunk, predict)
    # The whole slide on white, so that the zeros that global_heatmap pads with are in no patch
    # that is compared: the slide's first patch is the one centred 4 steps from the corner.
    before, rows, cols = 4 * stride_px + grid.margin_px - patch_px // 2, *grid.shape
    white = np.pad(pixels, ((before, 40), (before, 40), (0, 0)), constant_values=255)
    image = (torch.tensor(white).permute(2, 0, 1) / 255 - 0.5) / 0.25
    whole = global_heatmap(subnet(patch_px), image, stride_px=stride_px).numpy()
    expected = whole[4 : 4 + rows, 4 : 4 + cols]
    found = np.isfinite(values)
    np.testing.assert_array_equal(found, wanted_of(grid, all_cells()))
    np.testing.assert_allclose(values[found], expected[found], atol=1e-6, rtol=0)
    assert values[found].std() > 1e-3


def test_only_tiles_under_wanted_patches_are_read(pixels):
    grid = COARSE.finer(17, 1)  # margin 8
    slide = ArraySlide(pixels, tile_px=20)
    heatmap_of(slide, grid, (np.array([0, 3]), np.array([0, 3])), 128, centre_value(17, 1)[0])
    # Pixels 0 to 24 lie in px -8 to 32, whose last tile of 20 px ends at 40; pixels 72 to 96 in px
    # 64 to 104, whose first tile begins at 60.
    assert sum(width * height for *_, width, height in slide.reads) == 48 * 48 + 44 * 44


def test_damage_beside_the_wanted_patches_costs_nothing(pixels):
    grid = COARSE.finer(17, 1)
    cells = np.array([0, 3]), np.array([0, 3])
    sound = heatmap_of(ArraySlide(pixels), grid, cells, 128, centre_value(17, 1)[0])
    # Between the two boxes, -8 to 32 and 64 to 104, and within the blocks of 32 heatmap px.
    damaged = ArraySlide(pixels, unreadable=(34, 34, 38, 38))
    found = heatmap_of(damaged, grid, cells, 128, centre_value(17, 1)[0])
    assert found[1] == sound[1] == []
    np.testing.assert_array_equal(found[0], sound[0])


def test_memory_does_not_grow_with_the_height_of_a_chunk(monkeypatch):
    monkeypatch.setattr("wsi_pipeline.patches.overlapping_reads.BAND_PX", 1)
    coarse = PatchGrid(Bounds(0, 0, 64, 20_000), 0.5, 1.0, patch_px=32, stride_px=24, inner_px=24)
    slab = Slab((0, 0), *np.divmod(np.arange(np.prod(coarse.shape)), coarse.shape[1]))
    grid = coarse.finer(17, 8)  # a block is 31 * 8 + 17 = 265 px wide
    wanted = wanted_pixels(grid, coarse, slab, 3000)
    slide = ArraySlide(np.zeros((20_000, 64, 3), np.uint8), tile_px=64)
    tracemalloc.start()
    try:
        predict_pixels(slide, grid, wanted, centre_value(17, 8)[0])
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A band needs a block, a step and a tile: 265 + 256 + 64 rows. The box has 20,000.
    assert 585 * 265 * 3 < 2e6 < 20_000 * 265 * 3
    assert peak_bytes < 2e6


def test_only_blocks_with_a_wanted_pixel_are_evaluated(pixels):
    grid = COARSE.finer(17, 1)
    predict, sizes = centre_value(17, 1)
    heatmap_of(ArraySlide(pixels), grid, (np.array([0, 3]), np.array([0, 3])), 128, predict)
    # Pixels 0 to 24 and 72 to 96: the block from 0 and that from 64, cut to what is wanted.
    assert BLOCK == 32
    assert sizes == [(24, 24), (24, 24)]


def test_a_chunks_arguments_travel_in_a_few_kilobytes():
    coarse = PatchGrid(Bounds(0, 0, 100_000, 100_000), 0.25, 1.0)
    cells = np.divmod(np.arange(np.prod(coarse.shape)), coarse.shape[1])
    slab = next(coarse_slabs(coarse.finer(31, 8), coarse, *cells, chunk=128))
    assert len(slab.rows) == 16  # 1024 px a side, cells of 256
    assert len(pickle.dumps(slab)) < 2048


def test_no_cells_have_no_chunks():
    none = np.empty(0, np.int64)
    assert list(coarse_slabs(COARSE.finer(17, 8), COARSE, none, none, 128)) == []


def test_damage_costs_only_the_blocks_over_it_and_each_is_reported(pixels):
    grid = COARSE.finer(17, 2)  # inner squares of 3 px, margin 7: 96 x 130 pixels in 3 x 5 blocks
    sound, _ = heatmap_of(ArraySlide(pixels), grid, all_cells(), 200, centre_value(17, 2)[0])
    damaged = ArraySlide(pixels, unreadable=(75, 10, 76, 11))
    values, unread = heatmap_of(damaged, grid, all_cells(), 200, centre_value(17, 2)[0])
    # A block of 32 steps of 2 px reads 79 px: from -7, 57, 121, ... on. Px 75 is in the second
    # (57 to 136) alone, px 10 in the first (-7 to 72).
    lost = np.zeros(grid.shape, bool)
    lost[:32, 32:64] = True
    np.testing.assert_array_equal(np.isnan(values), lost | np.isnan(sound))
    np.testing.assert_array_equal(values[~lost], sound[~lost])
    assert unread == [(57, -7, "tile (3, 1) is damaged")]


def test_a_chunk_without_a_readable_block_is_all_nan(pixels):
    grid = COARSE.finer(17, 8)
    damaged = ArraySlide(pixels, unreadable=(0, 0, 260, 190))
    values, unread = heatmap_of(damaged, grid, some_cells(), 128, centre_value(17, 8)[0])
    assert np.isnan(values).all()
    assert len(unread) == 2  # the last cell lies in the next block
