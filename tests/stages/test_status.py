"""What `wsi status` counts as done: what is on record and still holds."""

import json
import shutil

import pandas as pd
import pytest

from wsi_pipeline.config import CatalogConfig, Config, HeatmapConfig, TrainConfig
from wsi_pipeline.config_file import dump_config
from wsi_pipeline.stages.run_directory import SLIDE_COLUMNS
from wsi_pipeline.stages.status import stage_status

STAGES = ("tile", "cache", "train", "heatmap-net", "evaluate-net")


def record(run, stage, keys, minute, **result):
    """Put units on record as finished at a minute of an hour."""
    time = f"2026-01-01T00:{minute:02}:00+00:00"
    lines = [{"key": k, "hash": "", "finished": time, "seconds": 1, "result": result} for k in keys]
    with (run / "done" / f"{stage}.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def train(run, weights):
    card = {"weights_sha256": weights, "training": {}}
    (run / "models/net/model.json").write_text(json.dumps(card))


def predict(run, weights, slides, minute):
    for slide in slides:
        store = run / f"heatmaps/net/{slide}.zarr"
        store.mkdir(parents=True, exist_ok=True)
    record(run, "heatmap-net", slides, minute, model=f"net@{weights}")


def settings(run, splits):
    config = Config(
        out=run, catalog=CatalogConfig(csv="slides.csv"), train=TrainConfig(name="net"),
        heatmap=HeatmapConfig(splits=splits),
    )  # fmt: skip
    (run / "config.yaml").write_text(dump_config(config))


@pytest.fixture
def run(tmp_path):
    """Slides a to d, cached, predicted and evaluated; only their files, no pixels."""
    slides = list("abcd")
    rows = [(s, f"{s}.tif", None, s, "validation", 1, 0.5, 64, 64, "ok") for s in slides]
    pd.DataFrame(rows, columns=SLIDE_COLUMNS).to_parquet(tmp_path / "slides.parquet")
    for folder in ("done", "patches", "models/net", "evaluation/net/slides"):
        (tmp_path / folder).mkdir(parents=True)
    for slide in slides:
        (tmp_path / f"patches/{slide}.parquet").touch()
        (tmp_path / f"cache/{slide}.zarr").mkdir(parents=True)
        (tmp_path / f"evaluation/net/slides/{slide}.jpg").touch()
    settings(tmp_path, splits=("validation",))
    record(tmp_path, "tile", slides, 0)
    record(tmp_path, "cache", slides, 1)
    train(tmp_path, "old")
    record(tmp_path, "train", ["net"], 2)
    predict(tmp_path, "old", slides, 3)
    record(tmp_path, "evaluate-net", slides, 4)
    return tmp_path


def counts(run):
    return {row.stage: (row.done, row.left) for row in stage_status(run) if row.stage in STAGES}


def test_all_that_is_on_record_and_there_is_done(run):
    done = dict.fromkeys(STAGES, (4, 0))
    assert counts(run) == done | {"train": (1, 0)}


@pytest.mark.parametrize(
    ("output", "stage"),
    [
        ("patches/b.parquet", "tile"),
        ("cache/b.zarr", "cache"),
        ("evaluation/net/slides/b.jpg", "evaluate-net"),
    ],
)
def test_what_has_lost_its_output_is_left(run, output, stage):
    path = run / output
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert counts(run) == dict.fromkeys(STAGES, (4, 0)) | {"train": (1, 0), stage: (3, 1)}


def test_a_model_that_is_gone_is_left(run):
    (run / "models/net/model.json").unlink()
    assert counts(run)["train"] == (0, 1)


def test_the_evaluation_of_a_heatmap_that_is_gone_is_left_with_it(run):
    shutil.rmtree(run / "heatmaps/net/b.zarr")
    found = counts(run)
    assert (found["heatmap-net"], found["evaluate-net"]) == ((3, 1), (3, 1))


def test_heatmaps_of_other_weights_are_left_and_so_are_evaluations_of_earlier_heatmaps(run):
    train(run, "new")
    found = counts(run)
    assert (found["heatmap-net"], found["evaluate-net"]) == ((0, 4), (0, 4))
    predict(run, "new", ["a", "b", "c"], 5)
    record(run, "evaluate-net", ["a"], 6)  # b and c were last evaluated at minute 4
    found = counts(run)
    assert (found["heatmap-net"], found["evaluate-net"]) == ((3, 1), (1, 3))


def test_another_model_of_the_run_does_not_stand_for_todays(run):
    (run / "models/other").mkdir()
    shutil.copy(run / "models/net/model.json", run / "models/other/model.json")
    record(run, "train", ["other"], 5)
    assert counts(run)["train"] == (1, 0)
    (run / "models/net/model.json").unlink()
    assert counts(run)["train"] == (0, 1)


def test_heatmaps_of_splits_that_are_no_longer_asked_for_do_not_count(run):
    slides = pd.read_parquet(run / "slides.parquet")
    slides.loc[slides["slide_id"].isin(["c", "d"]), "split"] = "test"
    slides.to_parquet(run / "slides.parquet")
    for slide in "cd":
        shutil.rmtree(run / f"heatmaps/net/{slide}.zarr")
    settings(run, splits=("test",))
    found = counts(run)
    assert (found["heatmap-net"], found["evaluate-net"]) == ((0, 2), (0, 2))


def test_slides_that_could_not_be_opened_are_counted(run):
    slides = pd.read_parquet(run / "slides.parquet")
    slides.loc[slides["slide_id"] == "d", "status"] = "failed"
    slides.to_parquet(run / "slides.parquet")
    record(run, "catalog", ["a", "b"], 0)
    row = "catalog,d,d,SlideError,no such file,2026-01-01T00:00:00+00:00"
    (run / "failures.csv").write_text(f"stage,slide_id,unit,error,reason,time\n{row}\n")
    catalog = next(row for row in stage_status(run) if row.stage == "catalog")
    assert (catalog.done, catalog.failed, catalog.left) == (2, 1, 1)
