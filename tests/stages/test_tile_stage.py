"""Which patches are out of date."""

import json

import pandas as pd

from wsi_pipeline.config import CatalogConfig, Config, TileConfig
from wsi_pipeline.patches.index import SCHEMA_VERSION
from wsi_pipeline.stages.run_directory import SLIDE_COLUMNS
from wsi_pipeline.stages.tile import _unit, stale_slides


def test_patches_of_an_edited_annotation_or_of_other_settings_are_out_of_date(tmp_path):
    names = ("kept", "edited", "of another tool")
    for name in names:
        (tmp_path / f"{name}.xml").write_text("<a/>")
    slides = pd.DataFrame(
        [
            (name, f"{name}.svs", str(tmp_path / f"{name}.xml"), name, "test", 1, 0.5, 9, 9, "ok")
            for name in names
        ],
        columns=SLIDE_COLUMNS,
    )
    config = Config(out=tmp_path, catalog=CatalogConfig(csv="slides.csv"))
    (tmp_path / "done").mkdir()
    with (tmp_path / "done/tile.jsonl").open("w") as file:
        for slide in slides.head(2).itertuples(index=False):
            unit = _unit(slide, config)
            line = {"key": unit.key, "hash": unit.hash(SCHEMA_VERSION)}
            file.write(json.dumps(line | {"finished": "", "seconds": 0, "result": {}}) + "\n")

    assert stale_slides(config, slides) == []
    (tmp_path / "edited.xml").write_text("<b/>")
    assert stale_slides(config, slides) == ["edited"]
    other = config.model_copy(update={"tile": TileConfig(patch_px=256, inner_px=128)})
    assert stale_slides(other, slides) == ["kept", "edited"]
