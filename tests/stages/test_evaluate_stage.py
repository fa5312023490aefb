import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from wsi_pipeline.errors import RunError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.store import create_heatmap, finish_heatmap
from wsi_pipeline.patches.index import SCHEMA, PatchIndex, write_index
from wsi_pipeline.stages.evaluate import _refuse_leakage, _slide_scores, read_patches, score_slide

MODEL = "vgg16@abc"


def grid(stride_px=256):
    return PatchGrid(Bounds(0, 0, 2048, 2048), 0.5, 1.0, 512, stride_px, 256)


@pytest.mark.parametrize(("stride_px", "model"), [(128, MODEL), (256, "vgg16@def")])
def test_a_heatmap_of_other_patches_or_another_model_is_not_evaluated(tmp_path, stride_px, model):
    table = pa.table({f.name: pa.array([], f.type) for f in SCHEMA}, schema=SCHEMA)
    write_index(PatchIndex("s", grid(stride_px), table), tmp_path / "s.parquet")
    create_heatmap(tmp_path / "s.zarr", grid=grid(), slide_id="s", model=model)
    finish_heatmap(tmp_path / "s.zarr")
    with pytest.raises(RunError, match="run the heatmap stage again"):
        score_slide(
            "s", "none.tif", 0.5, [2048, 2048], {}, None, {}, str(tmp_path / "s.parquet"),
            str(tmp_path / "s.zarr"), MODEL, {}, 100, str(tmp_path),
        )  # fmt: skip


def test_patients_that_were_trained_on_are_not_tested_on():
    card = {"training": {"patients": {"train": ["p1", "p2"], "validation": ["p3"]}}}
    _refuse_leakage(pd.DataFrame({"patient_id": ["p4", "p5"]}), card)
    for shared in ("p2", "p3"):
        with pytest.raises(RunError, match=rf"patients \['{shared}'\] of the test split"):
            _refuse_leakage(pd.DataFrame({"patient_id": ["p4", shared]}), card)


@pytest.fixture
def scored(tmp_path):
    """Scores of slides b (two patches, one of them on lesions 1 and 2), a (one), e (none)."""
    (tmp_path / "slides").mkdir()
    for name, scores, lesions in (
        ("b", [0.5, 0.25], [[], [1, 2]]),
        ("a", [None], [[]]),
        ("e", [], []),
    ):
        columns = {
            "label": pa.array([0] * len(scores), pa.int8()),
            "lesions": pa.array(lesions, pa.list_(pa.int32())),
            "score": pa.array([np.nan if s is None else s for s in scores], pa.float32()),
        }
        pq.write_table(pa.table(columns), tmp_path / "slides" / f"{name}.parquet")
    return tmp_path


def test_patches_are_read_in_the_order_of_their_slides_at_a_few_bytes_each(scored):
    patches = read_patches(scored, ["b", "a", "e"])
    assert patches["slide_id"].tolist() == ["b", "b", "a"]
    assert patches["slide_id"].cat.categories.tolist() == ["b", "a", "e"]
    # label int8, score float32, slide_id int8 at three slides
    assert [patches[name].to_numpy().itemsize for name in ("label", "score")] == [1, 4]
    assert patches["slide_id"].cat.codes.dtype == np.int8


def test_only_the_patches_asked_for_are_read(scored):
    on_lesions = pc.list_value_length(pc.field("lesions")) > 0
    patches = read_patches(scored, ["b", "a", "e"], ("lesions", "score"), on_lesions)
    assert [row.lesions.tolist() for row in patches.itertuples()] == [[1, 2]]
    assert patches["slide_id"].tolist() == ["b"] and patches["score"].tolist() == [0.25]


def test_a_slides_score_is_its_best_patch(scored):
    # a has a patch, which could not be read; e has none.
    np.testing.assert_equal(_slide_scores(scored, ["b", "a", "e"]), [0.5, np.nan, -np.inf])
