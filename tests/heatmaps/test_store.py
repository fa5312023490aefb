import json
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import ome_zarr_models.v04
import ome_zarr_models.v05
import pytest
import zarr
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader
from ome_zarr_models.v04.omero import Omero
from planted import GRIDS, LESION, lesion_box, planted

from wsi_pipeline.errors import ConfigError, RunError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps import store
from wsi_pipeline.heatmaps.ngff import Channel
from wsi_pipeline.heatmaps.store import (
    chunk_file,
    create_heatmap,
    finish_heatmap,
    open_heatmap,
    write_chunk,
)
from wsi_pipeline.patches.slabs import Slab, slabs

VERSIONS = ["0.5", "0.4"]
ZSTD = {"id": "zstd", "level": 0, "checksum": False}


@pytest.fixture
def grid():
    # 101 x 131 cells, an odd number of both: levels of 101 x 131, 51 x 66 and 26 x 33.
    return PatchGrid(Bounds(1000, 200, 131 * 64, 101 * 64), 0.25, 4.0, 32, 16, 16)


@pytest.fixture
def truth(grid):
    rng = np.random.default_rng(0)
    values = rng.random(grid.shape, np.float32)
    values[rng.random(grid.shape) < 0.4] = np.nan
    values[:40, :50] = np.nan  # whole chunks and whole coarse pixels without tissue
    return values


def write_heatmap(path, grid, truth, *, ngff="0.5", chunk=16):
    create_heatmap(path, grid=grid, slide_id="tumor_001", model="vgg16", chunk=chunk, ngff=ngff)
    for slab in slabs(grid, *np.nonzero(~np.isnan(truth)), chunk):
        write_chunk(path, slab, truth[slab.rows, slab.cols])
    finish_heatmap(path)
    return path


def test_a_heatmap_says_what_it_was_computed_in(tmp_path, grid):
    options = {"grid": grid, "slide_id": "s", "model": "m", "precision": "bfloat16"}
    create_heatmap(tmp_path / "s.zarr", **options)
    assert open_heatmap(tmp_path / "s.zarr").precision == "bfloat16"


def brute_halve(values):
    rows, cols = values.shape
    result = np.full(((rows + 1) // 2, (cols + 1) // 2), np.nan)
    for row, col in np.ndindex(result.shape):
        block = values[2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
        known = block[~np.isnan(block)]
        if known.size:
            result[row, col] = known.mean(dtype=np.float64)
    return result


@pytest.mark.parametrize("ngff", VERSIONS)
def test_what_was_written_is_read_back_with_all_that_explains_it(tmp_path, grid, truth, ngff):
    heatmap = open_heatmap(write_heatmap(tmp_path / "s.zarr", grid, truth, ngff=ngff))
    assert heatmap.grid == grid
    assert (heatmap.slide_id, heatmap.model, heatmap.ngff) == ("tumor_001", "vgg16", ngff)
    assert heatmap.precision is None  # as nobody said
    assert heatmap.values().dtype == np.float32
    np.testing.assert_array_equal(heatmap.values(), truth)


def test_each_level_is_the_mean_of_the_known_pixels_below_it(tmp_path, grid, truth):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heatmap = open_heatmap(write_heatmap(tmp_path / "s.zarr", grid, truth))
    assert [level.shape for level in heatmap.levels] == [(101, 131), (51, 66), (26, 33)]
    for level in (1, 2):
        below = heatmap.values(level - 1)
        np.testing.assert_allclose(heatmap.values(level), brute_halve(below), rtol=1e-6)
    assert np.isnan(heatmap.values(2)[:10, :12]).all()


@pytest.mark.parametrize("level_0_chunk", [9, 64])
def test_levels_do_not_depend_on_the_bands_they_are_made_in(tmp_path, grid, truth, level_0_chunk):
    path = write_heatmap(tmp_path / "s.zarr", grid, truth, chunk=level_0_chunk)
    for level, below in ((1, truth), (2, brute_halve(truth))):
        np.testing.assert_allclose(open_heatmap(path).values(level), brute_halve(below), rtol=1e-6)


def test_memory_to_finish_a_heatmap_does_not_grow_with_its_height(tmp_path, monkeypatch):
    sizes, halve = [], store.block_means
    monkeypatch.setattr(
        store, "block_means", lambda below: sizes.append(below.shape) or halve(below)
    )
    largest = []
    for height in (500, 2000):
        grid = PatchGrid(Bounds(0, 0, 70 * 16, height * 16), 0.25, 1.0, 32, 16, 16)
        values = np.full(grid.shape, 0.5, np.float32)
        write_heatmap(tmp_path / f"{height}.zarr", grid, values, chunk=50)
        largest.append(max(sizes))
        sizes.clear()
    assert largest == [(100, 70), (100, 70)]  # two rows of chunks


def test_a_window_is_read_alone(tmp_path, grid, truth):
    path = write_heatmap(tmp_path / "s.zarr", grid, truth)
    chunk_file(path, (6, 8), "0.5").write_bytes(b"damaged, and not under the window")
    found = open_heatmap(path).values(0, slice(30, 60), slice(20, 128))
    np.testing.assert_array_equal(found, truth[30:60, 20:128])


def test_a_small_slide_has_one_level(tmp_path):
    grid = PatchGrid(Bounds(0, 0, 300, 100), 0.5, 1.0, 32, 16, 16)
    values = np.full(grid.shape, 0.5, np.float32)
    heatmap = open_heatmap(write_heatmap(tmp_path / "s.zarr", grid, values))
    assert len(heatmap.levels) == 1
    np.testing.assert_array_equal(heatmap.values(), values)


@pytest.mark.parametrize("ngff", VERSIONS)
def test_scale_and_translation_are_in_micrometres_of_pixel_centres(tmp_path, grid, truth, ngff):
    path = write_heatmap(tmp_path / "s.zarr", grid, truth, ngff=ngff)
    attributes = zarr.open_group(path, mode="r").attrs
    (multiscales,) = (attributes["ome"] if ngff == "0.5" else attributes)["multiscales"]
    assert multiscales["axes"] == [
        {"name": "y", "type": "space", "unit": "micrometer"},
        {"name": "x", "type": "space", "unit": "micrometer"},
    ]
    # A cell is 16 working px = 64 level-0 px = 16 um wide. The first inner square covers level-0
    # px 1000 to 1064 in x: the centre, 1032 in corners, is 1031.5 in pixel centres: 257.875 um.
    # In y 200 to 264: (232 - 0.5) / 4. A coarser pixel's centre lies half a finer one further.
    expected = [
        (16.0, (57.875, 257.875)),
        (32.0, (65.875, 265.875)),
        (64.0, (81.875, 281.875)),
    ]
    found = [
        (scale["scale"], translation["translation"])
        for dataset in multiscales["datasets"]
        for scale, translation in [dataset["coordinateTransformations"]]
    ]
    assert found == [([spacing, spacing], list(first)) for spacing, first in expected]


@pytest.mark.parametrize(
    ("ngff", "model"), [("0.5", ome_zarr_models.v05.Image), ("0.4", ome_zarr_models.v04.Image)]
)
def test_the_store_validates_against_ome_zarr_models(tmp_path, grid, truth, ngff, model):
    path = write_heatmap(tmp_path / "s.zarr", grid, truth, ngff=ngff)
    image = model.from_zarr(zarr.open_group(path, mode="r"))
    multiscales = (
        image.ome_attributes.multiscales if ngff == "0.5" else image.attributes.multiscales
    )
    assert len(multiscales[0].datasets) == 3
    attributes = zarr.open_group(path, mode="r").attrs
    omero = (attributes["ome"] if ngff == "0.5" else attributes)["omero"]
    Omero.model_validate(omero)  # 0.5 leaves it as it was; its model is not part of v05.Image


@pytest.mark.parametrize("ngff", VERSIONS)
def test_the_ome_zarr_reader_finds_version_levels_and_values(tmp_path, grid, truth, ngff):
    path = write_heatmap(tmp_path / "s.zarr", grid, truth, ngff=ngff)
    location = parse_url(path)
    assert location.fmt.version == ngff
    (node,) = Reader(location)()
    assert [level.shape for level in node.data] == [(101, 131), (51, 66), (26, 33)]
    np.testing.assert_array_equal(node.data[0].compute(), truth)
    assert node.metadata["coordinateTransformations"][1][0]["scale"] == [32.0, 32.0]
    assert node.metadata["channel_names"] == ["vgg16"]
    assert node.metadata["contrast_limits"] == [[0, 1]]
    assert node.metadata["colormap"] == [[[0, 0, 0], [1, 0, 0]]]
    assert node.metadata["visible"] == [True]


@pytest.mark.parametrize("ngff", VERSIONS)
@pytest.mark.parametrize("name", GRIDS)
def test_the_ome_zarr_reader_finds_the_lesion_where_it_is_on_the_slide(tmp_path, name, ngff):
    grid = GRIDS[name]
    path = write_heatmap(tmp_path / "s.zarr", grid, planted(grid), ngff=ngff)
    (node,) = Reader(parse_url(path))()
    cells = np.argwhere(node.data[0].compute() == LESION)
    scale, translation = node.metadata["coordinateTransformations"][0]
    y_um, x_um = cells.mean(axis=0) * scale["scale"] + translation["translation"]
    x0, y0, x1, y1 = lesion_box(grid)
    # um are of pixel centres: the middle of level-0 px (0, 0) is at 0.
    expected = ((x0 + x1) / 2 - 0.5) * grid.mpp, ((y0 + y1) / 2 - 0.5) * grid.mpp
    assert (x_um, y_um) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("ngff", VERSIONS)
def test_viewers_are_told_how_to_show_it(tmp_path, grid, ngff):
    options = {"grid": grid, "slide_id": "s", "model": "vgg16@1", "ngff": ngff}
    create_heatmap(tmp_path / "s.zarr", **options)
    create_heatmap(tmp_path / "map.zarr", channel=Channel("Grad-CAM", -2, 4.5), **options)
    expected = {"s.zarr": ("vgg16@1", 0, 1), "map.zarr": ("Grad-CAM", -2, 4.5)}
    for name, (label, low, high) in expected.items():
        attributes = zarr.open_group(tmp_path / name, mode="r").attrs
        omero = (attributes["ome"] if ngff == "0.5" else attributes)["omero"]
        (channel,) = omero["channels"]
        assert (channel["label"], channel["color"], channel["active"]) == (label, "FF0000", True)
        assert channel["window"] == {"min": low, "max": high, "start": low, "end": high}
        assert omero["rdefs"] == {"model": "color", "defaultT": 0, "defaultZ": 0}


def test_a_store_of_an_older_version_is_still_read_and_continued(tmp_path, grid, truth):
    """Before, nothing told viewers how to show it, and 0.4 was compressed with Zstandard."""
    path = write_heatmap(tmp_path / "s.zarr", grid, truth, ngff="0.4")
    group = zarr.open_group(path, mode="r+")
    del group.attrs["omero"]
    for level in range(3):
        values, old = group[str(level)][:], json.loads((path / f"{level}/.zarray").read_text())
        (path / f"{level}/.zarray").write_text(json.dumps({**old, "compressor": ZSTD}))
        zarr.open_group(path, mode="r+")[str(level)][:] = values
    np.testing.assert_array_equal(open_heatmap(path).values(), truth)
    last = slabs(grid, *np.nonzero(~np.isnan(truth)), 16)[-1]
    write_chunk(path, last, np.full(len(last.rows), 0.5))
    finish_heatmap(path)
    assert (open_heatmap(path).values()[last.rows, last.cols] == 0.5).all()


@pytest.mark.parametrize("ngff", VERSIONS)
def test_chunks_are_compressed_and_laid_out_as_the_version_wants(tmp_path, grid, truth, ngff):
    path = write_heatmap(tmp_path / "s.zarr", grid, truth, ngff=ngff)
    array = zarr.open_array(path / "0", mode="r")
    assert array.chunks == (16, 16)
    assert np.isnan(array.fill_value)
    if ngff == "0.5":
        stored = json.loads((path / "0" / "zarr.json").read_text())
        assert "zstd" in [codec["name"] for codec in stored["codecs"]]
        assert stored["dimension_names"] == ["y", "x"]
    else:
        stored = json.loads((path / "0" / ".zarray").read_text())
        # What Java readers know; zlib, unlike LZ4, notices a file that is cut short.
        assert stored["compressor"]["id"] == "blosc"
        assert stored["compressor"]["cname"] == "zlib"
        assert stored["dimension_separator"] == "/"
    expected = {
        chunk_file(path, slab.chunk, ngff)
        for slab in slabs(grid, *np.nonzero(~np.isnan(truth)), 16)
    }
    files = (path / "0").rglob("*")
    assert {file for file in files if file.is_file() and file.name.isdigit()} == expected


def test_values_of_patches_by_their_corners(tmp_path, grid, truth):
    heatmap = open_heatmap(write_heatmap(tmp_path / "s.zarr", grid, truth))
    rows, cols = np.nonzero(~np.isnan(truth))
    x, y = grid.patch_origins(rows, cols)
    np.testing.assert_array_equal(heatmap.at(x, y), truth[rows, cols])
    assert np.isnan(heatmap.at(*grid.patch_origins([0], [0]))).all()


def test_patches_of_another_grid_are_refused(tmp_path, grid, truth):
    heatmap = open_heatmap(write_heatmap(tmp_path / "s.zarr", grid, truth))
    with pytest.raises(RunError, match=r"s\.zarr: the patch at x 99000, y 200 .* 101 x 131"):
        heatmap.at([1000, 99000], [200, 200])


def test_writing_a_chunk_again_replaces_it_and_touches_no_other(tmp_path, grid, truth):
    path = write_heatmap(tmp_path / "s.zarr", grid, truth)
    last = slabs(grid, *np.nonzero(~np.isnan(truth)), 16)[-1]
    fewer = Slab(last.chunk, last.rows[:1], last.cols[:1])
    write_chunk(path, fewer, np.array([0.25]))
    values = open_heatmap(path).values()
    expected = truth.copy()
    expected[last.rows[0] // 16 * 16 :, last.cols[0] // 16 * 16 :] = np.nan
    expected[last.rows[0], last.cols[0]] = 0.25
    np.testing.assert_array_equal(values, expected)


def test_writers_in_several_processes_need_no_lock(tmp_path, grid, truth):
    path = tmp_path / "s.zarr"
    create_heatmap(path, grid=grid, slide_id="s", model="m", chunk=16)
    parts = slabs(grid, *np.nonzero(~np.isnan(truth)), 16)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        written = [
            pool.submit(write_chunk, path, slab, truth[slab.rows, slab.cols]) for slab in parts
        ]
        for future in written:
            future.result()
    np.testing.assert_array_equal(open_heatmap(path).values(), truth)


def test_finishing_twice_and_creating_anew_leave_nothing_behind(tmp_path, grid, truth):
    path = write_heatmap(tmp_path / "s.zarr", grid, truth)
    first = [open_heatmap(path).values(level) for level in range(3)]
    finish_heatmap(path)
    for level, values in enumerate(first):
        np.testing.assert_array_equal(open_heatmap(path).values(level), values)
    create_heatmap(path, grid=grid, slide_id="s", model="m", ngff="0.4")
    assert np.isnan(open_heatmap(path).values()).all()
    assert not (path / "zarr.json").exists()


def test_a_slab_for_other_chunks_is_refused(tmp_path, grid):
    path = tmp_path / "s.zarr"
    create_heatmap(path, grid=grid, slide_id="s", model="m", chunk=16)
    (slab,) = slabs(grid, [40], [40], chunk=32)
    with pytest.raises(RunError, match=r"s\.zarr.*slab \(1, 1\).*16 x 16"):
        write_chunk(path, slab, np.array([0.5]))


def test_an_unknown_version_is_refused(tmp_path, grid):
    with pytest.raises(ConfigError, match=r"ngff is '0\.6'"):
        create_heatmap(tmp_path / "s.zarr", grid=grid, slide_id="s", model="m", ngff="0.6")


def nothing(path):
    pass


def another_image(path):
    zarr.create_group(path, attributes={"ome": {"version": "0.5", "multiscales": []}})


def no_json(path):
    create_small(path)
    (path / "zarr.json").write_text("{")


def lost_level(path):
    create_small(path)
    (path / "1" / "zarr.json").unlink()


def newer_schema(path):
    create_small(path)
    group = zarr.open_group(path)
    group.attrs["wsi_pipeline"] = {**group.attrs["wsi_pipeline"], "schema": 99}


def impossible_grid(path):
    create_small(path)
    group = zarr.open_group(path)
    own = group.attrs["wsi_pipeline"]
    group.attrs["wsi_pipeline"] = {**own, "grid": {**own["grid"], "stride_px": -1}}


def other_shape(path):
    create_small(path)
    group = zarr.open_group(path)
    group.create_array("1", shape=(3, 3), dtype="float32", overwrite=True)


def create_small(path):
    grid = PatchGrid(Bounds(0, 0, 1600, 1600), 0.25, 1.0, 32, 16, 16)
    create_heatmap(path, grid=grid, slide_id="s", model="m")


@pytest.mark.parametrize(
    "damage",
    [nothing, another_image, no_json, lost_level, newer_schema, impossible_grid, other_shape],
)
def test_a_missing_foreign_or_damaged_store_is_named(tmp_path, damage):
    path = tmp_path / "s.zarr"
    damage(path)
    with pytest.raises(RunError, match=r"s\.zarr: no heatmap of this pipeline, or a damaged one"):
        open_heatmap(path)


@pytest.mark.parametrize("content", [b"", b"no zstd frame", None])
@pytest.mark.parametrize("ngff", VERSIONS)
def test_a_damaged_chunk_is_named(tmp_path, grid, truth, ngff, content):
    path = write_heatmap(tmp_path / "s.zarr", grid, truth, ngff=ngff)
    chunk = chunk_file(path, (6, 8), ngff)
    chunk.write_bytes(chunk.read_bytes()[:-9] if content is None else content)
    with pytest.raises(RunError, match=r"s\.zarr: level 0 is damaged"):
        open_heatmap(path).values()


def test_a_heatmap_written_whole_equals_one_written_by_chunks(grid, truth, tmp_path):
    by_chunks = open_heatmap(write_heatmap(tmp_path / "a.zarr", grid, truth))
    options = {"slide_id": "tumor_001", "model": "vgg16", "chunk": 64, "ngff": "0.5"}
    store.write_heatmap(tmp_path / "b.zarr", truth, grid=grid, **options)
    whole = open_heatmap(tmp_path / "b.zarr")
    for level in range(len(whole.levels)):
        np.testing.assert_array_equal(whole.values(level), by_chunks.values(level))
    with pytest.raises(RunError, match=r"b\.zarr: values of shape \(2, 2\) for a grid of \(101"):
        store.write_heatmap(tmp_path / "b.zarr", truth[:2, :2], grid=grid, **options)
