"""What the heatmap stage puts on record of reading, with a worker of two threads."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from counted_reads import counted_reads
from distributed import Client
from slide_files import write_mrxs, write_pyramid_tiff

from wsi_pipeline.config import CatalogConfig, Config, HeatmapConfig, TrainConfig
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.heatmaps.store import open_heatmap
from wsi_pipeline.jobs.record import read_done
from wsi_pipeline.models.card import ModelCard
from wsi_pipeline.models.checkpoint import save_model
from wsi_pipeline.models.patchnet import PatchNet
from wsi_pipeline.patches.index import SCHEMA, PatchIndex, write_index
from wsi_pipeline.slides import reader
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages import heatmap
from wsi_pipeline.stages.run_directory import SLIDE_COLUMNS, index_path, model_folder
from wsi_pipeline.stages.status import heatmap_reading, reading_summary

WIDTH, HEIGHT, TILE_PX = 800, 600, 100


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setattr(reader, "WORTH_TILES_PX", 0)  # small slides are read by tiles as well
    monkeypatch.setattr(reader, "LEAST_OF_TILE", 0)
    options = {"processes": False, "n_workers": 1, "threads_per_worker": 2}
    with Client(**options, dashboard_address="127.0.0.1:0") as client:
        yield client


def add_slide(run, path, rows, cols):
    """Index cells of a slide: patches of 64 px at every 32 px."""
    with Slide(path) as slide:
        slide.backend(0)  # compared here and now, so that no test counts the tiles it takes
        grid = PatchGrid(slide.bounds, slide.mpp, 1.0, patch_px=64, stride_px=32, inner_px=32)
    full = np.ones(len(rows), np.float32)
    columns = (*grid.patch_origins(rows, cols), full, full, full.astype(np.int8), [[]] * len(rows))
    table = pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)
    name = path.stem
    write_index(PatchIndex(name, grid, table), index_path(run, name))
    return (name, str(path), None, name, "test", 1, grid.mpp, WIDTH, HEIGHT, "ok")


def predict_all(run, client, slides):
    pd.DataFrame(slides, columns=SLIDE_COLUMNS).to_parquet(run / "slides.parquet")
    arguments = {"patch_px": 32, "stride_px": 32, "filters": 1, "layers": 1}
    card = ModelCard(
        architecture="patchnet", arguments=arguments,
        mean=(0.5,) * 3, std=(0.5,) * 3, patch_px=64, mpp=0.5,
    )  # fmt: skip
    save_model(model_folder(run, "net"), PatchNet(**arguments), card)
    config = Config(
        out=run,
        catalog=CatalogConfig(csv="slides.csv"),
        train=TrainConfig(name="net"),
        heatmap=HeatmapConfig(splits=("test",), precision="float32", chunk=8),
    )
    outcome = heatmap.run(config, client)
    assert outcome.failed == 0
    return outcome


def test_it_is_on_record_what_reads_a_slide_and_slabs_share_no_more_than_tiles_at_their_edges(
    tmp_path, client
):
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    (tmp_path / "patches").mkdir()
    tiled = write_pyramid_tiff(tmp_path / "tiled.tif", [pixels], tile=128, mpp=0.5)
    other = write_mrxs(tmp_path / "other.mrxs", pixels, 300, 500, tile=TILE_PX, levels=1, mpp=0.5)
    everywhere = np.indices((19, 25)).reshape(2, -1)
    slides = [add_slide(tmp_path, tiled, *everywhere), add_slide(tmp_path, other, [3, 3], [4, 6])]
    with counted_reads() as counted:
        outcome = predict_all(tmp_path, client, slides)

    done = {key: line["result"] for key, line in read_done(tmp_path, "heatmap-net").items()}
    assert done["tiled"]["backend"] == "tiles"
    assert done["other"]["backend"] == "openslide"
    assert done["other"]["backend_reason"] == "mirax files are not read by tiles"
    # Chunks of 8 cells begin 16 px before px 0, 256, 512 and 768 and are 288 px wide, or end with
    # the slide: they meet tiles (of 128 px) 0 to 2, 1 to 4, 3 to 6 and 5 to 6; down, where the
    # slide ends at 600, 0 to 2, 1 to 4 and 3 to 4.
    assert counted.by_tiles == (3 + 4 + 4 + 2) * (3 + 4 + 2) * 128 * 128
    # Two patches side by side: OpenSlide reads the box around them, 128 px wide.
    assert counted.by_openslide == 128 * 64

    told = (
        "tiles are decoded for 1 slide, after the first 4 megapixels of each;"
        " OpenSlide reads 1 slide (1: mirax files are not read by tiles)"
    )
    assert reading_summary(outcome.results.values()) == told
    assert heatmap_reading(tmp_path, "net") == told
    assert np.isfinite(open_heatmap(tmp_path / "heatmaps/net/tiled.zarr").values()).all()


def test_the_first_px_of_a_level_of_tiles_are_openslides(tmp_path, client, monkeypatch):
    monkeypatch.setattr(reader, "WORTH_TILES_PX", 64 * 64 + 1)  # the first slab's patch is less
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    (tmp_path / "patches").mkdir()
    path = write_pyramid_tiff(tmp_path / "s.tif", [pixels], tile=32, mpp=0.5)
    slide = add_slide(tmp_path, path, [3], [4])
    with counted_reads() as counted:
        predict_all(tmp_path, client, [slide])
    assert (counted.by_tiles, counted.by_openslide) == (0, 64 * 64)
    (line,) = read_done(tmp_path, "heatmap-net").values()
    assert line["result"].pop("model").startswith("net@")
    reason = "the tiles that were compared equal OpenSlide's"
    read = {"backend": "tiles", "backend_reason": reason}
    assert line["result"] == {"notes": [], "failures": [], **read}
    told = "tiles are decoded for 1 slide, after the first 4 megapixels of each"
    assert heatmap_reading(tmp_path, "net") == told


def test_what_lies_between_patches_is_not_decoded(tmp_path, client):
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    (tmp_path / "patches").mkdir()
    path = write_pyramid_tiff(tmp_path / "s.tif", [pixels], tile=32, mpp=0.5)
    # Patches of one slab in two of its corners, from px -16 and 208 on: 2 and 3 tiles a side.
    slide = add_slide(tmp_path, path, [0, 7], [0, 7])
    with counted_reads() as counted:
        predict_all(tmp_path, client, [slide])
    assert (counted.by_tiles, counted.by_openslide) == ((2 * 2 + 3 * 3) * 32 * 32, 0)


def test_the_most_frequent_reasons_are_told_and_results_without_them_passed_over():
    by_reason = {"a": 2, "b": 3, "c": 1, "d": 4}
    results = [
        {"backend": "openslide", "backend_reason": reason}
        for reason, count in by_reason.items()
        for _ in range(count)
    ]
    others = [{"patches": 3, "unread": []}, {"notes": [], "failures": []}]
    told = "OpenSlide reads 10 slides (4: d; 3: b; 2: a)"
    assert reading_summary(results + others) == told
    assert reading_summary(others) == ""


def test_results_of_older_runs_that_counted_px_are_read():
    counted = {"backend": "tiles", "read_px": 150, "decoded_px": 120, "needed_px": 100}
    told = (
        "tiles are decoded for 1 slide, after the first 4 megapixels of each;"
        " OpenSlide reads 1 slide (1: openslide: a)"
    )
    assert reading_summary([counted, {"backend": "openslide: a"}]) == told
