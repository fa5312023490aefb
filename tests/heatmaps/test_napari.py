"""Heatmaps as layers of napari, through the reader of napari-ome-zarr. Neither needs a screen."""

import importlib.metadata

import numpy as np
import pytest
from planted import GRIDS, LESION, lesion_box, planted

from wsi_pipeline.heatmaps.store import write_heatmap


@pytest.fixture
def layer(tmp_path):
    """Makes a heatmap and returns the layer that napari makes of it."""
    why = "napari and napari-ome-zarr are not installed"
    layers = pytest.importorskip("napari.layers", reason=why)
    plugin = pytest.importorskip("napari_ome_zarr", reason=why)

    def make(name, ngff):
        grid, path = GRIDS[name], tmp_path / f"{name}.zarr"
        write_heatmap(
            path, planted(grid), grid=grid, slide_id=name, model="net@1", chunk=16, ngff=ngff
        )
        [(data, options, kind)] = plugin.napari_get_reader(str(path))()
        assert kind == "image"
        return layers.Image(data, **options)

    return make


@pytest.mark.parametrize("ngff", ["0.5", "0.4"])
@pytest.mark.parametrize("name", GRIDS)
def test_the_lesion_lies_where_it_is_on_the_slide(layer, name, ngff):
    shown, grid = layer(name, ngff), GRIDS[name]
    version = importlib.metadata.version("napari-ome-zarr")
    if tuple(map(int, version.split(".")[:2])) >= (0, 9):
        pytest.skip(f"napari-ome-zarr {version} leaves out where an image begins")
    cells = np.argwhere(np.asarray(shown.data[0]) == LESION)
    y_um, x_um = shown.data_to_world(cells.mean(axis=0))
    x0, y0, x1, y1 = lesion_box(grid)
    # um are of pixel centres: the middle of level-0 px (0, 0) is at 0.
    expected = ((x0 + x1) / 2 - 0.5) * grid.mpp, ((y0 + y1) / 2 - 0.5) * grid.mpp
    assert (x_um, y_um) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("ngff", ["0.5", "0.4"])
def test_the_layer_has_the_models_name_a_colour_and_the_range_of_a_probability(layer, ngff):
    shown = layer("plain", ngff)
    assert "net@1" in shown.name and shown.visible and shown.multiscale
    assert list(shown.contrast_limits) == [0, 1]
    assert shown.colormap.colors.tolist() == [[0, 0, 0, 1], [1, 0, 0, 1]]
    assert shown.colormap.nan_color[3] == 0  # no tissue: transparent
    np.testing.assert_array_equal(np.asarray(shown.data[0]), planted(GRIDS["plain"]))
