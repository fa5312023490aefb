"""What finished stores say of themselves, and stores of other inputs."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from slide_files import write_pyramid_tiff

from wsi_pipeline.config import CatalogConfig, Config
from wsi_pipeline.errors import ModelError, RunError, WsiError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.store import create_heatmap, open_heatmap
from wsi_pipeline.jobs.cluster import GPU_CORES
from wsi_pipeline.models.checkpoint import ModelCard, save_model
from wsi_pipeline.models.patchnet import PatchNet
from wsi_pipeline.slides import threads
from wsi_pipeline.stages import worker_model as worker_model_module
from wsi_pipeline.stages.slab_stores import StorePlan, _units_or_refusal
from wsi_pipeline.stages.stores import begin_store, fill_chunk, finish_slide
from wsi_pipeline.stages.worker_model import worker_model

GRID = PatchGrid(Bounds(0, 0, 2048, 2048), 0.25, 2.0, 64, 32, 32)


@pytest.mark.parametrize(
    ("patch_px", "mpp", "notes"),
    [
        (64, 0.5, []),
        (None, 0.5, []),
        (64, 0.6, []),  # 0.5 is 17 % less
        (128, 0.5, ["patches have 64 px, the model was trained on 128"]),
        (None, 1.0, ["patches have 0.5 um per px, the model was trained at 1: its probabilities"
                     " mean little here"]),
    ],
)  # fmt: skip
def test_a_finished_store_has_its_name_and_notes_what_is_unlike_the_training(
    tmp_path, patch_px, mpp, notes
):
    pixels = np.zeros((2048, 2048, 3), np.uint8)
    slide = write_pyramid_tiff(tmp_path / "s.tif", [pixels, pixels[::2, ::2]], mpp=0.25)
    mine = replace(plan(tmp_path), slide_path=str(slide))
    create_heatmap(mine.part, grid=GRID, slide_id="s", model="m")
    expected = {"notes": notes, "failures": ["one"], "model": "m", "backend": "tiles"}
    expected["backend_reason"] = "the tiles that were compared equal OpenSlide's"
    assert finish_slide(mine, ["one"], patch_px, mpp) == expected
    assert not mine.part.exists()
    assert np.isnan(open_heatmap(mine.out).values()).all()
    # A worker that died after renaming: the unit is done again.
    assert finish_slide(mine, ["one"], patch_px, mpp) == expected


def test_a_store_gets_its_name_only_when_all_is_found_out(tmp_path):
    """Else the next run would find it without a record and predict all of it anew."""
    slide = write_pyramid_tiff(tmp_path / "s.tif", [np.zeros((64, 64, 3), np.uint8)], mpp=0.5)
    mine = replace(plan(tmp_path), slide_path=str(slide))
    create_heatmap(mine.part, grid=GRID, slide_id="s", model="m")
    slide.unlink()
    with pytest.raises(WsiError):
        finish_slide(mine, [], 64, 0.5)
    assert mine.part.exists() and not mine.out.exists()


@pytest.mark.parametrize(("environment", "count"), [({}, 1), ({GPU_CORES: "3"}, 3)])
def test_units_on_a_local_gpu_decode_with_its_share_of_the_cores(
    tmp_path, monkeypatch, environment, count
):
    monkeypatch.setattr(threads, "CPU_COUNT", 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    slide = write_pyramid_tiff(tmp_path / "s.tif", [np.zeros((64, 64, 3), np.uint8)], mpp=0.5)
    found = fill_chunk(lambda _: {"threads": threads.decoding_threads()}, str(slide), 0.5)
    assert found == {"threads": count}
    assert threads.decoding_threads() == 1


def plan(folder):
    part, out = folder / f".s-{'0' * 12}.zarr", folder / "s.zarr"
    return StorePlan("s", "s.tif", 0.5, folder / "s.parquet", {}, part, out)


def test_stores_of_other_inputs_make_room_and_a_begun_one_stays(tmp_path):
    mine = plan(tmp_path)
    others = [tmp_path / name for name in ("s.zarr", f".s-{'a' * 12}.zarr")]
    of_another_slide = tmp_path / f".s-2-{'a' * 12}.zarr"
    for store in (mine.part, *others, of_another_slide):
        store.mkdir()
    assert list(_units_or_refusal(mine, lambda _: iter(["unit"]))) == ["unit"]
    assert mine.part.exists() and of_another_slide.exists()
    assert not any(store.exists() for store in others)


def test_a_store_that_was_killed_while_it_was_made_is_made_anew(tmp_path):
    card = ModelCard(architecture="vgg16", mean=(0.5,) * 3, std=(0.5,) * 3, patch_px=64, mpp=0.5)
    mine = plan(tmp_path)
    (tmp_path / f".s-{'0' * 12}.empty").mkdir()
    (tmp_path / f".s-{'0' * 12}.empty" / "zarr.json").write_text('{"half of')
    config = Config(out=tmp_path, catalog=CatalogConfig(csv="slides.csv"))
    begin_store(mine, config, card, GRID, 16)
    assert np.isnan(open_heatmap(mine.part).values()).all()
    assert [path.name for path in tmp_path.iterdir()] == [mine.part.name]


@pytest.mark.parametrize("error", [RunError("the index is damaged"), OSError(28, "No space left")])
def test_a_slide_whose_units_cannot_be_told_is_one_unit_that_fails(tmp_path, error):
    def units_of(plan):
        yield "first"
        raise error

    first, refusal = _units_or_refusal(plan(tmp_path), units_of)
    assert (first, refusal.key, refusal.slide_id) == ("first", "s/", "s")
    with pytest.raises(RunError, match=r"the index is damaged|No space left"):
        refusal.function(**refusal.arguments)


def test_weights_that_changed_since_the_stage_began_are_refused(tmp_path):
    arguments = {"patch_px": 5, "stride_px": 5, "filters": 1, "layers": 1}
    card = ModelCard(
        architecture="patchnet", arguments=arguments,
        mean=(0.5,) * 3, std=(0.5,) * 3, patch_px=64, mpp=0.5,
    )  # fmt: skip
    card = save_model(tmp_path, PatchNet(**arguments), card)
    module, found = worker_model(str(tmp_path), card.weights_sha256)
    assert found == card
    assert isinstance(module, torch.nn.Module)
    with pytest.raises(ModelError, match="not the weights that the stage began with"):
        worker_model(str(tmp_path), "0" * 64)


def test_a_model_is_loaded_once_though_threads_ask_at_once(monkeypatch):
    loaded = []

    def load(folder):
        loaded.append(folder)
        time.sleep(0.1)  # as long as another thread takes to ask
        return torch.nn.Conv2d(1, 1, 1), SimpleNamespace(weights_sha256="0")

    monkeypatch.setattr(worker_model_module, "load_model", load)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(worker_model, ["a folder"] * 2, "00")
    assert first[0] is second[0]
    assert loaded == ["a folder"]
    worker_model_module._load.cache_clear()
