"""What is tiled of a slide, and which patches are out of date."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from shapely import box
from shapely.affinity import translate
from slide_files import damage_tile, write_mrxs, write_pyramid_tiff

from wsi_pipeline.config import AnnotationConfig, CatalogConfig, Config, TileConfig
from wsi_pipeline.errors import AnnotationError
from wsi_pipeline.patches.index import SCHEMA_VERSION, read_index
from wsi_pipeline.slides.annotation_xml import write_asap_xml
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages.run_directory import SLIDE_COLUMNS, tissue_folder
from wsi_pipeline.stages.tile import _unit, stale_slides


def test_a_damaged_tile_costs_the_patches_in_it_and_is_told_and_shown(tmp_path):
    """4 x 4 tiles of 256 px, a patch each; a px of them is one of the mask and of the picture."""
    path = tmp_path / "s.tif"
    pink = np.full((1024, 1024, 3), (200, 100, 150), np.uint8)
    write_pyramid_tiff(path, [pink], tile=256, mpp=8.0)
    damage_tile(path, 5)
    row = ("s", str(path), None, "s", "test", 0, 8.0, 1024, 1024, "ok")
    slides = pd.DataFrame([row], columns=SLIDE_COLUMNS).assign(tissue=None, exclude=None)
    config = Config(
        out=tmp_path,
        catalog=CatalogConfig(csv="slides.csv"),
        tile=TileConfig(patch_px=256, stride_px=256, inner_px=256),
    )
    for folder in (tmp_path / "patches", tissue_folder(tmp_path)):
        folder.mkdir()
    (unit,) = (_unit(slide, config) for slide in slides.itertuples(index=False))

    result = unit.run()
    table = read_index(unit.outputs[0]).table
    corners = set(zip(table["x"].to_pylist(), table["y"].to_pylist(), strict=True))
    everywhere = {(256 * (i % 4), 256 * (i // 4)) for i in range(16)}
    assert corners == everywhere - {(256, 256)}
    assert result["patches"] == 15
    assert len(result["failures"]) == 16  # blocks of 64 px
    assert all(text.startswith(f"taken for no tissue: {path}") for text in result["failures"])
    with Image.open(tissue_folder(tmp_path) / "s.jpg") as picture:
        shown = np.asarray(picture.convert("RGB"))
    assert shown.shape == (1024, 1024, 3)
    assert shown[272:496, 272:496].min() >= 250  # inside the outline around it


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
    ).assign(tissue=None, exclude=None)
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
    tile = TileConfig(patch_px=256, stride_px=128, inner_px=128)
    other = config.model_copy(update={"tile": tile})
    assert stale_slides(other, slides) == ["kept", "edited"]


@pytest.mark.parametrize(
    ("origin", "counts_from", "advice"),
    [
        ("slide", "bounds", "catalog.annotation.origin: bounds, scale: 1 (100%)"),
        ("bounds", "slide", "catalog.annotation.origin: slide, scale: 1 (100%)"),
        ("slide", "slide", None),
    ],
)
def test_lesions_that_lie_off_tissue_refuse_the_slide_and_name_the_setting(
    tmp_path, origin, counts_from, advice
):
    pixels = np.full((600, 600, 3), 245, np.uint8)
    pixels[100:500, 100:500] = (200, 100, 150)
    with Slide(write_mrxs(tmp_path / "s.mrxs", pixels, 2000, 1000, mpp=8.0)) as slide:
        x, y = slide.bounds.x, slide.bounds.y
        size = slide.size
    corner = (0, 0) if counts_from == "bounds" else (x, y)
    lesion = translate(box(200, 200, 300, 300), *corner)
    write_asap_xml(tmp_path / "s.xml", [lesion])
    row = ("s", str(tmp_path / "s.mrxs"), str(tmp_path / "s.xml"), "s", "test", 1, 8.0, *size, "ok")
    config = Config(
        out=tmp_path,
        catalog=CatalogConfig(csv="slides.csv", annotation=AnnotationConfig(origin=origin)),
        tile=TileConfig(patch_px=64, stride_px=64, inner_px=64),
    )
    for folder in (tmp_path / "patches", tissue_folder(tmp_path)):
        folder.mkdir()
    slides = pd.DataFrame([row], columns=SLIDE_COLUMNS).assign(tissue=None, exclude=None)
    (unit,) = (_unit(slide, config) for slide in slides.itertuples(index=False))
    if advice is None:
        assert unit.run()["positive"] == 4  # of 64 px, over 200 to 300
        return
    with pytest.raises(AnnotationError) as error:
        unit.run()
    for part in (str(tmp_path / "s.xml"), advice):
        assert part in str(error.value)


def slide_with_masks(tmp_path, **masks):
    """A pink slide of 1024 x 1024 px at 8 um, with masks of 8 x 8 px; its unit."""
    path = tmp_path / "s.tif"
    pink = np.full((1024, 1024, 3), (200, 100, 150), np.uint8)
    if not path.exists():
        write_pyramid_tiff(path, [pink], tile=256, mpp=8.0)
    for name, mask in masks.items():
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    row = ("s", str(path), None, "s", "test", 0, 8.0, 1024, 1024, "ok")
    slides = pd.DataFrame([row], columns=SLIDE_COLUMNS).assign(tissue=None, exclude=None)
    slides = slides.assign(**{name: str(tmp_path / f"{name}.png") for name in masks})
    config = Config(
        out=tmp_path,
        catalog=CatalogConfig(csv="slides.csv", tissue_values=(0,)),
        tile=TileConfig(patch_px=256, stride_px=256, inner_px=256),
    )
    for folder in (tmp_path / "patches", tissue_folder(tmp_path)):
        folder.mkdir(exist_ok=True)
    (unit,) = (_unit(slide, config) for slide in slides.itertuples(index=False))
    return unit


def test_patches_are_of_masks_made_elsewhere(tmp_path):
    """Value 0 is tissue, as in GrandQC's masks: the left half; the upper quarter is excluded."""
    background, exclude = np.zeros((2, 8, 8), np.uint8)
    background[:, 4:], exclude[:2] = 1, 7
    unit = slide_with_masks(tmp_path, tissue=background, exclude=exclude)
    result = unit.run()
    table = read_index(unit.out).table
    corners = set(zip(table["x"].to_pylist(), table["y"].to_pylist(), strict=True))
    assert corners == {(x, y) for x in (0, 256) for y in (256, 512, 768)}
    assert result["notes"] == []


def test_a_changed_mask_is_another_input(tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    before = slide_with_masks(tmp_path, tissue=mask).hash(1)
    assert slide_with_masks(tmp_path, tissue=mask).hash(1) == before
    mask[0] = 1
    assert slide_with_masks(tmp_path, tissue=mask).hash(1) != before


def test_a_slide_that_is_all_tissue_is_noted(tmp_path):
    (note,) = slide_with_masks(tmp_path).run()["notes"]
    assert note == "100% of the imaged area is tissue: check tile.tissue.min_chroma"
