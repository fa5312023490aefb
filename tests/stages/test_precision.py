"""Which precision a run computes in, with two workers in this process."""

import json
from itertools import cycle

import pytest
from distributed import Client, LocalCluster

from wsi_pipeline.config import CatalogConfig, Config, HeatmapConfig, TrainConfig
from wsi_pipeline.errors import RunError
from wsi_pipeline.stages import precision as stage
from wsi_pipeline.stages.precision import decide_precision


@pytest.fixture(scope="module")
def client():
    options = {"processes": False, "n_workers": 2, "threads_per_worker": 1}
    options |= {"dashboard_address": "127.0.0.1:0"}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        yield client


@pytest.fixture
def workers(monkeypatch):
    """Say what the two workers compute fastest in."""

    def compute_fastest_in(*natives):
        of_next = cycle(natives)
        monkeypatch.setattr(stage, "native_precision", lambda device: next(of_next))

    return compute_fastest_in


def config(run, **heatmap) -> Config:
    return Config(
        out=run, catalog=CatalogConfig(csv="slides.csv"),
        train=TrainConfig(), heatmap=HeatmapConfig(**heatmap),
    )  # fmt: skip


def decided(run, client, **heatmap) -> str:
    return decide_precision(config(run, **heatmap), client, "heatmap").heatmap.precision


@pytest.mark.parametrize(
    ("natives", "expected"),
    [(("bfloat16", "bfloat16"), "bfloat16"), (("float32", "float32"), "float32"),
     (("bfloat16", "float32"), "float32")],
)  # fmt: skip
def test_a_run_begins_in_bfloat16_only_if_all_workers_have_it(
    tmp_path, client, workers, natives, expected
):
    workers(*natives)
    assert decided(tmp_path, client) == expected
    assert json.loads((tmp_path / "precision.json").read_text()) == {"heatmap": expected}


@pytest.mark.parametrize("began", ["float32", "bfloat16"])
def test_other_workers_go_on_in_the_precision_that_a_run_began_with(
    tmp_path, client, workers, began, caplog
):
    workers(began, began)
    decided(tmp_path, client)
    other = {"float32": "bfloat16", "bfloat16": "float32"}[began]
    workers(other, other)
    assert decided(tmp_path, client) == began
    emulated = "2 of 2 workers have no instructions for it" in caplog.text
    assert emulated == (began == "bfloat16")


@pytest.mark.parametrize("setting", ["float32", "bfloat16"])
def test_a_setting_is_obeyed_whatever_the_workers_have_or_the_run_began_with(
    tmp_path, client, workers, setting
):
    workers("bfloat16", "float32")
    decided(tmp_path, client)
    assert decided(tmp_path, client, precision=setting) == setting
    assert json.loads((tmp_path / "precision.json").read_text()) == {"heatmap": "float32"}


@pytest.mark.parametrize(("gpu", "expected"), [(False, "float32"), (True, "bfloat16")])
def test_training_is_in_bfloat16_on_gpus_alone(
    tmp_path, client, workers, monkeypatch, gpu, expected
):
    workers("bfloat16", "bfloat16")
    monkeypatch.setattr(stage.torch.cuda, "is_available", lambda: gpu)
    found = decide_precision(config(tmp_path), client, "train")
    assert (found.train.precision, found.heatmap.precision) == (expected, None)
    assert decided(tmp_path, client) == "bfloat16"
    assert json.loads((tmp_path / "precision.json").read_text()) == {
        "train": expected, "heatmap": "bfloat16",
    }  # fmt: skip


@pytest.mark.parametrize("content", ["{", '{"heatmap": "float64"}'])
def test_a_damaged_record_is_refused(tmp_path, client, content):
    (tmp_path / "precision.json").write_text(content)
    with pytest.raises(RunError, match=r"precision\.json cannot be read"):
        decided(tmp_path, client)
