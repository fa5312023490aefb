import pyarrow as pa
import pytest

from wsi_pipeline.config import AnnotationConfig, CatalogConfig, Config, DetectionConfig
from wsi_pipeline.errors import RunError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.store import create_heatmap, finish_heatmap
from wsi_pipeline.jobs.unit import LargeFile, Output, SmallFile
from wsi_pipeline.patches.index import SCHEMA, PatchIndex, write_index
from wsi_pipeline.stages.evaluate import ScoreSlide, _precision
from wsi_pipeline.stages.leakage import refuse_leakage

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
        ScoreSlide(
            "s", LargeFile.at("none.tif"), 0.5, (2048, 2048), {}, None, AnnotationConfig(),
            SmallFile.at(tmp_path / "s.parquet"), LargeFile.at(tmp_path / "s.zarr"), MODEL,
            DetectionConfig(), 100, Output(tmp_path),
        ).run()  # fmt: skip


def test_heatmaps_of_two_precisions_are_not_evaluated_together(tmp_path):
    config = Config(out=tmp_path, catalog=CatalogConfig(csv="slides.csv"))
    exact, fast = {"precision": "float32"}, {"precision": "bfloat16"}
    card = {"precision": "bfloat16"}
    expected = {"training": "bfloat16", "heatmaps": "float32", "difference": None}
    assert _precision(config, card, [exact, exact]) == expected
    with pytest.raises(RunError, match="some heatmaps are in float32 and others in bfloat16"):
        _precision(config, card, [exact, fast])


def test_patients_that_were_trained_on_are_not_tested_on():
    card = {"training": {"patients": {"train": ["p1", "p2"], "validation": ["p3"]}}}
    refuse_leakage(card, test={"p4", "p5"})
    for shared in ("p2", "p3"):
        with pytest.raises(RunError, match=rf"patients \['{shared}'\] of the test split"):
            refuse_leakage(card, test={"p4", shared})
