"""Heatmaps in both versions of NGFF, read by the loaders of Viv (through Node)."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from planted import GRIDS, LESION, lesion_box, planted

from wsi_pipeline.heatmaps.ngff import Channel
from wsi_pipeline.heatmaps.store import open_heatmap, write_heatmap

HARNESS = Path(__file__).parents[1] / "foreign" / "viv"
VERSIONS = ["0.5", "0.4"]
CASES = [(name, ngff) for name in GRIDS for ngff in VERSIONS]


def store_name(name, ngff):
    return f"{name} {ngff}.zarr"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store of each geometry and version, and one of values that are no probabilities."""
    folder = tmp_path_factory.mktemp("viv")
    for name, ngff in CASES:
        grid = GRIDS[name]
        write_heatmap(
            folder / store_name(name, ngff), planted(grid),
            grid=grid, slide_id=name, model="net@1", chunk=16, ngff=ngff,
        )  # fmt: skip
    grid = GRIDS["plain"]
    write_heatmap(
        folder / "map.zarr", 4 * planted(grid) - 2, grid=grid, slide_id="plain", model="net@1",
        chunk=64, ngff="0.5", channel=Channel("CLEAR, net@1", -1.5, 1.5),
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def by_viv(folder):
    """What Viv reads, by the store's name."""
    if shutil.which("node") is None:
        pytest.skip("Node is not installed")
    if not (HARNESS / "node_modules").is_dir():
        pytest.skip("Viv is not installed: npm ci --prefix tests/foreign/viv")
    names = sorted(store.name for store in folder.iterdir())
    done = subprocess.run(
        ["node", HARNESS / "read.mjs", folder, *names], capture_output=True, text=True, check=True
    )
    return dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))


def pixels(level, key="values"):
    """A level's values; NaN where JSON has null."""
    return np.array(level[key], np.float32).reshape(level["shape"])


@pytest.mark.parametrize(("name", "ngff"), CASES)
def test_viv_reads_every_level_as_written(folder, by_viv, name, ngff):
    heatmap = open_heatmap(folder / store_name(name, ngff))
    levels = by_viv[store_name(name, ngff)]["levels"]
    assert len(levels) == len(heatmap.levels) > 1
    for number, level in enumerate(levels):
        assert (level["dtype"], level["labels"], level["tile_px"]) == ("Float32", ["y", "x"], 16)
        np.testing.assert_array_equal(pixels(level), heatmap.values(number))
        np.testing.assert_array_equal(pixels(level, "tiles"), heatmap.values(number))
    assert np.isnan(pixels(levels[0])[:5]).all()


@pytest.mark.parametrize(("name", "ngff"), CASES)
def test_viv_finds_the_lesion_where_it_is_on_the_slide(by_viv, name, ngff):
    grid, found = GRIDS[name], by_viv[store_name(name, ngff)]
    rows, cols = np.nonzero(pixels(found["levels"][0]) == LESION)
    dataset = found["metadata"]["multiscales"][0]["datasets"][0]
    scale, translation = dataset["coordinateTransformations"]
    y_um, x_um = np.array([rows.mean(), cols.mean()]) * scale["scale"] + translation["translation"]
    # NGFF places pixel centres: level-0 px (0, 0) is at 0 um, its corner half a px before it.
    x_px, y_px = x_um / grid.mpp + 0.5, y_um / grid.mpp + 0.5
    x0, y0, x1, y1 = lesion_box(grid)
    assert (x_px, y_px) == pytest.approx(((x0 + x1) / 2, (y0 + y1) / 2), abs=0.01)


@pytest.mark.parametrize("ngff", VERSIONS)
def test_viv_is_told_the_models_name_a_colour_and_the_range_of_a_probability(by_viv, ngff):
    [channel] = by_viv[store_name("plain", ngff)]["metadata"]["omero"]["channels"]
    assert (channel["label"], channel["color"], channel["active"]) == ("net@1", "FF0000", True)
    assert channel["window"] == {"min": 0, "max": 1, "start": 0, "end": 1}


def test_viv_is_told_the_range_of_other_values(by_viv):
    [channel] = by_viv["map.zarr"]["metadata"]["omero"]["channels"]
    assert channel["label"] == "CLEAR, net@1"
    assert channel["window"] == {"min": -1.5, "max": 1.5, "start": -1.5, "end": 1.5}
