"""The fine stage on a small slide file, with a Dask client and PatchNets that were not trained."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tifffile
import torch
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader
from PIL import Image
from shapely import box
from slide_files import write_pyramid_tiff

from wsi_pipeline.config import (
    CatalogConfig,
    Config,
    FineConfig,
    HeatmapConfig,
    TrainConfig,
)
from wsi_pipeline.config_file import dump_config
from wsi_pipeline.errors import ModelError, RunError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.store import create_heatmap, finish_heatmap, open_heatmap, write_chunk
from wsi_pipeline.jobs.record import read_done, read_failures
from wsi_pipeline.models.card import ModelCard
from wsi_pipeline.models.checkpoint import save_model
from wsi_pipeline.models.patchnet import PatchNet
from wsi_pipeline.patches.index import SCHEMA, PatchIndex, write_index
from wsi_pipeline.patches.slabs import slabs
from wsi_pipeline.slides.annotation_xml import write_asap_xml
from wsi_pipeline.stages import fine
from wsi_pipeline.stages.run_directory import (
    SLIDE_COLUMNS,
    heatmap_folder,
    index_path,
    model_folder,
)
from wsi_pipeline.stages.status import precision_difference, precision_summary, stage_status

WIDTH, HEIGHT, MPP = 768, 640, 0.5
GRID = PatchGrid(Bounds(0, 0, WIDTH, HEIGHT), MPP, 1.0, patch_px=64, stride_px=32, inner_px=32)
PATCH_PX = 11
# x0, y0, x1, y1 of a bright square, level-0 px, on no grid's steps; rows 6 to 9, columns 12 to 15.
SQUARE = (401, 207, 503, 309)
SUSPICIOUS = np.s_[5:11, 11:18]


@pytest.fixture(scope="module")
def client(client):
    client.submit(torch.set_num_threads, 1).result()  # in the worker's thread
    return client


def brightness_net():
    """Q is 0.95 of patches whose central pixel is white, 0.05 where it is black."""
    net = PatchNet(PATCH_PX, PATCH_PX, filters=4, layers=2)
    subnet = net.subnet
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        for convolution, weight in zip(subnet.convolutions, (1 / 3, 1.0), strict=True):
            convolution.weight[0, :, 1, 1] = weight
        subnet.convolutions[1].weight[0, 1:] = 0
        subnet.readout_weight[0, PATCH_PX // 2, PATCH_PX // 2] = 1.0
        subnet.readout_bias[0] = -1.0
        subnet.head.weight[0, 0] = 4.0  # logit 4 tanh(2 - 1) or 4 tanh(0 - 1): +-3.05
    return net


def random_net():
    torch.manual_seed(0)
    return PatchNet(PATCH_PX, PATCH_PX, filters=4, layers=2)


def save_net(run, net, name="net"):
    card = ModelCard(
        architecture="patchnet",
        arguments={"patch_px": PATCH_PX, "stride_px": PATCH_PX, "filters": 4, "layers": 2},
        mean=(0.5,) * 3, std=(0.25,) * 3, patch_px=64, mpp=MPP,
    )  # fmt: skip
    save_model(model_folder(run, name), net, card)


def write_coarse(run, values, grid=GRID, name="vgg16"):
    folder = heatmap_folder(run, name)
    folder.mkdir(parents=True, exist_ok=True)
    create_heatmap(folder / "s.zarr", grid=grid, slide_id="s", model=f"{name}@1")
    for slab in slabs(grid, *np.nonzero(np.isfinite(values)), 16):
        write_chunk(folder / "s.zarr", slab, values[slab.rows, slab.cols])
    finish_heatmap(folder / "s.zarr")


def suspicion():
    values = np.full(GRID.shape, 0.1, np.float32)
    values[SUSPICIOUS] = 0.8
    values[:, 0] = np.nan
    return values


def make_run(folder, pixels, net):
    """A run directory as the stages before leave it: one slide, every cell but column 0 indexed."""
    folder.mkdir(parents=True, exist_ok=True)
    slide = write_pyramid_tiff(folder / "s.tif", [pixels], tile=128, mpp=MPP)
    write_asap_xml(folder / "s.xml", [box(*SQUARE)])
    row = ("s", str(slide), str(folder / "s.xml"), "p", "test", 1, MPP, WIDTH, HEIGHT, "ok")
    pd.DataFrame([row], columns=SLIDE_COLUMNS).to_parquet(folder / "slides.parquet")
    rows, cols = np.nonzero(np.isfinite(suspicion()))
    full = np.ones(len(rows), np.float32)
    columns = (*GRID.patch_origins(rows, cols), full, full, full.astype(np.int8), [[]] * len(rows))
    table = pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)
    (folder / "patches").mkdir()
    write_index(PatchIndex("s", GRID, table), index_path(folder, "s"))
    save_net(folder, net)
    write_coarse(folder, suspicion())
    return folder


def painted():
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    x0, y0, x1, y1 = SQUARE
    pixels[y0:y1, x0:x1] = 255
    return pixels


def noise():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def settings(run, name="net", precision="float32", **of_fine):
    of_fine = {"coarse": "vgg16", "stride_px": 8, "chunk": 16} | of_fine
    return Config(
        out=run,
        catalog=CatalogConfig(csv="slides.csv"),
        train=TrainConfig(name=name),
        heatmap=HeatmapConfig(splits=("test",), precision=precision),
        fine=FineConfig(**of_fine),
    )


def values_of(run, name="net"):
    return open_heatmap(run / "fine" / name / "s.zarr").values()


@pytest.fixture
def counted(monkeypatch):
    """The chunks that are predicted."""
    chunks, predict = [], fine.predict_pixels

    def count(slide, grid, slab, *rest):
        chunks.append(slab.chunk)
        return predict(slide, grid, slab, *rest)

    monkeypatch.setattr(fine, "predict_pixels", count)
    return chunks


@pytest.mark.parametrize("stride_px", [4, 8])
def test_a_bright_square_is_found_at_its_place_in_micrometres(tmp_path, client, stride_px):
    run = make_run(tmp_path, painted(), brightness_net())
    outcome = fine.run(settings(run, stride_px=stride_px), client)
    assert outcome.failed == 0

    (node,) = Reader(parse_url(run / "fine/net/s.zarr"))()
    scale, translation = node.metadata["coordinateTransformations"][0]
    spacing, (first_y, first_x) = scale["scale"][0], translation["translation"]
    assert spacing == stride_px * MPP
    rows, cols = np.nonzero(node.data[0].compute() > 0.5)
    assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(cols) + 1)  # a filled rectangle
    x, y = first_x + cols * spacing, first_y + rows * spacing
    # NGFF names pixel centres: level-0 pixel i lies at i * MPP. All that is bright lies in the
    # square, and no heatmap pixel more would fit at either side.
    x0, y0, x1, y1 = (side * MPP for side in SQUARE)
    for found, low, high in ((x, x0, x1 - MPP), (y, y0, y1 - MPP)):
        assert low <= found.min() < low + spacing
        assert high - spacing < found.max() <= high


def test_only_suspicious_cells_are_predicted(tmp_path, client, counted):
    run = make_run(tmp_path, noise(), random_net())
    fine.run(settings(run), client)
    wanted = np.zeros((80, 96), bool)  # 4 x 4 pixels a cell
    wanted[20:44, 44:72] = True
    np.testing.assert_array_equal(np.isfinite(values_of(run)), wanted)
    # In chunks of 16 pixels: rows 20 to 44 lie in 1 and 2, columns 44 to 72 in 2 to 4.
    assert sorted(counted) == [(row, col) for row in (1, 2) for col in (2, 3, 4)]


def test_in_bfloat16_it_is_said_how_far_float32_would_be(tmp_path, client):
    run = make_run(tmp_path, noise(), random_net())
    fine.run(settings(run), client)
    exact = values_of(run)
    assert precision_summary(run, "net", "fine_precision") == ""
    outcome = fine.run(settings(run, precision="bfloat16"), client)
    assert outcome.failed == 0
    assert open_heatmap(run / "fine/net/s.zarr").precision == "bfloat16"
    found = precision_difference(run, "net", "fine_precision")
    assert found["patches"] == 1
    wanted = np.isfinite(exact)
    difference = np.abs(values_of(run) - exact)[wanted].max()
    assert 0 < difference < 10 * found["largest"]  # of another place of the slide
    assert precision_summary(run, "net", "fine_precision").startswith(
        "computed in bfloat16. On 1 patch drawn at random, the probabilities differ from float32"
    )


def test_without_a_coarse_heatmap_every_indexed_patch_is_predicted(tmp_path, client):
    run = make_run(tmp_path, noise(), random_net())
    fine.run(settings(run, coarse=None), client)
    wanted = np.ones((80, 96), bool)
    wanted[:, :4] = False  # column 0 is not indexed
    np.testing.assert_array_equal(np.isfinite(values_of(run)), wanted)
    fine.run(settings(run), client)  # the same pixels, some of them, from other tasks
    some = values_of(run)
    fine.run(settings(run, coarse=None, chunk=37), client)
    everywhere = values_of(run)
    known = np.isfinite(some)
    np.testing.assert_allclose(everywhere[known], some[known], atol=1e-6, rtol=0)


def test_a_second_run_does_nothing_and_other_inputs_do_all_again(tmp_path, client, counted):
    run = make_run(tmp_path, noise(), random_net())
    fine.run(settings(run), client)
    picture = run / "fine/net/s.jpg"
    before = picture.stat().st_mtime_ns
    counted.clear()
    outcome = fine.run(settings(run), client)
    assert (outcome.done, outcome.skipped, counted) == (0, 2, [])  # the slide and its picture
    assert picture.stat().st_mtime_ns == before

    write_asap_xml(run / "s.xml", [box(0, 0, 100, 100)])
    fine.run(settings(run), client)
    assert picture.stat().st_mtime_ns > before
    assert counted == []  # the annotation is in the picture alone

    write_coarse(run, np.where(suspicion() > 0.5, 0.1, suspicion() + 0.8))
    fine.run(settings(run), client)
    assert counted and np.isnan(values_of(run)[20:44, 44:72]).all()
    counted.clear()
    fine.run(settings(run, min_probability=0.95), client)
    assert counted == [] and np.isnan(values_of(run)).all()


def test_a_run_that_broke_off_redoes_only_what_was_not_done(tmp_path, client, monkeypatch):
    run = make_run(tmp_path, noise(), random_net())
    fine.run(settings(run, min_probability=0.79), client)  # other inputs, the same cells
    expected = values_of(run)
    predict = fine.predict_pixels

    def breaks_off(slide, grid, slab, *rest):
        if slab.chunk == (2, 3):
            raise MemoryError("the worker has none left")
        return predict(slide, grid, slab, *rest)

    monkeypatch.setattr(fine, "predict_pixels", breaks_off)
    outcome = fine.run(settings(run), client)
    assert outcome.failed == 1
    assert [row.unit for row in read_failures(run)] == ["s/2.3"]
    assert not (run / "fine/net/s.zarr").exists()
    assert not (run / "fine/net/s.jpg").exists()  # it would show the old one

    monkeypatch.setattr(fine, "predict_pixels", predict)
    before = read_done(run, "fine_predict-net")
    outcome = fine.run(settings(run), client)
    after = read_done(run, "fine_predict-net")
    changed = {key for key in after if before.get(key) != after[key]}
    assert changed == {"s/2.3"}
    assert (outcome.failed, read_failures(run)) == (0, [])
    np.testing.assert_array_equal(values_of(run), expected)


def test_a_damaged_tile_costs_the_blocks_over_it_and_is_recorded(tmp_path, client):
    run = make_run(tmp_path, noise(), random_net())
    with tifffile.TiffFile(run / "s.tif") as file:  # tiles of 128 px, 6 in a row
        page = file.pages[0]
        start, length = (values[2 * 6 + 3] for values in (page.dataoffsets, page.databytecounts))
    with (run / "s.tif").open("r+b") as file:
        file.seek(start)
        file.write(b"\x00" * length)

    config = settings(run, stride_px=2, chunk=160)
    for _ in range(2):  # a later run, which does nothing, lists it again
        outcome = fine.run(config, client)
        # The picture shows the whole slide and cannot be read.
        of_slide = [row for row in read_failures(run) if row.stage == "fine-net"]
        assert of_slide and outcome.failed == 2
        for row in of_slide:
            assert row.reason.startswith("block at level-0 px (")
            assert "cannot be decoded" in row.reason
    # The tile covers x 384 to 512, y 256 to 384; a patch reaches 5 px beyond its centre.
    values = values_of(run)
    x, y = (np.arange(n) * 2 + 1 for n in (values.shape[1], values.shape[0]))
    over = np.outer((y > 262) & (y < 378), (x > 390) & (x < 506))
    wanted = np.outer((y >= 160) & (y < 352), (x >= 352) & (x < 576))
    assert np.isnan(values[over]).all()
    # Blocks of 32 pixels, 64 px, read whole: further than that from the tile nothing is lost.
    far = np.outer((y < 256 - 70) | (y > 384 + 70), x > 0)
    assert np.isfinite(values[wanted & far]).all()
    assert (wanted & far).any()


def test_the_picture_shows_the_place_beside_both_heatmaps(tmp_path, client, monkeypatch):
    drawn = []
    figure = fine.heatmap_figure

    def keep(image, shown, lesions, panels, **options):
        drawn.append((shown, lesions, panels))
        return figure(image, shown, lesions, panels, **options)

    monkeypatch.setattr(fine, "heatmap_figure", keep)
    monkeypatch.setattr(fine, "SHOWN_LEVEL0_PX", 256)
    run = make_run(tmp_path, painted(), brightness_net())
    values = suspicion()
    values[7, 13] = 0.9
    write_coarse(run, values)
    fine.run(settings(run), client)
    ((shown, lesions, panels),) = drawn
    # Cell (7, 13) has its centre at x 432, y 240.
    assert shown == Bounds(432 - 128, 240 - 128, 256, 256)
    assert [lesion.bounds for lesion in lesions] == [SQUARE]
    assert [panel.title for panel in panels] == [
        "coarse heatmap (vgg16)",
        "fine heatmap (net)\nwhere the coarse one is 0.5 or more",
    ]
    coarse, found = panels
    np.testing.assert_array_equal(coarse.values, values[3:12, 9:18])
    np.testing.assert_array_equal(found.values, values_of(run)[13:46, 37:70])
    assert (coarse.first_cell, found.first_cell) == ((3, 9), (13, 37))
    assert Image.open(run / "fine/net/s.jpg").size[0] > 1000


def test_a_slide_without_anything_suspicious_is_finished_and_says_so(tmp_path, client, monkeypatch):
    titles, figure = [], fine.heatmap_figure

    def keep(*arguments, **options):
        titles.extend(panel.title for panel in arguments[3])
        return figure(*arguments, **options)

    monkeypatch.setattr(fine, "heatmap_figure", keep)
    run = make_run(tmp_path, painted(), brightness_net())
    outcome = fine.run(settings(run, min_probability=0.9), client)
    assert outcome.failed == 0
    assert np.isnan(values_of(run)).all()
    assert titles[1].endswith("where the coarse one is 0.9 or more: nowhere here")


def test_coarse_heatmaps_that_are_missing_or_of_another_grid_fail_their_slide(tmp_path, client):
    run = make_run(tmp_path, noise(), random_net())
    other = PatchGrid(GRID.bounds, MPP, 1.0, 64, 64, 64)
    write_coarse(run, np.full(other.shape, 0.9, np.float32), other)
    assert fine.run(settings(run), client).failed == 1
    (row,) = read_failures(run)
    assert row.slide_id == "s" and "is not that of the patch index" in row.reason
    (heatmap_folder(run, "vgg16") / "s.zarr").rename(run / "elsewhere")
    assert fine.run(settings(run), client).failed == 1
    assert "s.zarr: no heatmap of this pipeline" in read_failures(run)[0].reason
    with pytest.raises(RunError, match=r"heatmaps/vgg19 does not exist, and fine\.coarse is vgg19"):
        fine.run(settings(run, coarse="vgg19"), client)


def test_a_model_that_is_no_patchnet_is_refused(tmp_path, client):
    card = ModelCard(architecture="vgg16", mean=(0.5,) * 3, std=(0.25,) * 3, patch_px=64, mpp=MPP)
    save_model(model_folder(tmp_path, "net"), torch.nn.Linear(1, 1), card)
    with pytest.raises(ModelError, match="architecture 'vgg16': fine heatmaps need"):
        fine.run(settings(tmp_path), client)


def test_colour_constancy_and_lacking_arguments_are_refused():
    card = ModelCard(
        architecture="patchnet",
        arguments={"patch_px": 11},
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        patch_px=32,
        mpp=0.5,
    )
    assert fine._subnet_patch_px(card, "net") == 11
    with pytest.raises(ModelError, match=r"net: the model was trained with shades_of_gray 6:"):
        fine._subnet_patch_px(replace(card, shades_of_gray=6.0), "net")
    with pytest.raises(ModelError, match=r"net: model\.json lacks the argument patch_px"):
        fine._subnet_patch_px(replace(card, arguments={}), "net")


def test_status_shows_the_stage_when_it_ran(tmp_path, client):
    run = make_run(tmp_path, painted(), brightness_net())
    (run / "config.yaml").write_text(dump_config(settings(run)))
    assert not [row.stage for row in stage_status(run) if row.stage.startswith("fine")]
    fine.run(settings(run), client)
    found = {row.stage: row for row in stage_status(run) if row.stage.startswith("fine")}
    assert list(found) == ["fine_predict-net", "fine-net", "fine_pictures-net"]
    assert [found[name].done for name in found] == [6, 1, 1]
    assert (found["fine-net"].failed, found["fine-net"].left) == (0, 0)
