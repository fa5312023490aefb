"""What finished stores say of themselves, and stores of other inputs."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from slide_files import write_pyramid_tiff

from wsi_pipeline.config import HeatmapConfig
from wsi_pipeline.errors import ModelError, RunError, WsiError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.store import create_heatmap, open_heatmap
from wsi_pipeline.jobs.cluster import GPU_CORES
from wsi_pipeline.jobs.unit import LargeFile, Output, SmallFile
from wsi_pipeline.models.card import ModelCard, write_card
from wsi_pipeline.models.checkpoint import save_model
from wsi_pipeline.models.patchnet import PatchNet
from wsi_pipeline.patches.slabs import Slab
from wsi_pipeline.slides import threads
from wsi_pipeline.stages import worker_model as worker_model_module
from wsi_pipeline.stages.cache import CacheStore
from wsi_pipeline.stages.fine import FineStore
from wsi_pipeline.stages.heatmap import HeatmapStore
from wsi_pipeline.stages.stores import FillSlab, _slab_units
from wsi_pipeline.stages.worker_model import TrainedModel, worker_model

GRID = PatchGrid(Bounds(0, 0, 2048, 2048), 0.25, 2.0, 64, 32, 32)


@pytest.mark.parametrize(
    ("patch_px", "mpp", "notes"),
    [
        (64, 0.5, []),
        (64, 0.6, []),  # 0.5 is 17 % less
        (128, 0.5, ["patches have 64 px, the model was trained on 128"]),
        (64, 1.0, ["patches have 0.5 um per px, the model was trained at 1: its probabilities"
                     " mean little here"]),
    ],
)  # fmt: skip
def test_a_finished_store_has_its_name_and_notes_what_is_unlike_the_training(
    tmp_path, patch_px, mpp, notes
):
    pixels = np.zeros((2048, 2048, 3), np.uint8)
    write_pyramid_tiff(tmp_path / "s.tif", [pixels, pixels[::2, ::2]], mpp=0.25)
    mine = heatmap_store(tmp_path, patch_px=patch_px, mpp=mpp)
    create_heatmap(mine.part, grid=GRID, slide_id="s", model="m")
    failures = ["patch at level-0 px (8, 9): damaged"]
    expected = {"notes": notes, "failures": failures, "backend": "tiles", "model": "m"}
    expected["backend_reason"] = "the tiles that were compared equal OpenSlide's"
    assert mine.finish([[8, 9, "damaged"]]) == expected
    assert not mine.part.exists()
    assert np.isnan(open_heatmap(mine.out).values()).all()
    # A worker that died after renaming: the unit is done again.
    assert mine.finish([[8, 9, "damaged"]]) == expected


def test_a_fine_heatmap_has_patches_of_its_own_size(tmp_path):
    write_pyramid_tiff(tmp_path / "s.tif", [np.zeros((64, 64, 3), np.uint8)], mpp=0.25)
    coarse = heatmap_store(tmp_path, patch_px=512, mpp=0.5)
    fine = FineStore(**vars_of(coarse), patch_px=31, stride_px=8, chunk=16, coarse=None,
                     min_probability=None)  # fmt: skip
    create_heatmap(fine.part, grid=GRID, slide_id="s", model="m")
    assert fine.finish([])["notes"] == []


def test_a_store_gets_its_name_only_when_all_is_found_out(tmp_path):
    """Else the next run would find it without a record and predict all of it anew."""
    slide = write_pyramid_tiff(tmp_path / "s.tif", [np.zeros((64, 64, 3), np.uint8)], mpp=0.5)
    mine = heatmap_store(tmp_path)
    create_heatmap(mine.part, grid=GRID, slide_id="s", model="m")
    slide.unlink()
    with pytest.raises(WsiError):
        mine.finish([])
    assert mine.part.exists() and not mine.out.exists()


@pytest.mark.parametrize(("environment", "count"), [({}, 1), ({GPU_CORES: "3"}, 3)])
def test_units_on_a_local_gpu_decode_with_its_share_of_the_cores(
    tmp_path, monkeypatch, environment, count
):
    monkeypatch.setattr(threads, "CPU_COUNT", 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    write_pyramid_tiff(tmp_path / "s.tif", [np.zeros((64, 64, 3), np.uint8)], mpp=0.5)
    mine = Threads(**vars_of(store(tmp_path)))
    assert FillSlab("s", mine, GRID, SLAB).run() == {"threads": count}
    assert threads.decoding_threads() == 1


SLAB = Slab((0, 0), np.array([0]), np.array([0]))


class Threads(CacheStore):
    """A store whose work is to say how many threads may decode."""

    def fill(self, slide, grid, slab):
        return {"threads": threads.decoding_threads()}


def store(folder) -> CacheStore:
    files = LargeFile.at(folder / "s.tif"), 0.5, SmallFile.at(folder / "s.parquet")
    return CacheStore("s", *files, Output(folder))


def vars_of(a_store) -> dict:
    return {of.name: getattr(a_store, of.name) for of in fields(a_store)}


def heatmap_store(folder, patch_px=64, mpp=0.5) -> HeatmapStore:
    card = ModelCard(
        architecture="vgg16", mean=(0.5,) * 3, std=(0.5,) * 3, patch_px=patch_px, mpp=mpp
    )
    write_card(folder, card)
    model = TrainedModel("0", "m", str(folder))
    files = {**vars_of(store(folder)), "mpp": 0.25}
    return HeatmapStore(**files, model=model, settings=HeatmapConfig(precision="float32"))


def test_stores_of_other_inputs_make_room_and_a_begun_one_stays(tmp_path):
    class Empty(CacheStore):
        def begin(self):
            return GRID, [SLAB]

    mine = Empty(**vars_of(store(tmp_path)))
    others = [tmp_path / name for name in ("s.zarr", f".s-{'a' * 12}.zarr")]
    of_another_slide = tmp_path / f".s-2-{'a' * 12}.zarr"
    for path in (mine.part, *others, of_another_slide):
        path.mkdir()
    assert list(_slab_units(mine)) == [FillSlab("s", mine, GRID, SLAB)]
    assert mine.part.exists() and of_another_slide.exists()
    assert not any(path.exists() for path in others)


def test_a_store_is_another_one_when_what_it_is_made_of_changes(tmp_path):
    mine = store(tmp_path)
    assert replace(mine, folder=Output(tmp_path / "moved")).part.name == mine.part.name
    assert replace(mine, mpp=0.25).part.name != mine.part.name


def test_a_store_that_was_killed_while_it_was_made_is_made_anew(tmp_path):
    mine = heatmap_store(tmp_path)
    before = set(tmp_path.iterdir())
    empty = mine.part.with_suffix(".empty")
    empty.mkdir()
    (empty / "zarr.json").write_text('{"half of')
    mine.create(GRID, 16)
    assert np.isnan(open_heatmap(mine.part).values()).all()
    assert set(tmp_path.iterdir()) - before == {mine.part}


@pytest.mark.parametrize("error", [RunError("the index is damaged"), OSError(28, "No space left")])
def test_a_slide_whose_units_cannot_be_told_is_one_unit_that_fails(tmp_path, error):
    class Damaged(CacheStore):
        def begin(self):
            def slabs():
                yield SLAB
                raise error

            return GRID, slabs()

    mine = Damaged(**vars_of(store(tmp_path)))
    first, refusal = _slab_units(mine)
    assert first == FillSlab("s", mine, GRID, SLAB)
    assert (refusal.key, refusal.slide_id) == ("s/", "s")
    with pytest.raises(RunError, match=r"the index is damaged|No space left"):
        refusal.run()


def test_weights_that_changed_since_the_stage_began_are_refused(tmp_path):
    arguments = {"patch_px": 5, "stride_px": 5, "filters": 1, "layers": 1}
    card = ModelCard(
        architecture="patchnet", arguments=arguments,
        mean=(0.5,) * 3, std=(0.5,) * 3, patch_px=64, mpp=0.5,
    )  # fmt: skip
    card = save_model(tmp_path, PatchNet(**arguments), card)
    module, found = worker_model(TrainedModel(card.weights_sha256, "m", str(tmp_path)))
    assert found == card
    assert isinstance(module, torch.nn.Module)
    with pytest.raises(ModelError, match="not the weights that the stage began with"):
        worker_model(TrainedModel("0" * 64, "m", str(tmp_path)))


def test_a_model_is_loaded_once_though_threads_ask_at_once(monkeypatch):
    loaded = []

    def load(folder, device):
        loaded.append(folder)
        time.sleep(0.1)  # as long as another thread takes to ask
        return torch.nn.Conv2d(1, 1, 1), SimpleNamespace(weights_sha256="0")

    monkeypatch.setattr(worker_model_module, "load_model", load)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(worker_model, [TrainedModel("0", "m", "a folder")] * 2)
    assert first[0] is second[0]
    assert loaded == ["a folder"]
    worker_model_module._load.cache_clear()
