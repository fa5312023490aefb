"""Explanations of a run made by hand: one slide, one small PatchNet of random weights.

The slide has 256 x 256 px of 0.5 um; patches of 32 px at downsample 2, one each 32 level-0 px, with
inner squares of 16 px: cell (row, col) has its inner square at level-0 px (32 col, 32 row) and its
patch at (32 col - 16, 32 row - 16).
"""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import shapely
import torch
import zarr
from click.testing import CliRunner
from distributed import Client
from slide_files import write_pyramid_tiff

from wsi_pipeline.cli import main
from wsi_pipeline.config import Config, dump_config
from wsi_pipeline.errors import ConfigError, ModelError, RunError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.store import open_heatmap
from wsi_pipeline.jobs.record import read_failures
from wsi_pipeline.models.checkpoint import ModelCard, load_model, read_card, save_model
from wsi_pipeline.models.patchnet import PatchNet
from wsi_pipeline.patches.index import SCHEMA, PatchIndex, write_index
from wsi_pipeline.stages import explain, explain_units, method_checks
from wsi_pipeline.stages.explain_units import map_grid, map_place
from wsi_pipeline.stages.places import Place, annotated_patches, evaluated_places
from wsi_pipeline.stages.run_directory import SLIDE_COLUMNS, evaluation_folder, index_path

GRID = PatchGrid(Bounds(0, 0, 256, 256), 0.5, 2.0, 32, 16, 16)
# Lesion 1 fills cell (3, 3) and halves its neighbours; lesion 2 lies inside cell (1, 6).
LESIONS = (shapely.box(96, 96, 144, 144), shapely.box(200, 40, 216, 56))
SCORES = {(3, 3): 0.9, (3, 4): 0.95, (4, 3): 0.6, (1, 6): 0.3, (6, 1): 0.85, (6, 6): 0.7}
METHODS = ("patchnet", "saliency")


@pytest.fixture(scope="module")
def client():
    """In this process: what is tested here is not Dask."""
    options = {"processes": False, "n_workers": 1, "threads_per_worker": 1}
    with Client(**options, dashboard_address=None, silence_logs=50) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path):
    """A run directory as the evaluate stage leaves it, in what the explain stage reads."""
    rng = np.random.default_rng(0)
    slide = write_pyramid_tiff(
        tmp_path / "s.tif", [rng.integers(0, 255, (256, 256, 3))], tile=64, compression="zlib"
    )
    annotation = tmp_path / "s.geojson"
    annotation.write_text(shapely.to_geojson(shapely.MultiPolygon(LESIONS)))
    row = ("s", str(slide), str(annotation), "p", "test", 1, 0.5, 256, 256, "ok")
    run = tmp_path / "run"
    run.mkdir()
    pd.DataFrame([row], columns=SLIDE_COLUMNS).to_parquet(run / "slides.parquet")
    card = ModelCard(
        architecture="patchnet", arguments={"patch_px": 9, "stride_px": 9, "filters": 3,
        "layers": 2}, mean=(0.5,) * 3, std=(0.25,) * 3, patch_px=32, mpp=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(run / "models/net", PatchNet(**card.arguments), card)
    write_evaluation(run)
    return run


def write_evaluation(run):
    rows, cols = np.indices(GRID.shape).reshape(2, -1)
    inner = shapely.box(*GRID.inner_boxes(rows, cols).T)
    area = np.array([shapely.area(shapely.intersection(inner, lesion)) for lesion in LESIONS])
    x, y = GRID.patch_origins(rows, cols)
    columns = {
        "x": x,
        "y": y,
        "tissue": np.ones(len(x), np.float32),
        "coverage": (area.sum(0) / 32**2).astype(np.float32),
        "label": (area.sum(0) > 0).astype(np.int8),
        "lesions": [[i + 1 for i in range(2) if of_cell[i]] for of_cell in area.T],
    }
    table = pa.table(columns, schema=SCHEMA)
    index_path(run, "s").parent.mkdir()
    write_index(PatchIndex("s", GRID, table), index_path(run, "s"))
    folder = evaluation_folder(run, "net")
    (folder / "slides").mkdir(parents=True)
    scores = [SCORES.get(cell, 0.1) for cell in zip(rows, cols, strict=True)]
    scored = table.append_column("score", pa.array(scores, pa.float32()))
    pa.parquet.write_table(scored, folder / "slides/s.parquet")
    (folder / "slides.csv").write_text("split,slide_id,label\ntest,s,1\n")
    # Detections lie at the centres of cells (6, 1) and (6, 6).
    (folder / "false_positives.csv").write_text(
        "slide_id,probability,x,y\ns,0.85,48,208\ns,0.7,208,208\n"
    )
    write_lesions(folder, "missed")
    (folder / "report.html").write_text('<a class="why" hidden href="x">Why</a>')


def write_lesions(folder, status_of_the_second):
    (folder / "lesions.csv").write_text(
        "slide_id,lesion_id,status,patch_score\n"
        f"s,2,{status_of_the_second},0.3\ns,1,found,0.95\ns,3,missed,-inf\n"
    )


def settings(run, **sections):
    values = {
        "out": run,
        "catalog": {"csv": "slides.csv"},
        "tile": {"level": None, "mpp": 1.0, "patch_px": 32, "stride_px": 16, "inner_px": 16},
        "train": {"name": "net", "model": "patchnet", "weights": "none"},
        "explain": {"methods": METHODS, "top": 1, "patches": 4, "trust_patches": 1},
    }
    for name, section in sections.items():
        values[name] = values[name] | section
    return Config.model_validate(values)


def places(run, top):
    return [(p.kind, p.x, p.y, p.lesion_id) for p in evaluated_places(run, "net", top)]


def test_places_are_the_patches_with_the_highest_probability_there(run):
    """Lesion 1 has cells of 0.9, 0.95 and 0.6; the detection at (48, 208) is cell (6, 1)'s."""
    wrong = ("false-positive", 32 * 1 - 16, 32 * 6 - 16, None)
    missed = ("missed", 32 * 6 - 16, 32 * 1 - 16, 2)
    hit = ("hit", 32 * 4 - 16, 32 * 3 - 16, 1)
    assert places(run, 1) == [wrong, missed, hit]
    second = ("false-positive", 32 * 6 - 16, 32 * 6 - 16, None)
    assert places(run, 2) == [wrong, second, missed, hit]


def test_without_missed_lesions_the_lowest_found_ones_stand_in(run):
    write_lesions(evaluation_folder(run, "net"), "found")
    assert [(kind, lesion) for kind, *_, lesion in places(run, 1)] == [
        ("false-positive", None), ("lowest", 2), ("hit", 1),
    ]  # fmt: skip


def test_patches_that_rank_are_those_partly_annotated(run):
    """Beside cell (3, 3), which is all tumour, and lesion 2 within cell (1, 6)."""
    found = annotated_patches(run, "net", 10, seed=0)
    cells = {((p.y + 16) // 32, (p.x + 16) // 32) for p in found}
    assert cells == {(3, 4), (4, 3), (4, 4), (1, 6)}
    assert annotated_patches(run, "net", 10, seed=0) == found
    assert annotated_patches(run, "net", 2, seed=0) == found[:2]


def test_a_run_explains_each_place_and_its_page_lists_them(run, client):
    outcome = explain.run(settings(run), client)
    # 3 places by 2 methods, 3 pictures, 4 patches by 2 methods, 1 patch by 2 methods.
    assert (outcome.done, outcome.failed) == (6 + 3 + 8 + 2, 0)
    folder = run / "explanations/net"
    table = pd.read_csv(folder / "places.csv")
    assert table["kind"].tolist() == ["false-positive", "missed", "hit"]
    assert table["x_level0"].tolist() == [16, 176, 112]
    assert table["x_um"].tolist() == [8, 88, 56]
    page = (folder / "index.html").read_text()
    for name in table["place"]:
        assert f'id="{name}"' in page
        assert {path.name for path in (folder / name).iterdir()} == {
            "panel.png", "patchnet.zarr", "saliency.zarr",
        }  # fmt: skip
    assert "False positive: no tumour is annotated here" in page
    assert "evaluate again" in page  # 0.85 is what the table says, not this random model
    ranking = pd.read_csv(folder / "ranking.csv")
    assert ranking["auroc"].is_monotonic_decreasing
    assert ranking["patches"].tolist() == [4, 4]
    assert set(pd.read_csv(folder / "trust.csv")["method"]) == set(METHODS)
    layers = pd.read_csv(folder / "similarity.csv")["layer"].unique().tolist()
    assert layers == ["subnet.head", "subnet", "subnet.convolutions.1", "subnet.convolutions.0"]
    assert (run / "evaluation/net/report.html").read_text() == '<a class="why" href="x">Why</a>'


def test_only_what_has_changed_is_done_again(run, client, tmp_path):
    whole = settings(run, explain={"patches": 0, "trust_patches": 0})
    assert explain.run(whole, client).done == 9
    again = explain.run(whole, client)
    assert (again.done, again.skipped) == (0, 9)
    annotation = tmp_path / "s.geojson"
    annotation.write_text(annotation.read_text() + "\n")
    redrawn = explain.run(whole, client)
    assert (redrawn.done, redrawn.skipped) == (3, 6)  # pictures show the annotation, maps do not
    (run / "explanations/net/hit-s-lesion-1/panel.png").unlink()
    assert explain.run(whole, client).done == 1


def test_a_place_asked_for_joins_the_page(run, client):
    whole = settings(run, explain={"patches": 0, "trust_patches": 0})
    explain.run(whole, client)
    explain.run(whole, client, slide="s", at=(0, 0), size=(40, 32), methods=["saliency"])
    page = (run / "explanations/net/index.html").read_text()
    assert page.count("<article") == 4
    assert "Place asked for: no tumour is annotated here" in page
    assert "in 2 patches side by side" in page
    # The evaluation has other places now: those of before go, the one asked for stays.
    write_lesions(evaluation_folder(run, "net"), "found")
    explain.run(whole, client)
    kinds = pd.read_csv(run / "explanations/net/places.csv")["kind"].tolist()
    assert kinds == ["false-positive", "lowest", "hit", "asked"]
    assert not (run / "explanations/net/missed-s-lesion-2").exists()


def test_a_place_asked_for_takes_nothing_off_the_page(run, client):
    """By one method, where the run before was by two, with a place more of a kind than usual."""
    explain.run(settings(run), client, top=2)
    folder = run / "explanations/net"
    before = pd.read_csv(folder / "places.csv")
    assert before["kind"].tolist() == ["false-positive"] * 2 + ["missed", "hit"]
    tables = {name: (folder / f"{name}.csv").read_text() for name in ("ranking", "trust")}
    explain.run(settings(run), client, slide="s", at=(0, 0), methods=["saliency"])
    after = pd.read_csv(folder / "places.csv")
    assert after["place"].tolist() == [*before["place"], "asked-s-0-0"]
    assert {name: (folder / f"{name}.csv").read_text() for name in tables} == tables
    for name in before["place"]:
        shutil.rmtree(folder / name)
    explain.run(settings(run), client, slide="s", at=(0, 0), methods=["saliency"])
    page = (folder / "index.html").read_text()
    assert page.count("PatchNet&#39;s probability</th>") == 2  # ranking, trust


def test_a_picture_is_told_with_the_settings_that_it_was_made_with(run, client):
    """The seed is 1 now: SmoothGrad's map at the origin was made with 0; saliency has no seed."""
    explain.run(settings(run), client, slide="s", at=(0, 0), methods=["smooth_grad"])
    later = settings(run).model_copy(update={"seed": 1})
    explain.run(later, client, slide="s", at=(64, 0), methods=["smooth_grad"])
    explain.run(later, client, slide="s", at=(0, 64), methods=["saliency"])
    page = (run / "explanations/net/index.html").read_text()
    first, second, third = (
        page.split(f'id="asked-s-{place}"')[1].split("</article>")[0]
        for place in ("0-0", "64-0", "0-64")
    )
    assert "Made with seed: 0." in first
    assert "Made with seed: 1." in second
    assert "Made with" not in third
    assert page.count("seed: ") == 2


def test_settings_are_told_where_they_matter(run):
    config = settings(run, explain={"layer": "features.28"})
    assert explain_units.made_with(["saliency"], config) == ""
    assert explain_units.made_with(["grad_cam"], config) == "layer: features.28"
    assert explain_units.made_with(["cam", "clear", "lime"], settings(run)) == (
        "layer: the last convolution, seed: 0"
    )


def failed_units(run):
    return [row.unit for row in read_failures(run) if row.stage == "explain-net"]


def test_failures_stay_until_their_unit_is_done_or_gone(run, client, monkeypatch):
    """Saliency fails at all three places, then at one asked for; narrower runs have other units."""

    def fail(name, **settings):
        raise ModelError(f"no {name} today")

    whole = settings(run, explain={"patches": 0, "trust_patches": 0, "methods": ("saliency",)})
    asked = {"slide": "s", "at": (0, 0)}
    monkeypatch.setattr(explain_units, "bind", fail)
    explain.run(whole, client)
    every = failed_units(run)
    assert len(every) == 3
    explain.run(whole, client, **asked)
    assert failed_units(run) == [*every, "asked-s-0-0/saliency"]
    monkeypatch.undo()
    explain.run(whole, client, methods=["patchnet"])
    assert failed_units(run) == [*every, "asked-s-0-0/saliency"]
    assert all(unit in (run / "explanations/net/index.html").read_text() for unit in every)
    write_lesions(evaluation_folder(run, "net"), "found")  # the missed one is not a place any more
    explain.run(whole, client)
    assert failed_units(run) == ["asked-s-0-0/saliency"]
    explain.run(whole, client, **asked)
    assert failed_units(run) == []


def explained(run, place, method="saliency"):
    """A place's map and its probabilities, by the unit's own function."""
    card = json.loads((run / "models/net/model.json").read_text())
    out = run / f"{place.name}.zarr"
    result = map_place(
        str(run.parent / "s.tif"), 0.5, place.__dict__, method, {}, str(run / "models/net"),
        card["weights_sha256"], "net@0", "0.5", str(out),
    )  # fmt: skip
    return open_heatmap(out).values(), result["probabilities"]


@pytest.mark.parametrize("work", ["map", "ranking", "trust"])
def test_threads_of_a_worker_explain_one_at_a_time(run, monkeypatch, work):
    """What a method sets on the model, another one running meanwhile would see."""
    inside, most = [], []

    def method(model, images):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return torch.ones(len(images), *images.shape[2:])

    for module in (explain_units, method_checks):
        monkeypatch.setattr(module, "bind", lambda name, **settings: method)
    card = read_card(run / "models/net")
    slides = pd.read_parquet(run / "slides.parquet").set_index("slide_id", drop=False)
    places = annotated_patches(run, "net", 3, seed=0)
    units = {
        "map": explain_units.map_units,
        "ranking": method_checks.rank_units,
        "trust": method_checks.trust_units,
    }[work](places, ["saliency"], slides, settings(run), card)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda unit: unit.function(**unit.arguments), units))
    assert len(most) >= 3
    assert max(most) == 1


def test_a_regions_map_is_that_of_its_patches_side_by_side(run):
    """50 x 32 px: a patch, and 18 columns of the one beside it, 64 level-0 px further right."""
    values, probabilities = explained(run, Place("asked", "s", 10, 20, 50, 32, 2.0, 32))
    left, first = explained(run, Place("asked", "s", 10, 20, 32, 32, 2.0, 32))
    right, second = explained(run, Place("asked", "s", 10 + 64, 20, 32, 32, 2.0, 32))
    assert values.shape == (32, 50)
    np.testing.assert_array_equal(values, np.hstack([left, right[:, :18]]))
    assert probabilities == first + second
    assert first != second


def test_a_map_lies_over_the_slide(run):
    """The first working px covers level-0 px 10 and 11: its centre, 10.5, is at 5.25 um."""
    place = Place("asked", "s", 10, 20, 32, 40, 2.0, 32)
    values, _ = explained(run, place)
    assert values.shape == (40, 32)
    group = zarr.open_group(run / f"{place.name}.zarr", mode="r")
    [multiscales] = group.attrs["ome"]["multiscales"]
    scale, translation = multiscales["datasets"][0]["coordinateTransformations"]
    assert scale["scale"] == [1.0, 1.0]  # um: two level-0 px
    assert translation["translation"] == [(20 + 0.5) * 0.5, (10 + 0.5) * 0.5]


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

    opened = explain_units.cached_slide
    monkeypatch.setattr(explain_units, "cached_slide", lambda *of: Counting(opened(*of)))
    monkeypatch.setattr(explain_units, "panels_figure", draw)
    whole, asked = settings(run), {"slide": "s", "at": (0, 0), "size": (900, 420)}
    outcome = explain.run(whole, client, methods=["saliency"], **asked)
    assert (outcome.done, outcome.failed) == (2, 0)
    assert reads[: 29 * 14] == [(32, 32)] * 29 * 14
    assert max(max(size) for size in reads) == 450
    assert drawn == [(210, 450, 3), (210, 450)]


@pytest.mark.parametrize(
    ("side_px", "level"), [(32, 0), (512, 0), (799, 0), (800, 1), (1600, 2), (1599, 1)]
)
def test_a_panel_is_drawn_from_the_coarsest_level_that_is_large_enough(side_px, level):
    place = Place("asked", "s", 0, 0, 32, side_px, 1.0, 32)
    assert explain_units.panel_level(place) == level


@pytest.mark.parametrize("downsample", [1.0, 2.0, 1.9876, 4.000_01, 0.93])
@pytest.mark.parametrize("side_px", [32, 33, 512])
def test_a_maps_grid_has_a_cell_for_each_pixel(downsample, side_px):
    place = Place("asked", "s", 7, -9, side_px, 40, downsample, 32)
    assert map_grid(place, 0.5).shape == (40, side_px)


def test_the_mask_of_a_patch_is_the_annotation_at_its_pixels(run):
    """The patch at (80, 80) reaches from there to 144: tumour from working px 8 on, to its end."""
    place = Place("asked", "s", 80, 80, 32, 32, 2.0, 32)
    slide, annotation = (str(run.parent / name) for name in ("s.tif", "s.geojson"))
    rules = settings(run).catalog.annotation.model_dump()
    expected = np.zeros((32, 32), bool)
    expected[8:, 8:] = True
    found = method_checks.place_mask(slide, 0.5, place, annotation, rules)
    np.testing.assert_array_equal(found, expected)


def test_a_map_of_evidence_against_ranks_by_its_order():
    """The mask has -1 and 2, the rest -3 and 1.

    AUROC: of the 4 pairs of a pixel inside and one outside, 2 > 1, 2 > -3 and -1 > -3 are in
    order: 0.75, where -1 and -3 both as 0 would give (2 + 1/2) / 4. In 0..1 the map is 0, 1, 0,
    1/2, rounded 0, 1, 0, 1: the two in the middle are right, one of two in the mask is found, and
    1 of 1.5 lies inside. Without any evidence for tumour the highest pixel, -1, is one inside,
    where four times 0 would give 1/2.
    """
    mask = np.array([[True, True], [False, False]])
    mixed = torch.tensor([[[-1.0, 2.0], [-3.0, 1.0]]])
    found = method_checks.map_overlap("lime", mixed, mask)
    expected = {
        "exact_match": 0.5, "recall": 0.5, "auroc": 0.75, "pointing_game": 1,
        "energy_inside": 1 / 1.5,
    }  # fmt: skip
    assert found.to_dict() == pytest.approx(expected)
    against = torch.tensor([[[-1.0, -2.0], [-3.0, -4.0]]])
    found = method_checks.map_overlap("lime", against, mask)
    assert (found["auroc"], found["pointing_game"]) == (1, 1)
    q = torch.tensor([[[0.4, 0.2], [0.1, 0.3]]])  # PatchNet's: under 0.5, none is called tumour
    assert method_checks.map_overlap("patchnet", q, mask)["recall"] == 0
    assert method_checks.map_overlap("lime", q, mask)["recall"] == 1  # 0.4 and 0.2 of 0.4


def test_methods_are_ranked_over_patches_of_both_kinds():
    def result(auroc, mixed=True):
        figures = dict.fromkeys(("exact_match", "recall", "pointing_game", "energy_inside"), 0.5)
        return {"mixed": mixed, "seconds": 2.0, "auroc": auroc, **figures}

    results = {
        "s/0,0/saliency": result(0.6), "s/9,9/saliency": result(0.8),
        "s/0,0/lime": result(0.9), "s/9,9/lime": result(None),
        "s/5,5/saliency": result(0.1, mixed=False),
    }  # fmt: skip
    table = method_checks.ranking_table(results)
    assert table["method"].tolist() == ["lime", "saliency"]
    assert table["auroc"].tolist() == pytest.approx([0.9, 0.7])  # of one patch, and of two
    assert table["patches"].tolist() == [2, 2]
    assert method_checks.ranking_table({}).empty


def test_a_method_that_random_weights_do_not_change_gets_a_warning():
    def result(last):
        return {
            "deletion": 0.2, "insertion": 0.8, "layers": ["head", "first"],
            "similarity": [0.9, last],
        }  # fmt: skip

    results = {
        "s/0,0/saliency": result(0.1), "s/9,9/saliency": result(0.3),
        "s/0,0/deconvolution": result(0.7), "s/9,9/deconvolution": result(0.5),
        "s/0,0/grad_cam": result(0.8), "s/9,9/grad_cam": result(None),
        "s/0,0/clear": result(None), "s/9,9/clear": result(None),
    }  # fmt: skip
    trust, layers = method_checks.trust_tables(results)
    assert trust["similarity"].tolist() == pytest.approx([0.2, 0.6, 0.8, np.nan], nan_ok=True)
    assert trust["compared"].tolist() == [2, 2, 1, 0]
    # Grad-CAM's other map vanished: (0.8 + 0) / 2 is under 0.5.
    assert trust["warning"].str.len().gt(0).tolist() == [False, True, False, False]
    assert "0.60 on 2 of 2 patches" in trust["warning"][1]
    assert layers["layer"].tolist() == ["head", "first"] * 4


def test_maps_that_are_constant_under_random_weights_get_no_warning():
    """0.9 with a random head alone says nothing of all weights: there nothing can be compared."""
    result = {
        "deletion": 0.2, "insertion": 0.8, "layers": ["head", "first"], "similarity": [0.9, None],
    }  # fmt: skip
    trust, layers = method_checks.trust_tables({"s/0,0/clear": result, "s/9,9/clear": result})
    assert trust["similarity"].isna().all()
    assert trust["warning"].tolist() == [""]
    assert layers["patches"].tolist() == [2, 0]


def test_layers_become_random_from_the_head_down(run):
    model, _ = load_model(run / "models/net")
    assert method_checks.cascade_layers(model) == [
        "subnet.head", "subnet", "subnet.convolutions.1", "subnet.convolutions.0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"methods": ["salience"]}, ConfigError, "'salience' is not known; there are patchnet"),
        ({"methods": ["grad_cam"]}, ModelError, "grad_cam is not for a model 'patchnet'"),
        ({"slide": "s"}, ConfigError, "--slide is given without --at"),
        ({"at": (0, 0)}, ConfigError, "--at is given without --slide"),
        ({"size": (64, 64)}, ConfigError, "--size is given without"),
        ({"slide": "z", "at": (0, 0)}, RunError, "slide 'z' is not among the 1 readable"),
        (
            {"slide": "s", "at": (0, 256)},
            ConfigError,
            r"\(0, 256\).*lies off slide s \(.*s\.tif\), which has x 0 to 256, y 0 to 256",
        ),
        ({"slide": "s", "at": (-64, 0)}, ConfigError, "lies off slide s"),
        ({"slide": "s", "at": (0, 0), "size": (31, 64)}, ConfigError, "31 x 64 px: it must be"),
    ],
)
def test_what_cannot_be_explained_is_refused(run, arguments, error, message):
    with pytest.raises(error, match=message):
        explain.run(settings(run), None, **arguments)


def test_a_layer_that_is_not_there_is_refused(run):
    with pytest.raises(ModelError, match=r"'features\.9' is not in the model; its conv"):
        explain.run(settings(run, explain={"layer": "features.9"}), None)


def test_without_an_evaluation_a_place_must_be_asked_for(run, client):
    (run / "evaluation/net/lesions.csv").unlink()
    with pytest.raises(RunError, match=r"lesions\.csv does not exist: run the evaluate stage"):
        explain.run(settings(run), None)
    assert explain.run(settings(run), client, slide="s", at=(-32, 0)).done == 3


def test_an_evaluation_older_than_the_catalog_is_refused(run, client):
    """A place can still be asked for, on a slide that is there."""
    slides = pd.read_parquet(run / "slides.parquet").assign(slide_id="t")
    slides.to_parquet(run / "slides.parquet")
    with pytest.raises(RunError, match=r"'s' of the evaluation is not .* again"):
        explain.run(settings(run), None)
    place = annotated_patches(run, "net", 1, seed=0)
    card = read_card(run / "models/net")
    for units in (method_checks.rank_units, method_checks.trust_units):
        with pytest.raises(RunError, match="evaluate again"):
            units(place, METHODS, slides.set_index("slide_id"), settings(run), card)
    assert explain.run(settings(run), client, slide="t", at=(0, 0)).done == 3


def test_the_verb_shows_a_mistake_without_a_traceback(run, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(settings(run)))
    for arguments, message in (
        (["--at", "1,2"], "--at is given without --slide"),
        (["--slide", "s", "--at", "1;2"], "is no place: write it as 1024,2048"),
    ):
        done = CliRunner().invoke(main, ["explain", "-c", str(path), *arguments])
        assert done.exit_code == 2
        assert message in done.output
        assert "Traceback" not in done.output
