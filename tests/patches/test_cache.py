"""The patch cache as other Zarr libraries see it, and what it refuses to pass for a patch."""

import numpy as np
import pytest
import zarr

from wsi_pipeline.errors import RunError, SlideReadError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.patches.cache import (
    SHARD,
    create_cache,
    finish_cache,
    open_cache,
    shard_file,
    write_shard,
)

# 20 x 18 cells of 32 px: the last shards reach over the grid's edge.
GRID = PatchGrid(Bounds(0, 0, 18 * 16, 20 * 16), 0.5, 1.0, 32, 16, 16)
CELLS = [(0, 0), (0, 17), (3, 9), (15, 15), (16, 0), (19, 17)]
BLACK = (3, 9)
UNREAD = (5, 5)


def corner(cell):
    return tuple(int(axis) for axis in GRID.patch_origins(*cell))


@pytest.fixture
def patches():
    rng = np.random.default_rng(0)
    made = {cell: rng.integers(0, 256, (32, 32, 3), np.uint8) for cell in CELLS}
    return made | {BLACK: np.zeros((32, 32, 3), np.uint8)}


@pytest.fixture
def path(patches, tmp_path):
    path = tmp_path / "s.zarr"
    create_cache(path, grid=GRID, made_of={"index": "abc"})
    for row in range(2):
        for col in range(2):
            of_shard = [
                (*cell, pixels)
                for cell, pixels in patches.items()
                if (cell[0] // SHARD, cell[1] // SHARD) == (row, col)
            ]
            write_shard(path, (row, col), of_shard)
    finish_cache(path, [(*corner(UNREAD), "tile (1, 1) is damaged")])
    return path


def test_patches_come_back_by_their_corners(path, patches):
    cache = open_cache(path)
    assert (cache.grid, cache.made_of) == (GRID, {"index": "abc"})
    for cell, pixels in patches.items():
        np.testing.assert_array_equal(cache.read(*corner(cell)), pixels)


def test_zarr_reads_the_same(path, patches):
    array = zarr.open_array(path, mode="r")
    assert array.shape == (20, 18, 32, 32, 3)
    expected = np.zeros(array.shape, np.uint8)
    for cell, pixels in patches.items():
        expected[cell] = pixels
    np.testing.assert_array_equal(array[:], expected)  # with the index's checksum
    np.testing.assert_array_equal(array[19, 17], patches[19, 17])


def test_what_zarr_writes_is_read(path):
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    zarr.open_array(path, mode="r+")[17, 2] = pixels
    np.testing.assert_array_equal(open_cache(path).read(*corner((17, 2))), pixels)


def test_cells_without_a_patch_take_no_room(path):
    # The index of 16 x 16 entries of 16 bytes and 4 bytes of checksum; noise does not shrink: 3072
    # bytes, a header of 16 and a checksum of 4.
    assert shard_file(path, (1, 0)).stat().st_size == 256 * 16 + 4 + 3072 + 16 + 4


def test_an_unread_patch_is_the_slides_error(path):
    with pytest.raises(SlideReadError, match=r"^tile \(1, 1\) is damaged$"):
        open_cache(path).read(*corner(UNREAD))


def test_a_missing_patch_is_no_black_one(path):
    with pytest.raises(RunError, match=r"c/0/0/0/0/0: the patch in row 1, column 2 .* not there"):
        open_cache(path).read(*corner((1, 2)))


def test_a_missing_shard_and_a_damaged_one_are_named(path):
    shard_file(path, (1, 0)).unlink()
    whole = shard_file(path, (0, 0)).read_bytes()
    shard_file(path, (0, 0)).write_bytes(bytes(100) + whole[100:])
    for cell, file in (((16, 0), "c/1/0/0/0/0"), ((0, 0), "c/0/0/0/0/0")):
        with pytest.raises(RunError, match=rf"s\.zarr/{file}: .* run `wsi cache`"):
            open_cache(path).read(*corner(cell))


def test_a_byte_that_changed_in_a_patch_is_damage_to_zarr_too(path):
    file = shard_file(path, (1, 0))
    damaged = bytearray(file.read_bytes())
    damaged[1500] ^= 1  # the only patch of the shard has the first 3092 bytes
    file.write_bytes(damaged)
    with pytest.raises(RunError, match=r"c/1/0/0/0/0: .* the checksum of its pixels is wrong"):
        open_cache(path).read(*corner((16, 0)))
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_array(path, mode="r")[16, 0]


# Cut by an entry of the index, 16 bytes, each cell would have its neighbour's.
@pytest.mark.parametrize("cut", [1, 4, 16, 2000, 5000])
def test_a_shard_that_was_cut_off_is_named(path, cut):
    file = shard_file(path, (0, 0))
    file.write_bytes(file.read_bytes()[:-cut])
    for cell in ((0, 0), (0, 1), (15, 15)):
        with pytest.raises(RunError, match=r"c/0/0/0/0/0: the patch .* the shard's index is wrong"):
            open_cache(path).read(*corner(cell))


def test_a_shard_shorter_than_its_index_is_named(path):
    shard_file(path, (0, 0)).write_bytes(b"short")
    with pytest.raises(RunError, match=r"c/0/0/0/0/0: the patch .* the shard is cut off"):
        open_cache(path).read(*corner((0, 0)))


def test_a_shard_that_lacks_its_beginning_is_named(path):
    file = shard_file(path, (1, 0))
    file.write_bytes(file.read_bytes()[-4100:])  # the index
    with pytest.raises(RunError, match=r"c/1/0/0/0/0: .* the checksum of its pixels is wrong"):
        open_cache(path).read(*corner((16, 0)))


def test_a_cache_that_was_killed_while_it_was_made_is_made_anew(path):
    (path / "zarr.json").write_text('{"half of')
    create_cache(path, grid=GRID, made_of={})
    assert zarr.open_array(path, mode="r").attrs["wsi_pipeline"]["made_of"] == {}
    create_cache(path, grid=GRID, made_of={"index": "b"})  # killed before it was renamed
    assert zarr.open_array(path, mode="r").attrs["wsi_pipeline"]["made_of"] == {"index": "b"}
    assert not shard_file(path, (0, 0)).exists()


def test_an_unfinished_cache_is_refused(tmp_path):
    create_cache(tmp_path / "s.zarr", grid=GRID, made_of={})
    with pytest.raises(RunError, match=r"s\.zarr: no finished patch cache.*unread"):
        open_cache(tmp_path / "s.zarr")
    with pytest.raises(RunError, match=r"t\.zarr: no finished patch cache.*run `wsi cache`"):
        open_cache(tmp_path / "t.zarr")
