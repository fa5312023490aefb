"""A model that left its run, applied to new slides: equal heatmaps, named failures, resumption."""

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr
from command_line import WSI, wait_until, wsi
from distributed import Client
from slide_files import write_pyramid_tiff

from wsi_pipeline.command import write_settings
from wsi_pipeline.config import CatalogConfig, Config, HeatmapConfig, TileConfig
from wsi_pipeline.jobs.record import read_done
from wsi_pipeline.jobs.run import Outcome
from wsi_pipeline.models.card import ModelCard, Thresholds, read_card, write_card
from wsi_pipeline.models.checkpoint import copy_model, save_model
from wsi_pipeline.models.start import start_model
from wsi_pipeline.patches.index import read_index
from wsi_pipeline.stages import heatmap, predictions, tile
from wsi_pipeline.stages.new_slides import begin, settings_for

TILING = {"stride_px": 32, "inner_px": 32}
MPP = 2.0


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cohort")
    wsi("phantom", out, "--slides", 3, "--size", "1100x1100", "--mpp", 1, "--seed", 6)
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model folder of random weights, under another name than the model's own."""
    folder = tmp_path_factory.mktemp("model") / "sent"
    card = ModelCard(
        architecture="vgg16", name="vgg16", mean=(0.5,) * 3, std=(0.25,) * 3, patch_px=32, mpp=MPP,
        tiling=TILING, thresholds=Thresholds(slide=0.5, patch=0.5),
        training={"slides": {"train": ["phantom_001"]}, "patients": {}},
    )  # fmt: skip
    save_model(folder, start_model("vgg16", "none", seed=3), card)
    return folder


@pytest.fixture(scope="module")
def predicted(cohort, model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("predicted") / "out"
    wsi("predict", model, cohort / "slides", "--out", out, "--precision", "float32")
    return out


@pytest.fixture(scope="module")
def client():
    options = {"processes": False, "n_workers": 1, "threads_per_worker": 1, "silence_logs": 50}
    with Client(**options, dashboard_address="127.0.0.1:0") as client:
        yield client


def predict(client, model, slides, out, **options) -> dict[str, Outcome]:
    """As the verb does, with a worker in this process: what each stage came to."""
    card = read_card(model)
    name = card.name or model.name
    config = settings_for(card, name, slides, out, precision="float32", **options)
    out.mkdir(exist_ok=True)
    begin(config, model, slides)
    write_settings(config)
    stages = {"tile": tile, "heatmap": heatmap, "predictions": predictions}
    return {name: stage.run(config, client) for name, stage in stages.items()}


def heatmap_values(run: Path) -> dict[str, np.ndarray]:
    stores = sorted(run.glob("heatmaps/*/[!.]*.zarr"))
    return {store.name: zarr.open_group(store, mode="r")["0"][:] for store in stores}


def assert_same_values(found, expected):
    assert found.keys() == expected.keys() and expected
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_heatmaps_equal_those_of_the_heatmap_stage_bit_for_bit(
    predicted, cohort, model, client, tmp_path
):
    config = Config(
        out=tmp_path,
        catalog=CatalogConfig(csv=cohort / "slides.csv", split={"test": 1}),
        tile=TileConfig(level=None, mpp=MPP, patch_px=32, **TILING),
        heatmap=HeatmapConfig(precision="float32"),
    )
    copy_model(model, tmp_path / "models/vgg16")
    tile.run(config, client)
    heatmap.run(config, client)
    assert_same_values(heatmap_values(predicted), heatmap_values(tmp_path))


def test_the_table_says_what_the_heatmaps_hold(predicted):
    table = pd.read_csv(predicted / "predictions/vgg16/slides.csv").set_index("slide_id")
    for name, values in heatmap_values(predicted).items():
        row = table.loc[name.removesuffix(".zarr")]
        assert row["score"] == pytest.approx(np.nanmax(values), rel=1e-5)
        assert row["patches"] == np.isfinite(values).sum()
        assert row["called"] == ("tumour" if np.nanmax(values) >= 0.5 else "no tumour")
        # A heatmap pixel is 32 x 32 px of 2 um: 0.004096 mm2; some reach over the slide's edge.
        above = (values >= 0.5).sum() * 0.004096
        assert above * 0.8 <= row["area_above_mm2"] <= above + 1e-9
        assert 0 < row["tissue_mm2"] < 1.21
        detections = pd.read_csv(predicted / f"predictions/vgg16/detections/{row.name}.csv")
        assert row["detections"] >= len(detections.index) > 0
    assert table["score"].is_monotonic_decreasing


def test_the_page_tells_of_slides_that_the_model_has_seen(predicted):
    page = (predicted / "predictions/vgg16/index.html").read_text()
    assert page.count("the model was trained or validated on this slide") == 1
    assert "says nothing about a validation" in page


def test_a_second_call_does_nothing_again_and_another_stride_all_anew(
    predicted, cohort, model, client, tmp_path
):
    out = tmp_path / "out"
    first = predict(client, model, [cohort / "slides"], out)
    assert (first["tile"].done, first["predictions"].done) == (6, 3)
    assert_same_values(heatmap_values(out), heatmap_values(predicted))
    again = predict(client, model, [cohort / "slides"], out)
    assert [outcome.done for outcome in again.values()] == [0, 0, 0]
    predict(client, model, [cohort / "slides"], out, stride_px=64)
    # 550 px: inner squares of 32 px at every 64 px cover them in 1 + ceil(518 / 64).
    assert heatmap_values(out)["phantom_000.zarr"].shape == (10, 10)


def test_slides_that_cannot_be_predicted_are_named_and_the_rest_goes_on(
    cohort, model, client, tmp_path
):
    pixels = np.full((600, 600, 3), 230, np.uint8)
    (tmp_path / "unreadable.tif").write_bytes(b"not a slide")
    write_pyramid_tiff(tmp_path / "unstated.tif", [pixels])
    write_pyramid_tiff(tmp_path / "coarse.tif", [pixels], mpp=4.0)
    table = tmp_path / "slides.csv"
    good = cohort / "slides/phantom_000.tif"
    table.write_text(
        "slide_id,path\nunreadable,unreadable.tif\nunstated,unstated.tif\ncoarse,coarse.tif\n"
        f"good,{good}\n"
    )
    out = tmp_path / "out"
    outcomes = predict(client, model, [table], out)
    assert sum(outcome.failed for outcome in outcomes.values()) == 3
    failures = pd.read_csv(out / "failures.csv").set_index("unit")["reason"]
    assert sorted(failures.index) == ["coarse", "unreadable", "unstated"]
    assert "resolution" in failures["unstated"]
    assert "2.0 um per px is asked for; the slide was scanned at 4" in failures["coarse"]
    rows = pd.read_csv(out / "predictions/vgg16/slides.csv").set_index("slide_id")
    assert rows["status"].to_dict() == {
        "good": "ok", "unreadable": "failed", "unstated": "failed", "coarse": "failed",
    }  # fmt: skip
    assert list(heatmap_values(out)) == ["good.zarr"]


@pytest.mark.slow
def test_a_prediction_that_was_killed_goes_on_to_the_same_results(
    predicted, cohort, model, tmp_path
):
    out = tmp_path / "out"
    arguments = ["predict", model, cohort / "slides", "--out", out, "--precision", "float32"]
    client = subprocess.Popen(
        [*WSI, *map(str, arguments)], stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_until(lambda: len(read_done(out, "predict-vgg16")) >= 1)
    os.killpg(client.pid, signal.SIGKILL)
    client.wait()
    wsi(*arguments)
    assert_same_values(heatmap_values(out), heatmap_values(predicted))
    for name in ("predictions/vgg16/slides.csv", "predictions/vgg16/detections/phantom_000.csv"):
        assert (out / name).read_text() == (predicted / name).read_text()


def test_the_same_slide_twice_is_predicted_twice_with_a_note(cohort, model, client, tmp_path):
    for name in ("one.tif", "two.tif"):
        (tmp_path / name).write_bytes((cohort / "slides/phantom_000.tif").read_bytes())
    predict(client, model, [tmp_path / "one.tif", tmp_path / "two.tif"], tmp_path / "out")
    assert len(heatmap_values(tmp_path / "out")) == 2
    assert "copies of one slide: one" in (tmp_path / "out/notes.txt").read_text()


@pytest.mark.parametrize(
    ("slides", "message"),
    [
        (["missing.svs"], "missing.svs does not exist. Give slide files, a folder or a table"),
        ([".", "slides.csv"], "Give one folder, one table (.csv), or any number of slide files"),
    ],
)
def test_what_is_no_list_of_slides_is_refused(model, tmp_path, monkeypatch, slides, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slides.csv").touch()
    done = wsi("predict", model, *slides, check=False)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "predictions").exists()


def test_a_folder_of_other_things_is_not_predicted_into(model, cohort, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = wsi("predict", model, cohort / "slides", "--out", tmp_path, check=False)
    assert done.returncode == 2 and "holds thesis.txt" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"thesis.txt", ".lock"}


def test_a_table_may_hold_labels_and_splits_which_play_no_part(
    predicted, cohort, model, client, tmp_path
):
    out = tmp_path / "out"
    slides = pd.read_csv(cohort / "slides.csv").assign(split="train", label=0)
    slides["path"] = [str(cohort / path) for path in slides["path"]]
    slides["annotation"] = [str(tmp_path / f"{n} is not there.xml") for n in range(len(slides))]
    columns = ["slide_id", "path", "annotation", "split", "label"]
    slides[columns].to_csv(tmp_path / "slides.csv", index=False)
    predict(client, model, [tmp_path / "slides.csv"], out)
    assert_same_values(heatmap_values(out), heatmap_values(predicted))


def test_evaluating_slides_without_labels_is_refused_in_a_sentence(predicted):
    done = wsi("evaluate", "-c", predicted / "config.yaml", check=False)
    assert done.returncode == 2 and "None of the 3 test slides" in done.stderr


def test_a_card_without_thresholds_calls_no_slide(cohort, model, client, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "model.safetensors").symlink_to(model / "model.safetensors")
    write_card(plain, replace(read_card(model), thresholds=Thresholds(), name="", tiling={}))
    predict(client, plain, [cohort / "slides/phantom_000.tif"], tmp_path / "out")
    table = pd.read_csv(tmp_path / "out/predictions/plain/slides.csv")
    assert table["called"].isna().all() and table["patch_threshold"].tolist() == [0.75]
    page = (tmp_path / "out/predictions/plain/index.html").read_text()
    assert "The model has no slide threshold, so no slide is called" in page
    grid = read_index(tmp_path / "out/patches/phantom_000.parquet").grid
    assert (grid.stride_px, grid.inner_px, grid.patch_px) == (16, 16, 32)
    assert json.loads((tmp_path / "out/models/plain/model.json").read_text())["mpp"] == MPP
