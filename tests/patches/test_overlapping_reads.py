from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise

import numpy as np
import pytest
import tifffile
from counted_reads import counted_reads
from slide_files import ArraySlide, write_pyramid_tiff

from wsi_pipeline.errors import SlideReadError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.patches.overlapping_reads import (
    read_boxes,
    read_patch,
    read_patches,
    readable_patches,
)
from wsi_pipeline.patches.slabs import slabs
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.threads import decoding_in


@pytest.fixture
def grid():
    return PatchGrid(Bounds(0, 0, 170, 100), 0.5, 1.0, patch_px=32, stride_px=16, inner_px=16)


def all_cells(grid):
    return np.divmod(np.arange(np.prod(grid.shape)), grid.shape[1])


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (100, 170, 3), np.uint8)


def patches_of(slide, grid, slab):
    """Copies of all patches, by position, and how many came at a time."""
    found, counts = {}, []
    for positions, patches in read_patches(slide, grid, slab):
        found |= dict(zip(positions.tolist(), map(np.copy, patches), strict=True))
        counts.append(len(patches))
    return found, counts


@pytest.mark.parametrize("moved_px", [7, 2048])
@pytest.mark.parametrize("tile_px", [None, 8, 20, 64])
@pytest.mark.parametrize("band_px", [1, 6000, 1 << 20])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("patch_px", "stride_px"), [(32, 16), (16, 16), (16, 24), (33, 7)])
def test_every_patch_holds_its_own_pixels(
    pixels, monkeypatch, tile_px, band_px, moved_px, share, patch_px, stride_px
):
    monkeypatch.setattr("wsi_pipeline.patches.overlapping_reads.BAND_PX", band_px)
    monkeypatch.setattr("wsi_pipeline.patches.overlapping_reads.MOVED_PX", moved_px)
    inner_px = min(patch_px, stride_px) - (patch_px - min(patch_px, stride_px)) % 2
    grid = PatchGrid(Bounds(0, 0, 170, 100), 0.5, 1.0, patch_px, stride_px, inner_px)
    rows, cols = np.nonzero(np.random.default_rng(1).random(grid.shape) < share)
    (slab,) = slabs(grid, rows, cols, chunk=100)

    found, _ = patches_of(ArraySlide(pixels, tile_px=tile_px), grid, slab)

    white = np.pad(
        pixels, ((grid.margin_px, 99), (grid.margin_px, 99), (0, 0)), constant_values=255
    )
    assert len(found) == len(slab.rows)
    for position, (row, col) in enumerate(zip(slab.rows, slab.cols, strict=True)):
        y, x = row * stride_px, col * stride_px
        np.testing.assert_array_equal(found[position], white[y : y + patch_px, x : x + patch_px])


def test_threads_read_bands_at_once(pixels, grid, monkeypatch):
    """Each has memory of its own, though what a band leaves serves the next of any thread."""
    monkeypatch.setattr("wsi_pipeline.patches.overlapping_reads.BAND_PX", 1)
    monkeypatch.setattr("wsi_pipeline.patches.overlapping_reads.MOVED_PX", 7)
    (slab,) = slabs(grid, *all_cells(grid), chunk=100)
    expected, _ = patches_of(ArraySlide(pixels, tile_px=20), grid, slab)

    def read(_):
        with decoding_in(2):
            return patches_of(ArraySlide(pixels, tile_px=20), grid, slab)[0]

    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(read, range(40)):
            np.testing.assert_equal(found, expected)


def test_boxes_of_any_size_are_read_downwards(pixels, grid, monkeypatch):
    monkeypatch.setattr("wsi_pipeline.patches.overlapping_reads.BAND_PX", 1)
    rng = np.random.default_rng(4)
    boxes = np.stack([*rng.integers(-9, 60, (2, 30)), *rng.integers(1, 50, (2, 30))], axis=1)
    white = np.pad(pixels, ((9, 99), (9, 99), (0, 0)), constant_values=255)
    order, yields = [], 0
    for positions, found in read_boxes(ArraySlide(pixels, tile_px=16), grid, boxes, {}):
        yields += 1
        order.extend(positions.tolist())
        for (x, y, width, height), box in zip(boxes[positions], found, strict=True):
            expected = white[y + 9 : y + 9 + height, x + 9 : x + 9 + width]
            np.testing.assert_array_equal(box, expected)
    assert order == np.argsort(boxes[:, 1], kind="stable").tolist() and yields > 1


def test_bands_end_on_edges_of_tiles_and_no_row_is_read_twice(pixels, grid, monkeypatch):
    # 11 columns of patches are 10 * 16 + 32 = 192 px wide: 70 rows of px at a time, and the slab
    # lies from y = -8 to 120.
    monkeypatch.setattr("wsi_pipeline.patches.overlapping_reads.BAND_PX", 192 * 70)
    slide = ArraySlide(pixels, tile_px=20)
    (slab,) = slabs(grid, *all_cells(grid), chunk=100)

    _, counts = patches_of(slide, grid, slab)

    # -8 + 70 = 62: the band ends at 60, which holds rows of patches from -8, 8 and 24 (to 56). The
    # next begins at 40: 40 + 70 = 110, back to 100, with rows from 40 and 56; the last begins at
    # 72. Of the tiles, each once, the first and last rows and columns are cut by the slab.
    rows, columns = [-8, 0, 20, 40, 60, 80, 100, 120], [-8, *range(0, 181, 20), 184]
    assert slide.reads == [
        (x, y, right - x, lower - y)
        for y, lower in pairwise(rows)
        for x, right in pairwise(columns)
    ]
    assert counts == [33, 22, 22]


def test_tiles_under_no_patch_are_not_read(pixels, grid):
    slide = ArraySlide(pixels, tile_px=20)
    (slab,) = slabs(grid, [1, 2, 1], [0, 0, 8], chunk=100)
    patches_of(slide, grid, slab)
    # Column 0 is px -8 to 24, to 40 by tiles; column 8 px 120 to 152, which the slab ends with.
    # Row 1 is px 8 to 40, row 2 px 24 to 56, which the slab ends with: below 40 it is alone.
    left, right = [(-8, 8), (0, 20), (20, 20)], [(120, 20), (140, 12)]
    upper = [(8, 12), (20, 20)]
    assert slide.reads == [
        *((x, y, width, height) for y, height in upper for x, width in left + right),
        *((x, 40, width, 16) for x, width in left),
    ]


def test_patches_overlap_in_memory_as_they_do_in_the_slide(pixels, grid):
    (slab,) = slabs(grid, [2, 2], [5, 6], chunk=100)
    ((_, (left, right)),) = read_patches(ArraySlide(pixels), grid, slab)
    assert np.shares_memory(left[:, 16:], right[:, :16])
    assert not np.shares_memory(left[:, :16], right)


@pytest.fixture
def tiled(tmp_path, monkeypatch):
    """A function of a tile's side to a slide of 1280 px a side that is read by tiles."""
    monkeypatch.setattr("wsi_pipeline.slides.reader.WORTH_TILES_PX", 0)
    pixels = np.random.default_rng(0).integers(0, 256, (1280, 1280, 3), np.uint8)
    with ExitStack() as opened:
        yield lambda tile_px: opened.enter_context(
            Slide(write_pyramid_tiff(tmp_path / f"{tile_px}.tif", [pixels], tile=tile_px), 0.5)
        )


def large_slab(slide, downsample):
    """All patches of a slide; a band holds just as many rows as it must."""
    grid = PatchGrid(slide.bounds, 0.5, downsample, patch_px=128, stride_px=64, inner_px=64)
    (slab,) = slabs(grid, *all_cells(grid), chunk=100)
    return grid, slab


@pytest.mark.parametrize("tile_px", [64, 128, 320, 640])
def test_no_tile_of_a_slab_is_decoded_twice(tiled, monkeypatch, tile_px):
    monkeypatch.setattr("wsi_pipeline.patches.overlapping_reads.BAND_PX", 1)
    slide = tiled(tile_px)
    with counted_reads(slide) as counted:
        _, counts = patches_of(slide, *large_slab(slide, 1.0))
    assert len(counts) > 1
    # Each lies under several patches.
    assert (counted.by_tiles, counted.by_openslide) == (1280 * 1280, 0)


def test_a_resolution_almost_a_levels_shows_every_row_of_it(tiled, monkeypatch):
    monkeypatch.setattr("wsi_pipeline.patches.overlapping_reads.BAND_PX", 1)
    slide = tiled(64)
    # 1000 px from the corner on, 1.00099 px to a px would be a whole px off.
    monkeypatch.setattr("wsi_pipeline.slides.reader.SAME_DOWNSAMPLE", 1e-3)
    grid, slab = large_slab(slide, 1.00099)
    found, _ = patches_of(slide, grid, slab)
    whole = slide.read(-32, -32, 1344, 1344)
    for position, (row, col) in enumerate(zip(slab.rows, slab.cols, strict=True)):
        y, x = row * 64, col * 64
        np.testing.assert_array_equal(found[position], whole[y : y + 128, x : x + 128])


@pytest.mark.parametrize("downsample", [1.03, 1.9])
def test_resampled_patches_are_read_in_few_large_parts(tiled, monkeypatch, downsample):
    monkeypatch.setattr("wsi_pipeline.patches.overlapping_reads.BAND_PX", 1)
    slide = tiled(64)
    grid, slab = large_slab(slide, downsample)
    with counted_reads(slide) as counted:
        found, _ = patches_of(slide, grid, slab)
    assert (counted.by_tiles, counted.by_openslide) == (1280 * 1280, 0)
    x, y = ((cells[7] * 64 - 32) * downsample for cells in (slab.cols, slab.rows))
    single = read_patch(slide, grid, x, y)
    np.testing.assert_allclose(found[7].astype(int), single, atol=1)


def as_read_singly(slide, grid, corners):
    return [read_patch(slide, grid, *corner) for corner in np.stack(corners, axis=1).tolist()]


@pytest.mark.parametrize("downsample", [1.0, 1.37])
def test_patches_as_indexed_start_at_the_rounded_corner_in_every_bit(tiled, downsample):
    slide = tiled(64)
    grid, slab = large_slab(slide, downsample)
    read = readable_patches(slide, grid, slab, [], as_indexed=True)
    found = [np.copy(pixels) for _, pixels in read]
    expected = as_read_singly(slide, grid, grid.patch_origins(slab.rows, slab.cols))
    np.testing.assert_array_equal(found, expected)


def test_patches_of_a_level_of_fractional_downsample_start_at_the_rounded_corner(tmp_path):
    """OpenSlide interpolates there, from whole level-0 px on."""
    pixels = np.random.default_rng(0).integers(0, 256, (1280, 1280, 3), np.uint8)
    levels = [pixels, pixels[:1278:3, :1278:3]]  # 426 px a side: downsample 3.0047
    with Slide(write_pyramid_tiff(tmp_path / "a.tif", levels, tile=64), 0.5) as slide:
        grid, slab = large_slab(slide, slide.level_downsamples[1])
        read = readable_patches(slide, grid, slab, [], as_indexed=True)
        found = [np.copy(pixels) for _, pixels in read]
        expected = as_read_singly(slide, grid, grid.patch_origins(slab.rows, slab.cols))
    np.testing.assert_array_equal(found, expected)


def test_unread_patches_are_told_by_their_corners_in_the_index(tiled, monkeypatch):
    slide = tiled(64)
    monkeypatch.setattr(slide, "read_under", lambda *_: {1: "a tile is damaged"})
    grid = PatchGrid(slide.bounds, 0.5, 1.37, patch_px=128, stride_px=64, inner_px=64)
    (slab,) = slabs(grid, [0, 0], [0, 1], chunk=100)
    unread = []
    assert [position for position, _ in readable_patches(slide, grid, slab, unread)] == [0]
    # 32 * 1.37 = 43.84 and -32 * 1.37 = -43.84.
    assert unread == [(44, -44, "a tile is damaged")]


def three_on_the_diagonal(slide, downsample, cells):
    grid = PatchGrid(slide.bounds, 0.5, downsample, patch_px=128, stride_px=64, inner_px=64)
    (slab,) = slabs(grid, cells, cells, chunk=100)
    found, _ = patches_of(slide, grid, slab)
    x = ((np.array(cells) * 64 - 32) * downsample).tolist()
    return [found[i] for i in range(3)], [read_patch(slide, grid, at, at) for at in x]


def test_openslide_is_asked_for_little_more_than_patches_far_apart(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (1280, 1280, 3), np.uint8)
    path = write_pyramid_tiff(tmp_path / "a.tif", [pixels], tile=64, compression=None)
    with Slide(path, 0.5) as slide, counted_reads() as counted:
        found, expected = three_on_the_diagonal(slide, 1.0, [0, 9, 18])
    np.testing.assert_array_equal(found, expected)
    # From px -32, 544 and 1120 on, each in a cell of its own of 512 px from -32 on; then again one
    # by one.
    assert (counted.by_tiles, counted.by_openslide) == (0, 2 * (96 * 96 + 128 * 128 + 128 * 128))


def test_tiles_between_resampled_patches_are_not_decoded(tiled):
    slide = tiled(64)
    with counted_reads(slide) as counted:
        found, expected = three_on_the_diagonal(slide, 2.0, [0, 4, 8])
    np.testing.assert_allclose(np.array(found, int), np.array(expected, int), atol=1)
    # From level px -64, 448 and 960 on, 256 px wide, and the filter takes 4 more all round: px 0 to
    # 196 are 4 tiles of 64, 444 to 708 and 956 to 1220 are 6. Then again one by one.
    assert counted.by_tiles == 2 * (4 * 4 + 6 * 6 + 6 * 6) * 64 * 64
    assert counted.by_openslide == 0


def destroy_tile(slide, row, col):
    """Of 20 x 20 tiles of 64 px."""
    with tifffile.TiffFile(slide.path) as file:
        page = file.pages[0]
        start, length = (
            values[row * 20 + col] for values in (page.dataoffsets, page.databytecounts)
        )
    with slide.path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(length))


@pytest.mark.parametrize("band_px", [1, 1 << 30])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_damaged_tile_costs_the_patches_over_it_and_no_tile_twice(
    tiled, monkeypatch, threads, band_px
):
    monkeypatch.setattr("wsi_pipeline.patches.overlapping_reads.BAND_PX", band_px)
    slide, unread = tiled(64), []
    grid, slab = large_slab(slide, 1.0)
    expected = patches_of(slide, grid, slab)[0]
    destroy_tile(slide, 3, 9)  # px 576 to 640 across, 192 to 256 down
    slide.close()
    assert slide.backend(0).name == "tiles"
    with counted_reads() as counted, decoding_in(threads):
        found = {
            position: np.copy(pixels)
            for position, pixels in readable_patches(slide, grid, slab, unread)
        }
    # Patches begin at 64 n - 32: from 64 * 8 - 32 = 480 (to 608) to 608, cells 8 to 10; 2 to 4.
    lost = [row * 20 + col for row in (2, 3, 4) for col in (8, 9, 10)]
    assert sorted(found) == [i for i in range(400) if i not in lost]
    for position, pixels in found.items():
        np.testing.assert_array_equal(pixels, expected[position])
    assert [(x, y) for x, y, _ in unread] == [
        (x, y) for y in (96, 160, 224) for x in (480, 544, 608)
    ]
    assert {reason.split(": ")[1] for *_, reason in unread} == {
        "the region at level-0 px (576, 192), 64 x 64 px of level 0, cannot be decoded"
    }
    assert (counted.by_tiles, counted.by_openslide) == (399 * 64 * 64, 0)


@pytest.mark.parametrize(("downsample", "by_tiles"), [(1.0, False), (1.37, False), (1.37, True)])
def test_those_patches_are_lost_that_cannot_be_read_alone(tiled, monkeypatch, downsample, by_tiles):
    """OpenSlide's requests and resampled blocks are larger than the damage."""
    slide, unread = tiled(64), []
    destroy_tile(slide, 3, 9)
    slide.close()
    if not by_tiles:
        monkeypatch.setattr("wsi_pipeline.slides.reader.WORTH_TILES_PX", 10**9)
    grid, _ = large_slab(slide, downsample)
    rows, cols = np.indices((6, 8)).reshape(2, -1)
    (slab,) = slabs(grid, rows, cols + 5, chunk=100)
    read = readable_patches(slide, grid, slab, unread)
    found = {position: pixels[::127, ::127].astype(int) for position, pixels in read}
    for position, (row, col) in enumerate(zip(slab.rows, slab.cols, strict=True)):
        x, y = ((cell * 64 - 32) * downsample for cell in (col, row))
        try:
            alone = read_patch(slide, grid, x, y)
        except SlideReadError:
            assert position not in found
        else:
            np.testing.assert_allclose(found[position], alone[::127, ::127], atol=1)
    assert 48 - len(found) == len(unread) > 0
