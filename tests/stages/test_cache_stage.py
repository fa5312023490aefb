"""The cache stage on small slides, and training that reads from it."""

import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from slide_files import damage_tile, write_pyramid_tiff

from wsi_pipeline.config import CatalogConfig, Config, TrainConfig
from wsi_pipeline.config_file import dump_config
from wsi_pipeline.errors import RunError, SlideReadError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.jobs.record import read_done, read_failures
from wsi_pipeline.models.card import read_card
from wsi_pipeline.models.checkpoint import load_model
from wsi_pipeline.patches.cache import open_cache, shard_file
from wsi_pipeline.patches.index import SCHEMA, PatchIndex, write_index
from wsi_pipeline.patches.overlapping_reads import read_patch
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages import cache, train
from wsi_pipeline.stages.run_directory import SLIDE_COLUMNS, cache_path, index_path, model_folder
from wsi_pipeline.stages.status import stage_status

SIDE_PX, MPP = 640, 0.5
# Stored as it is (level 0 and level 1) and resampled, at a step that is no whole level-0 px.
DOWNSAMPLES = {"a": 1.0, "b": 2.0, "c": 1.37, "d": 1.0}


def grid(downsample):
    return PatchGrid(Bounds(0, 0, SIDE_PX, SIDE_PX), MPP, downsample, 64, 32, 32)


def index_of(slide, downsample):
    """Every cell, of labels -1, 0 and 1 by chance."""
    cells = np.indices(grid(downsample).shape).reshape(2, -1)
    n = cells.shape[1]
    label = np.random.default_rng(ord(slide)).integers(-1, 2, n).astype(np.int8)
    full = np.ones(n, np.float32)
    columns = (*grid(downsample).patch_origins(*cells), full, full, label, [[]] * n)
    table = pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)
    return PatchIndex(slide, grid(downsample), table)


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    """A run directory as the tile stage leaves it: two slides to train on, two to validate."""
    run = tmp_path_factory.mktemp("run")
    (run / "patches").mkdir()
    rows = []
    for number, (slide, downsample) in enumerate(DOWNSAMPLES.items()):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE_PX, SIDE_PX, 3), np.uint8)
        levels = [pixels, pixels[::2, ::2]]
        path = write_pyramid_tiff(run / f"{slide}.tif", levels, 128, MPP, "jpeg")
        split = "train" if number < 2 else "validation"
        rows.append((slide, str(path), None, slide, split, 1, MPP, SIDE_PX, SIDE_PX, "ok"))
        write_index(index_of(slide, downsample), index_path(run, slide))
    pd.DataFrame(rows, columns=SLIDE_COLUMNS).to_parquet(run / "slides.parquet")
    return run


@pytest.fixture
def run(tiled, tmp_path):
    """A copy: the slides stay where they are."""
    return shutil.copytree(tiled, tmp_path / "run", ignore=shutil.ignore_patterns("*.tif"))


def settings(run, **training):
    net = {"patch_px": 11, "stride_px": 11, "filters": 4, "layers": 2}
    small = {"weights": "none", "model": "patchnet", "patchnet": net}
    small |= {"epoch_examples": 8, "validation_examples": 16}
    small |= {"max_epochs": 1, "batch_size": 4, "precision": "float32", "processes": 1}
    return Config(
        out=run, catalog=CatalogConfig(csv="slides.csv"), train=TrainConfig(**small | training)
    )


def labelled(slide):
    table = index_of(slide, DOWNSAMPLES[slide]).table
    kept = table["label"].to_numpy() >= 0
    return list(zip(*(table[axis].to_numpy()[kept].tolist() for axis in "xy"), strict=True))


def test_every_labelled_patch_is_as_training_reads_it(run, client):
    outcome = cache.run(settings(run), client)
    assert outcome.failed == 0
    for slide, downsample in DOWNSAMPLES.items():
        cached = open_cache(cache_path(run, slide))
        with Slide(pd.read_parquet(run / "slides.parquet").set_index("slide_id").path[slide]) as s:
            for corner in labelled(slide):
                expected = read_patch(s, grid(downsample), *corner)
                np.testing.assert_array_equal(cached.read(*corner), expected)
    (run / "config.yaml").write_text(dump_config(settings(run)))
    status = {row.stage: (row.done, row.failed, row.left) for row in stage_status(run)}
    assert status["cache"] == (4, 0, 0)
    # 20 x 20 cells of the slides at downsample 1 lie in four shards, 10 x 10 and 15 x 15 in one.
    assert status["cache_shards"] == (10, 0, None)
    again = cache.run(settings(run), client)
    assert (again.done, again.skipped) == (0, 4)


def test_patches_of_unknown_label_are_not_kept(run, client):
    cache.run(settings(run), client)
    table = index_of("a", 1.0).table
    unknown = np.flatnonzero(table["label"].to_numpy() == -1)[0]
    with pytest.raises(RunError, match="not there"):
        open_cache(cache_path(run, "a")).read(*(table[axis][unknown].as_py() for axis in "xy"))


def test_a_damaged_tile_loses_the_patches_over_it_with_the_slides_error(run, tiled, client):
    slides = pd.read_parquet(run / "slides.parquet")
    path = run / "a.tif"
    shutil.copyfile(tiled / "a.tif", path)
    damage_tile(path, 0)  # level-0 px 0 to 127 of both axes
    slides.loc[slides["slide_id"] == "a", "path"] = str(path)
    slides.to_parquet(run / "slides.parquet")
    assert cache.run(settings(run), client).failed == 1
    lost = [corner for corner in labelled("a") if max(corner) < 128]
    rows = [row for row in read_failures(run) if row.stage == "cache"]
    assert len(rows) == len(lost) > 0
    cached = open_cache(cache_path(run, "a"))
    with Slide(path) as slide:
        for corner in labelled("a"):
            if corner in lost:
                with pytest.raises(SlideReadError) as expected:
                    read_patch(slide, grid(1.0), *corner)
                with pytest.raises(SlideReadError) as found:
                    cached.read(*corner)
                assert str(found.value) == str(expected.value)
            else:
                cached.read(*corner)


def test_too_small_a_disk_is_refused_with_the_figure(run, client, monkeypatch):
    usage = shutil.disk_usage(run)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    patches = sum(len(labelled(slide)) for slide in DOWNSAMPLES)
    gb = patches * 64 * 64 * 3 / 1e9
    with pytest.raises(RunError, match=rf"of 4 slides may take {gb:.1f} GB.* 0\.0 GB are free"):
        cache.run(settings(run), client)


PATCH_BYTES = 64 * 64 * 3


def patches_of(slide, downsample):
    return int((index_of(slide, downsample).table["label"].to_numpy() >= 0).sum())


@pytest.fixture
def refused_with(run, client, monkeypatch):
    """A function of the free bytes of a disk to the error of a run on it, None if there is none."""

    def error_of_run(free):
        usage = shutil.disk_usage(run)._replace(free=free)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: usage)
            try:
                cache.run(settings(run), client)
            except RunError as error:
                return str(error)

    return error_of_run


def test_room_is_needed_for_the_shards_that_are_not_there(run, client, refused_with):
    cache.run(settings(run), client)
    assert refused_with(0) is None  # all are finished
    shutil.rmtree(cache_path(run, "b"))  # all of it
    (slide,) = pd.read_parquet(run / "slides.parquet").query("slide_id == 'd'").itertuples()
    begun = cache.CacheStore.of_slide(slide, settings(run), run / "cache").part
    cache_path(run, "d").rename(begun)  # of these inputs, but for a shard
    shard_file(begun, (1, 1)).unlink()
    last = [corner for corner in labelled("d") if min(grid(1.0).cells_at(*corner)) >= 16]
    needed = (len(last) + patches_of("b", 2.0)) * PATCH_BYTES
    assert "of 2 slides" in refused_with(needed - 1)
    assert refused_with(needed) is None


def write_old(store, n_bytes):
    """A store of so many bytes, in place of what is there."""
    shutil.rmtree(store, ignore_errors=True)
    (store / "c").mkdir(parents=True)
    (store / "zarr.json").write_bytes(bytes(100))
    (store / "c" / "0").write_bytes(bytes(n_bytes - 100))


def test_old_caches_of_a_slide_make_room_for_it_and_those_after_it(run, client, refused_with):
    cache.run(settings(run), client)
    write_index(index_of("a", 1.0), index_path(run, "b"))  # of other inputs
    write_old(cache_path(run, "b"), 20_000)
    write_old(run / "cache" / ".b-0123456789ab.zarr", 30_000)  # begun with others still
    write_old(run / "cache" / "gone.zarr", 10**7)  # of no slide of the catalog: it stays
    shutil.rmtree(cache_path(run, "c"))
    needed = (patches_of("a", 1.0) + patches_of("c", 1.37)) * PATCH_BYTES - 50_000
    assert "of 2 slides" in refused_with(needed - 1)
    assert refused_with(needed) is None
    stores = sorted(store.name for store in (run / "cache").glob("*.zarr"))
    assert stores == ["a.zarr", "b.zarr", "c.zarr", "d.zarr", "gone.zarr"]


def test_an_old_cache_makes_no_room_for_the_slides_before_it(run, client, refused_with):
    cache.run(settings(run), client)
    write_index(index_of("a", 1.0), index_path(run, "d"))
    write_old(cache_path(run, "d"), 10**7)  # over twice what d takes: 400 cells, 4.9 MB at most
    shutil.rmtree(cache_path(run, "b"))
    needed = patches_of("b", 2.0) * PATCH_BYTES  # and when d is begun, less
    assert "of 2 slides" in refused_with(needed - 1)
    assert refused_with(needed) is None


def test_an_old_cache_that_cannot_be_deleted_fails_its_slide_alone(run, client, monkeypatch):
    def refuse_b(path, *_, **__):
        if path == cache_path(run, "b"):
            raise OSError(f"{path}: busy")

    write_old(cache_path(run, "b"), 20_000)
    monkeypatch.setattr(shutil, "rmtree", refuse_b)
    outcome = cache.run(settings(run), client)
    assert outcome.failed == 1
    (row,) = read_failures(run)
    assert row.slide_id == "b" and "busy" in row.reason
    assert cache_path(run, "c").is_dir()


def test_an_index_off_its_grid_fails_its_slide_alone(run, client):
    index = index_of("a", 1.0)
    x = index.table["x"].to_numpy() + 1
    moved = index.table.set_column(0, "x", pa.array(x))
    write_index(PatchIndex("a", index.grid, moved), index_path(run, "a"))
    assert cache.run(settings(run), client).failed == 1
    (row,) = read_failures(run)
    assert row.slide_id == "a" and "none of its grid's" in row.reason
    assert cache_path(run, "b").is_dir() and not cache_path(run, "a").exists()


def test_a_damaged_index_fails_its_slide_alone(run, client):
    index_path(run, "a").write_bytes(b"PAR1")
    assert cache.run(settings(run), client).failed == 1
    (row,) = read_failures(run)
    assert row.slide_id == "a" and str(index_path(run, "a")) in row.reason
    assert cache_path(run, "b").is_dir() and not cache_path(run, "a").exists()


def weights(run):
    return (model_folder(run, settings(run).train.name) / "model.safetensors").read_bytes()


@pytest.fixture
def one_thread_client(client):
    threads = torch.get_num_threads()
    yield client
    torch.set_num_threads(threads)


def test_training_from_the_cache_ends_with_the_same_weights(run, tmp_path, one_thread_client):
    client = one_thread_client
    for slide in DOWNSAMPLES:  # training refuses slides of several resolutions
        write_index(index_of(slide, 1.0), index_path(run, slide))
    other = shutil.copytree(run, tmp_path / "other")
    assert train.run(settings(run), client).failed == 0
    assert cache.run(settings(other), client).failed == 0
    assert train.run(settings(other, cache=True), client).failed == 0
    assert weights(other) == weights(run)
    # It does not change the model: without it, training is done already.
    assert train.run(settings(other), client).skipped == 1


def refusal(run, client):
    assert train.run(settings(run, cache=True), client).failed == 1
    (row,) = [row for row in read_failures(run) if row.stage == "train"]
    assert read_done(run, "train") == {}
    return row.reason


def test_training_without_a_cache_or_with_one_of_another_index_says_what_to_do(run, client):
    assert "cache/a.zarr: no finished patch cache" in refusal(run, client)
    cache.run(settings(run), client)
    write_index(index_of("b", 1.0), index_path(run, "b"))
    reason = refusal(run, client)
    assert "cache/b.zarr: made of another index than" in reason
    assert "run `wsi cache`" in reason


def test_a_shard_that_went_missing_stops_training_and_is_named(run, client):
    for slide in DOWNSAMPLES:
        write_index(index_of(slide, 1.0), index_path(run, slide))
    cache.run(settings(run), client)
    for slide in DOWNSAMPLES:
        for shard in ((0, 0), (0, 1), (1, 0), (1, 1)):
            shard_file(cache_path(run, slide), shard).unlink(missing_ok=True)
    assert "cannot be read" in refusal(run, client)


@pytest.fixture
def damaged(run, tiled):
    """The run, with a slide to train on of which no patch of the upper half can be decoded."""
    slides = pd.read_parquet(run / "slides.parquet")
    path = run / "a.tif"
    shutil.copyfile(tiled / "a.tif", path)
    for tile in range(15):  # rows of five
        damage_tile(path, tile)
    slides.loc[slides["slide_id"] == "a", "path"] = str(path)
    slides.to_parquet(run / "slides.parquet")
    for slide in DOWNSAMPLES:
        write_index(index_of(slide, 1.0), index_path(run, slide))
    return run


def failures_of_training(run):
    return {row.reason for row in read_failures(run) if row.stage == "train"}


SMALL_STEPS = {"batch_size": 1, "epoch_examples": 40, "checkpoint_seconds": 1e-9}


def test_a_damaged_slide_is_told_and_does_not_end_training(damaged, one_thread_client):
    outcome = train.run(settings(damaged, **SMALL_STEPS), one_thread_client)
    told = failures_of_training(damaged)
    assert weights(damaged)  # there is a model
    assert 1 < len(told) < 40
    assert all("a.tif: the region at" in reason for reason in told)
    assert outcome.failed == 1


@pytest.mark.parametrize("interrupted_in, call", [("_prepare", 31), ("write_card", 1)])
def test_what_could_not_be_decoded_before_an_interruption_is_told_after_it(
    damaged, tmp_path, one_thread_client, monkeypatch, interrupted_in, call
):
    other = shutil.copytree(damaged, tmp_path / "other")
    train.run(settings(other, **SMALL_STEPS), one_thread_client)
    calls = []
    uninterrupted = getattr(train, interrupted_in)

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise RunError("interrupted")
        return uninterrupted(*args, **kwargs)

    monkeypatch.setattr(train, interrupted_in, interrupted)
    train.run(settings(damaged, **SMALL_STEPS), one_thread_client)
    assert failures_of_training(damaged) == {"interrupted"}
    train.run(settings(damaged, **SMALL_STEPS), one_thread_client)
    assert failures_of_training(damaged) == failures_of_training(other) != set()
    assert weights(damaged) == weights(other)


def test_a_shorter_training_lists_only_what_it_drew(damaged, tmp_path, one_thread_client):
    other = shutil.copytree(damaged, tmp_path / "other")
    for run, epochs in ((other, 1), (damaged, 2)):
        train.run(settings(run, epoch_examples=40, max_epochs=epochs), one_thread_client)
    of_two = failures_of_training(damaged)
    train.run(settings(damaged, epoch_examples=40, max_epochs=1), one_thread_client)
    assert failures_of_training(damaged) == failures_of_training(other) < of_two


def test_the_card_of_a_longer_training_has_its_settings_and_the_best_epoch(run, one_thread_client):
    for slide in DOWNSAMPLES:
        write_index(index_of(slide, 1.0), index_path(run, slide))
    for epochs in (1, 2):
        longer = settings(run, max_epochs=epochs, learning_rate=1e-30)  # epoch 1 stays the best
        assert train.run(longer, one_thread_client).failed == 0
    folder = model_folder(run, longer.train.name)
    assert read_card(folder / "best" / "1").training["settings"]["max_epochs"] == 1
    _, card = load_model(folder)
    assert card.training["settings"]["max_epochs"] == 2
    assert card.training["best"]["epoch"] == 1
