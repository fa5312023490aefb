"""The export stage: a file of each format for each slide, and what is refused before it starts."""

import json

import numpy as np
import pandas as pd
import pytest
from planted import GRIDS, LESION, planted
from slide_files import write_pyramid_tiff

from wsi_pipeline.config import CatalogConfig, Config, ExportConfig
from wsi_pipeline.errors import ConfigError, RunError
from wsi_pipeline.heatmaps.store import write_heatmap
from wsi_pipeline.models.card import ModelCard, write_card
from wsi_pipeline.stages import export
from wsi_pipeline.stages.run_directory import SLIDE_COLUMNS

GRID = GRIDS["plain"]


@pytest.fixture
def config(tmp_path):
    """A run with a heatmap of one slide, which another slide lacks."""
    card = ModelCard(
        architecture="vgg16", mean=(0.5,) * 3, std=(0.5,) * 3, patch_px=64, mpp=0.5,
        weights_sha256="ab" * 32,
    )  # fmt: skip
    (tmp_path / "models/vgg16").mkdir(parents=True)
    write_card(tmp_path / "models/vgg16", card)
    slide = write_pyramid_tiff(
        tmp_path / "s.tif", [np.full((7000, 9000, 3), 230, np.uint8)], mpp=0.5
    )
    rows = [
        (name, str(slide), None, name, "test", 1, 0.5, 9000, 7000, "ok") for name in ("s", "other")
    ]
    pd.DataFrame(rows, columns=SLIDE_COLUMNS).to_parquet(tmp_path / "slides.parquet")
    write_heatmap(
        tmp_path / "heatmaps/vgg16/s.zarr", planted(GRID), grid=GRID, slide_id="s",
        model="vgg16@" + "ab" * 6, chunk=64, ngff="0.5",
    )  # fmt: skip
    return Config(
        out=tmp_path,
        catalog=CatalogConfig(csv="slides.csv"),
        export=ExportConfig(picture_mpp=20, min_tile_probability=0.5),
    )


def test_every_format_is_written_for_the_slides_that_have_a_heatmap(config, client):
    plan = export.plan_export(config, list(export.FILES))
    outcome = export.run(config, client, plan)
    assert (outcome.done, outcome.failed) == (len(export.FILES), 0)
    for name, files in export.FILES.items():
        folder = config.out / "export/vgg16" / name
        written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert {file.format("s") for file in files} <= written
        assert not any("other" in path for path in written)
    qupath = json.loads((config.out / "export/vgg16/geojson/s.geojson").read_text())
    kinds = [feature["properties"]["objectType"] for feature in qupath["features"]]
    assert kinds.count("tile") == (planted(GRID) == LESION).sum() == 12
    assert kinds.count("annotation") == 1
    assert export.run(config, client, plan).done == 0


def test_an_export_elsewhere_does_not_pass_for_the_one_in_the_run(config, client, tmp_path):
    def regions():
        text = (config.out / "export/vgg16/geojson/s.geojson").read_text()
        return text.count('"annotation"')

    lower = config.model_copy(update={"export": ExportConfig(thresholds=(0.2, 0.9))})
    export.run(config, client, export.plan_export(config, ["geojson"]))
    assert regions() == 1
    export.run(lower, client, export.plan_export(lower, ["geojson"], folder=tmp_path / "x"))
    export.run(lower, client, export.plan_export(lower, ["geojson"]))
    assert regions() > 1


def test_what_cannot_be_exported_is_refused_before_anything_is_written(config, client, tmp_path):
    with pytest.raises(ConfigError, match="format 'jpeg2000' is not one of geojson, ome-tiff"):
        export.plan_export(config, ["csv", "jpeg2000"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(RunError, match=r"holds thesis\.txt, which is not an export"):
        export.plan_export(config, ["csv"], folder=tmp_path / "mine")
    with pytest.raises(RunError, match="slide other has no heatmap of vgg16"):
        export.run(config, client, export.plan_export(config, ["csv"], ["other"]))
