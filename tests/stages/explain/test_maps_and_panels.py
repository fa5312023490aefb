"""Maps and pictures of places of the run made by hand, see explain_run.py."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from explain_run import run_stage, settings

from wsi_pipeline.heatmaps.store import open_heatmap
from wsi_pipeline.jobs.unit import LargeFile, Output
from wsi_pipeline.models.card import read_card
from wsi_pipeline.report.explanation_panels import colour_limits
from wsi_pipeline.stages.explain import checks, maps_and_panels
from wsi_pipeline.stages.explain.maps_and_panels import map_grid
from wsi_pipeline.stages.explain.methods import ALL_METHODS
from wsi_pipeline.stages.explain.places import Place, annotated_patches


def test_settings_are_told_where_they_matter(run):
    config = settings(run, explain={"layer": "features.28"})
    assert maps_and_panels.made_with(["saliency"], config) == ""
    assert maps_and_panels.made_with(["grad_cam"], config) == "layer: features.28"
    assert maps_and_panels.made_with(["cam", "clear", "lime"], settings(run)) == (
        "layer: the last convolution, seed: 0"
    )


def test_a_place_is_told_as_at_takes_it_and_in_um():
    place = Place("s", 100, -64, 32, 32, 2.0, 32, "asked")
    # 100 and -64 px of 0.5 um; 32 working px of 2 level-0 px of 0.5 um.
    assert maps_and_panels._where(place, 0.5, [0.25]) == (
        "slide s, upper left corner at level-0 px 100,-64 (x 50 µm, y -32 µm), 32 x 32 µm;"
        " probability of tumour F(I) = 0.250"
    )


def explained(run, place, method="saliency"):
    """A place's map and its probabilities."""
    out = run / f"{place.name}.zarr"
    unit = maps_and_panels.MapPlace(
        "s", LargeFile.at(run.parent / "s.tif"), 0.5, place.pixels, place.name, method, {},
        maps_and_panels.trained_model(settings(run), read_card(run / "models/net")),
        "0.5", Output(out),
    )  # fmt: skip
    probabilities = unit.run()["probabilities"]
    return open_heatmap(out).values(), probabilities


@pytest.mark.parametrize("work", ["map", "ranking", "trust"])
def test_threads_of_a_worker_explain_one_at_a_time(run, monkeypatch, work):
    """What a method sets on the model, another one running meanwhile would see."""
    inside, most = [], []
    saliency = ALL_METHODS["saliency"]

    def method(model, images, **settings):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return torch.ones(len(images), *images.shape[2:])

    monkeypatch.setitem(ALL_METHODS, "saliency", replace(saliency, function=method))
    card = read_card(run / "models/net")
    slides = pd.read_parquet(run / "slides.parquet").set_index("slide_id", drop=False)
    places = annotated_patches(run, "net", 3, seed=0)
    of_work = {
        "map": maps_and_panels.map_units,
        "ranking": checks.rank_units,
        "trust": checks.trust_units,
    }[work](places, ["saliency"], slides, settings(run), card)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda unit: unit.run(), of_work))
    assert len(most) >= 3
    assert max(most) == 1


def test_a_regions_map_is_that_of_its_patches_side_by_side(run):
    """50 x 32 px: a patch, and 18 columns of the one beside it, 64 level-0 px further right."""
    values, probabilities = explained(run, Place("s", 10, 20, 50, 32, 2.0, 32, "asked"))
    left, first = explained(run, Place("s", 10, 20, 32, 32, 2.0, 32, "asked"))
    right, second = explained(run, Place("s", 10 + 64, 20, 32, 32, 2.0, 32, "asked"))
    assert values.shape == (32, 50)
    np.testing.assert_array_equal(values, np.hstack([left, right[:, :18]]))
    assert probabilities == first + second
    assert first != second


def test_a_map_lies_over_the_slide(run):
    """The first working px covers level-0 px 10 and 11: its centre, 10.5, is at 5.25 um."""
    place = Place("s", 10, 20, 32, 40, 2.0, 32, "asked")
    values, _ = explained(run, place)
    assert values.shape == (40, 32)
    group = zarr.open_group(run / f"{place.name}.zarr", mode="r")
    [multiscales] = group.attrs["ome"]["multiscales"]
    scale, translation = multiscales["datasets"][0]["coordinateTransformations"]
    assert scale["scale"] == [1.0, 1.0]  # um: two level-0 px
    assert translation["translation"] == [(20 + 0.5) * 0.5, (10 + 0.5) * 0.5]


@pytest.mark.parametrize(
    ("method", "title"), [("saliency", "Saliency"), ("occlusion", "Occlusion")]
)
def test_viewers_show_a_map_in_the_methods_units(run, method, title):
    """Colours end where they end in the picture; 0 is in the middle where signs mean something."""
    place = Place("s", 10, 20, 32, 40, 2.0, 32, "asked")
    values, _ = explained(run, place, method)
    group = zarr.open_group(run / f"{place.name}.zarr", mode="r")
    [channel] = group.attrs["ome"]["omero"]["channels"]
    assert channel["label"] == f"{title}, {open_heatmap(run / f'{place.name}.zarr').model}"
    low, high = channel["window"]["start"], channel["window"]["end"]
    assert (low, high) == colour_limits(values, signed=method == "occlusion")
    assert high != 1 and low == (-high if method == "occlusion" else 0)


def test_a_large_place_is_read_patch_by_patch_and_drawn_small(run, client, monkeypatch):
    """900 x 420 working px: 29 x 14 patches of 32 px; 900 / 2 is 400 or more, 900 / 4 is not."""
    reads, drawn = [], []

    class Counting:
        def __init__(self, slide):
            self.slide = slide

        def __getattr__(self, name):
            return getattr(self.slide, name)

        def read(self, x, y, width_px, height_px, downsample):
            reads.append((width_px, height_px))
            return self.slide.read(x, y, width_px, height_px, downsample)

    def draw(image, shown, around, around_shown, lesions, panels, **words):
        drawn.extend([image.shape, *(panel.values.shape for panel in panels)])
        return b"picture"

    opened = maps_and_panels.cached_slide
    monkeypatch.setattr(maps_and_panels, "cached_slide", lambda *of: Counting(opened(*of)))
    monkeypatch.setattr(maps_and_panels, "panels_figure", draw)
    whole, asked = settings(run), {"slide": "s", "at": (0, 0), "size": (900, 420)}
    outcome = run_stage(whole, client, methods=["saliency"], **asked)
    assert (outcome.done, outcome.failed) == (2, 0)
    assert reads[: 29 * 14] == [(32, 32)] * 29 * 14
    assert max(max(size) for size in reads) == 450
    assert drawn == [(210, 450, 3), (210, 450)]


@pytest.mark.parametrize(
    ("side_px", "level"), [(32, 0), (512, 0), (799, 0), (800, 1), (1600, 2), (1599, 1)]
)
def test_a_panel_is_drawn_from_the_coarsest_level_that_is_large_enough(side_px, level):
    place = Place("s", 0, 0, 32, side_px, 1.0, 32, "asked")
    assert maps_and_panels.panel_level(place) == level


@pytest.mark.parametrize("downsample", [1.0, 2.0, 1.9876, 4.000_01, 0.93])
@pytest.mark.parametrize("side_px", [32, 33, 512])
def test_a_maps_grid_has_a_cell_for_each_pixel(downsample, side_px):
    place = Place("s", 7, -9, side_px, 40, downsample, 32, "asked")
    assert map_grid(place, 0.5).shape == (40, side_px)
