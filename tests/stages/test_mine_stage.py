"""Hard negatives from heatmaps, and the training that uses them, without training."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from wsi_pipeline.config import CatalogConfig, Config, MineConfig, TrainConfig
from wsi_pipeline.errors import RunError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.store import create_heatmap, finish_heatmap, write_chunk
from wsi_pipeline.patches.index import SCHEMA, PatchIndex, write_index
from wsi_pipeline.patches.slabs import Slab
from wsi_pipeline.stages import mine
from wsi_pipeline.stages.run_directory import SLIDE_COLUMNS, heatmap_folder, index_path
from wsi_pipeline.stages.train import _unit

GRID = PatchGrid(Bounds(0, 0, 5 * 256, 4 * 256), 0.5, 1.0, 512, 256, 256)
SHA = "0" * 64
# A lesion of one cell; probabilities in per cent. The 95 beside it, and the tumour, are not mined.
LABELS = np.zeros(GRID.shape, np.int8)
LABELS[0, 0] = 1
PERCENT = np.array([
    [99, 95, 10, 10, 60],
    [10, 94, 10, 10, 10],
    [10, 10, 10, 10, 50],
    [97, 10, 10, 10, 49],
])  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Four validation patients, two with tumour; one slide each, all with the same heatmap."""
    slides = pd.DataFrame(
        [
            (f"v{i}", f"v{i}.svs", None, f"p{i}", "validation", i % 2, 0.5, 1280, 1024, "ok")
            for i in range(4)
        ]
        + [("t", "t.svs", None, "p9", "test", 1, 0.5, 1280, 1024, "ok")]
        + [("a", "a.svs", None, "p8", "train", 1, 0.5, 1280, 1024, "ok")],
        columns=SLIDE_COLUMNS,
    )
    slides.to_parquet(tmp_path / "slides.parquet")
    model = tmp_path / "models/vgg16"
    model.mkdir(parents=True)
    card = {
        "weights_sha256": SHA,
        "training": {"slides": {"train": ["a"], "validation": ["v0", "v1", "v2", "v3"]}},
    }
    (model / "model.json").write_text(json.dumps(card))
    rows, cols = np.indices(GRID.shape).reshape(2, -1)
    x, y = GRID.patch_origins(rows, cols)
    (tmp_path / "patches").mkdir()
    heatmap_folder(tmp_path, "vgg16").mkdir(parents=True)
    for slide in slides["slide_id"]:
        full = np.ones(len(x), np.float32)
        columns = (x, y, full, full, LABELS.ravel(), [[]] * len(x))
        table = pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)
        write_index(PatchIndex(slide, GRID, table), index_path(tmp_path, slide))
        store = heatmap_folder(tmp_path, "vgg16") / f"{slide}.zarr"
        create_heatmap(store, grid=GRID, slide_id=slide, model="vgg16@" + SHA[:12])
        write_chunk(store, Slab((0, 0), rows, cols), (PERCENT / 100).astype(np.float32).ravel())
        finish_heatmap(store)
    return tmp_path


def config(run, **mining):
    return Config(out=run, catalog=CatalogConfig(csv="slides.csv"), mine=MineConfig(**mining))


def test_false_positives_of_half_of_the_patients_are_ranked(run):
    path, table = mine.run(config(run))
    assert path == run / "mined/vgg16.parquet"
    pd.testing.assert_frame_equal(pd.read_parquet(path), table)
    mined = sorted(set(table["slide_id"]))
    assert len(mined) == 2
    assert {int(slide[1]) % 2 for slide in mined} == {0, 1}  # so are those that are left
    # Of each slide 0.97, 0.60 and 0.50, the threshold included; corners half a patch further out.
    assert table["score"].tolist() == pytest.approx([0.97, 0.97, 0.6, 0.6, 0.5, 0.5])
    assert table["slide_id"].tolist() == mined * 3
    assert table[["x", "y"]].drop_duplicates().values.tolist() == [
        [-128, 3 * 256 - 128], [4 * 256 - 128, -128], [4 * 256 - 128, 2 * 256 - 128],
    ]  # fmt: skip


def test_the_most_probable_are_kept(run):
    _, table = mine.run(config(run, count=3))
    assert table["score"].tolist() == pytest.approx([0.97, 0.97, 0.6])


def test_patients_must_be_left_to_validate_with(run):
    with pytest.raises(
        RunError,
        match=r"patients: \d+\): with 0\.9 of the patients mined, none is mined or none with",
    ):
        mine.run(config(run, patients=0.9))


def test_nothing_to_mine_is_said(run):
    with pytest.raises(RunError, match=r"has a probability of 0\.98 or more"):
        mine.run(config(run, min_probability=0.98))


def test_training_with_hard_negatives_does_not_validate_on_their_patients(run):
    path, table = mine.run(config(run))
    mined = sorted(set(table["slide_id"]))
    settings = config(run).model_copy(
        update={"train": TrainConfig(name="again", hard_negatives=path)}
    )
    slides = _unit(settings).slides
    ids = {part: sorted(of.patches.slide_id for of in of_part) for part, of_part in slides.items()}
    assert ids["hard_negatives"] == mined
    assert ids["validation"] == sorted({"v0", "v1", "v2", "v3"} - set(mined))
    assert ids["train"] == ["a"]


def test_training_with_hard_negatives_of_all_patients_has_none_left_to_validate_with(run):
    path, table = mine.run(config(run))
    of_all = [table.head(1).assign(slide_id=f"v{n}") for n in range(4)]
    pd.concat(of_all).to_parquet(path)
    settings = config(run).model_copy(update={"train": TrainConfig(hard_negatives=path)})
    with pytest.raises(
        RunError, match=rf"is left to validate with: .*hard_negatives: .*{path.name}"
    ):
        _unit(settings)


def test_hard_negatives_of_the_test_split_are_refused(run):
    path, table = mine.run(config(run))
    table.assign(slide_id="t").drop_duplicates(["x", "y"]).to_parquet(path)
    settings = config(run).model_copy(update={"train": TrainConfig(hard_negatives=path)})
    with pytest.raises(RunError, match=r"vgg16\.parquet.*are of the test split"):
        _unit(settings)
