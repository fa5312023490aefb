"""What the train stage decides before training."""

import json
import multiprocessing
from dataclasses import asdict

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from wsi_pipeline.config import CatalogConfig, Config, TrainConfig
from wsi_pipeline.errors import RunError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.patches.index import SCHEMA, PatchIndex, read_index, write_index
from wsi_pipeline.patches.sampling import PatchPool
from wsi_pipeline.stages import train
from wsi_pipeline.stages.leakage import refuse_leakage
from wsi_pipeline.stages.run_directory import SLIDE_COLUMNS, index_path
from wsi_pipeline.stages.train import _noted, _noted_in, loader_workers


@pytest.fixture
def cores(monkeypatch):
    def set_to(count):
        monkeypatch.setattr(train, "CPU_COUNT", count)

    return set_to


@pytest.fixture
def daemon(monkeypatch):
    """As in a Dask worker that its nanny keeps from starting processes."""
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})


@pytest.mark.parametrize(
    "count, processes, expected", [(16, 1, 14), (16, 4, 3), (128, 1, 16), (128, 8, 15), (1, 1, 0)]
)
def test_loader_workers_of_a_gpu_are_its_share_of_the_cores(cores, count, processes, expected):
    cores(count)
    assert loader_workers(None, ["0"] * processes, processes) == expected


def test_on_a_cpu_there_are_none_unless_asked_for(cores):
    cores(16)
    assert loader_workers(None, [], 1) == 0
    assert loader_workers(3, [], 1) == 3


def test_a_worker_that_may_start_none_has_none_unless_asked_for(cores, daemon):
    cores(16)
    assert loader_workers(None, ["0"], 1) == 0
    assert loader_workers(0, ["0"], 1) == 0
    assert loader_workers(None, ["0", "1"], 2) == 7  # torchrun's processes are no daemons
    assert loader_workers(3, ["0", "1"], 2) == 3
    with pytest.raises(RunError, match=r"loader_workers is 3.*DASK_DISTRIBUTED__WORKER__DAEMON"):
        loader_workers(3, ["0"], 1)


def test_unread_patches_are_noted_once_by_all_processes_also_of_a_path_that_is_no_text(tmp_path):
    path = tmp_path / "unread.txt"
    path.write_text("a.svs: damaged\n")  # of a training that is discarded
    first, second = _noted_in(path), _noted_in(path)
    path.unlink()
    for note in (first, second, first):
        note("a.svs: damaged")
        note("b\udcff.svs:\n damaged")
    assert _noted(path) == ["a.svs: damaged", r"b\udcff.svs: damaged"]


def add_index(run, slide, downsample):
    """Patches at two cells, a label each."""
    grid = PatchGrid(Bounds(0, 0, 2048, 1024), 0.25, downsample, 256, 256, 256)
    full = np.ones(2, np.float32)
    labels = np.array([0, 1], np.int8)
    columns = (*grid.patch_origins([0, 0], [0, 1]), full, full, labels, [[], [1]])
    table = pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)
    write_index(PatchIndex(slide, grid, table), index_path(run, slide))


@pytest.fixture
def run(tmp_path):
    """A run directory as the tile stage leaves it, of slides that are not there."""
    (tmp_path / "patches").mkdir()
    rows = []
    for slide, split in (("a", "train"), ("b", "train"), ("v", "validation"), ("t", "test")):
        rows.append((slide, f"{slide}.svs", None, f"p_{slide}", split, 1, 0.25, 2048, 1024, "ok"))
        add_index(tmp_path, slide, 2.0)
    pd.DataFrame(rows, columns=SLIDE_COLUMNS).to_parquet(tmp_path / "slides.parquet")
    return tmp_path


def job_of(run, **training):
    settings = TrainConfig(**{"weights": "none", "model": "cam"} | training)
    config = Config(out=run, catalog=CatalogConfig(csv="slides.csv"), train=settings)
    return train._unit(config)


def start_weights(run, **patients):
    """A model of another run with these patients, to start from."""
    folder = run / "other/models/vgg16"
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps({"training": {"patients": patients}}))
    (folder / "model.safetensors").write_bytes(b"not read")
    return str(folder / "model.safetensors")


@pytest.mark.parametrize("part", ["train", "validation", "earlier", "earlier_validation"])
def test_start_weights_that_saw_a_test_patient_are_refused(run, part):
    weights = start_weights(run, **{"train": ["p_x"], "validation": ["p_y"]} | {part: ["p_t"]})
    with pytest.raises(RunError, match=r"model\.safetensors: the patients \['p_t'\] of the test"):
        job_of(run, weights=weights)


def test_patients_that_validated_the_start_weights_may_validate_again_but_are_never_tested_on(run):
    weights = start_weights(run, train=["p_x"], validation=["p_v", "p_y"])
    job = job_of(run, weights=weights)
    assert [of.patches.slide_id for of in job.slides["validation"]] == ["v"]
    pool = PatchPool.from_indexes(read_index(index_path(run, slide)) for slide in "ab")
    card = asdict(train._card(job, pool))
    refuse_leakage(card, test={"p_t"})
    for patient in ("p_x", "p_y"):  # of the test split by now
        with pytest.raises(RunError, match=patient):
            refuse_leakage(card, test={patient})


def test_start_weights_without_a_card_are_told(run, caplog, monkeypatch):
    weights = start_weights(run, train=["p_t"])
    monkeypatch.chdir(run / "other/models/vgg16")
    job_of(run)  # no weights: this folder's card is not theirs
    assert not caplog.text
    (run / "other/models/vgg16/model.json").unlink()
    job_of(run, weights=weights)
    assert f"{weights}: whose slides it has seen is not known" in caplog.text


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"training": {"patients": [1]}}'])
def test_a_card_beside_start_weights_that_is_not_ours_is_refused(run, text):
    weights = start_weights(run)
    (run / "other/models/vgg16/model.json").write_text(text)
    with pytest.raises(RunError, match=r"model\.json: no description of one of our models"):
        job_of(run, weights=weights)


@pytest.mark.parametrize(
    ("downsamples", "message"),
    [
        ({"v": 4.0}, r"from 0\.5 \(slide a, train\) to 1 um per px \(slide v, validation\)"),
        ({"v": 1.0}, r"from 0\.25 \(slide v, validation\) to 0\.5 um per px \(slide b, train\)"),
        ({"b": 2.5}, r"from 0\.5 \(slide a, train\) to 0\.625 um per px \(slide b, train\)"),
    ],
)
def test_one_model_is_trained_and_validated_at_one_resolution(run, downsamples, message):
    for slide, downsample in downsamples.items():
        add_index(run, slide, downsample)
    with pytest.raises(RunError, match=rf"{message}.*tile\.mpp instead of tile\.level"):
        train._train(job_of(run, loader_workers=0), print)
