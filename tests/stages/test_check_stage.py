"""What the check says of a cohort before anything starts: each fault once, and nothing else."""

import json
import os
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from shapely import box
from slide_files import write_pyramid_tiff

from wsi_pipeline.cli import main
from wsi_pipeline.config import CatalogConfig, Config, TileConfig, TrainConfig
from wsi_pipeline.models.card import ModelCard
from wsi_pipeline.models.checkpoint import save_model
from wsi_pipeline.slides.annotation_xml import write_asap_xml
from wsi_pipeline.stages import check

SIDE, MPP = 400, 2.0


def write_slide(path, shade, mpp=MPP, tissue=True):
    """A square of tissue on glass, 400 x 400 px; another shade is another slide."""
    pixels = np.full((SIDE, SIDE, 3), 244, np.uint8)
    if tissue:
        pixels[100:300, 100:300] = (200, 100, 120 + shade)
        pixels[300, 100 : 110 + shade] = (200, 100, 120)
    return write_pyramid_tiff(path, [pixels], mpp=mpp)


@pytest.fixture
def cohort(tmp_path):
    """Six slides in which nothing is wrong: a tumour and a normal slide in each split."""
    rows = []
    for number, split in enumerate(("train", "validation", "test") * 2):
        name, tumour = f"s{number}", number < 3
        write_slide(tmp_path / f"{name}.tif", number)
        if tumour:
            write_asap_xml(tmp_path / f"{name}.xml", [box(150, 150, 220, 210 + number)])
        rows.append([name, f"{name}.tif", f"{name}.xml" if tumour else "", split, int(tumour)])
    return tmp_path, rows


def look(client, cohort, *, tile=None, **sections):
    folder, rows = cohort
    lines = ["slide_id,path,annotation,split,label", *(",".join(map(str, row)) for row in rows)]
    (folder / "slides.csv").write_text("\n".join(lines))
    config = Config(
        out=folder / "run",
        catalog=CatalogConfig(csv=folder / "slides.csv"),
        tile=tile or TileConfig(patch_px=32, stride_px=32, inner_px=32),
        **{"train": TrainConfig(weights="none"), **sections},
    )
    config.out.mkdir(exist_ok=True)
    check.run(config, client)
    return [(row.slide_id, row.kind, row.what) for row in check.read_findings(config.out)]


def test_of_a_cohort_in_which_nothing_is_wrong_nothing_is_said(cohort, client):
    assert look(client, cohort) == []


def off_frame(folder, row):
    write_asap_xml(folder / row[2], [box(5000, 5000, 5100, 5100)])


def on_glass(folder, row):
    write_asap_xml(folder / row[2], [box(10, 10, 60, 60)])


def points_only(folder, row):
    shape = {"type": "Point", "coordinates": [200, 200]}
    properties = {"objectType": "annotation", "classification": {"name": "Tumor"}}
    feature = {"type": "Feature", "geometry": shape, "properties": properties}
    (folder / row[2]).write_text(json.dumps([feature]))
    row[4] = ""


def unknown_class(folder, row):
    write_asap_xml(folder / row[2], [box(150, 150, 220, 220)], group="Metastasis")


def missing_annotation(folder, row):
    row[2] = "none.xml"


def label_disagrees(folder, row):
    row[4] = 0


def missing_slide(folder, row):
    row[1] = "none.tif"


def cut_short(folder, row):
    path = folder / row[1]
    path.write_bytes(path.read_bytes()[:200])


def printers_resolution(folder, row):
    write_slide(folder / row[1], 77, mpp=42.3)


def no_resolution(folder, row):
    write_slide(folder / row[1], 77, mpp=None)


def another_resolution(folder, row):
    write_slide(folder / row[1], 77, mpp=1.0)


def no_tissue(folder, row):
    write_slide(folder / row[1], 0, tissue=False)


@pytest.mark.parametrize(
    ("plant", "slide", "kind", "what"),
    [
        (missing_slide, 3, "slide", "no such file"),
        (cut_short, 3, "slide", "OpenSlide"),
        (no_resolution, 3, "resolution", "states no resolution"),
        (printers_resolution, 3, "resolution", "states 42.3 um per px"),
        (another_resolution, 3, "resolution", "would have 1 um per px, those of most slides 2"),
        (no_tissue, 3, "tissue", "tissue"),
        (missing_annotation, 3, "annotation", "cannot be read"),
        (off_frame, 0, "annotation", "all off the slide"),
        (on_glass, 0, "annotation", "0% of the area of its lesions is tissue"),
        (unknown_class, 0, "annotation", "none of its classes ['Metastasis'] is tumour"),
        (points_only, 0, "annotation", "nothing that is drawn has an area"),
        (label_disagrees, 0, "label", "holds lesions (1), but the catalog's label"),
    ],
)
def test_a_fault_of_a_slide_is_named_once(cohort, client, plant, slide, kind, what):
    folder, rows = cohort
    # A second tumour slide in each split, so that a split lacks none when one is lost.
    for number in range(3):
        write_slide(folder / f"t{number}.tif", 20 + number)
        write_asap_xml(folder / f"t{number}.xml", [box(150, 150, 220, 220 - number)])
        rows.append([f"t{number}", f"t{number}.tif", f"t{number}.xml", rows[number][3], 1])
        write_slide(folder / f"n{number}.tif", 30 + number)
        rows.append([f"n{number}", f"n{number}.tif", "", rows[number][3], 0])
    plant(folder, rows[slide])
    [(found, found_kind, text)] = look(client, cohort)
    assert (found, found_kind) == (f"s{slide}", kind)
    assert what in text


def without(split):
    def plant(folder, rows):
        for row in rows:
            row[3] = row[3] if row[3] != split else "train" if split != "train" else "test"

    return plant


def no_test_label(folder, rows):
    for row in rows:
        if row[3] == "test":
            row[2] = row[4] = ""


def only_normal_test_slides(folder, rows):
    rows[2][2], rows[2][4] = "", 0


def copy_of_a_slide(folder, rows):
    shutil.copy(folder / rows[3][1], folder / rows[4][1])


@pytest.mark.parametrize(
    ("plant", "kind", "what", "refuses"),
    [
        (without("train"), "split", "no slide with lesions is in the train split", True),
        (without("test"), "split", "no slide of known label is in the test split", True),
        (no_test_label, "split", "no slide of known label is in the test split", True),
        (only_normal_test_slides, "split", "all slides of the test split are normal", False),
        (copy_of_a_slide, "copy", "copies of one slide: s3", True),
    ],
)
def test_a_fault_of_the_cohort_is_named_once(cohort, client, plant, kind, what, refuses):
    plant(*cohort)
    found = look(client, cohort)
    [(slide_id, found_kind, text)] = found
    assert (slide_id, found_kind) == ("", kind)
    assert what in text
    [row] = check.read_findings(cohort[0] / "run")
    assert row.refuses == refuses


def test_start_weights_that_know_a_test_patient_are_named(cohort, client, tmp_path):
    from small_networks import SmallVgg

    card = ModelCard(
        architecture="vgg16", mean=(0, 0, 0), std=(1, 1, 1), patch_px=32, mpp=MPP,
        training={"patients": {"train": ["s2"]}},
    )  # fmt: skip
    save_model(tmp_path / "model", SmallVgg(), card)
    weights = str(tmp_path / "model/model.safetensors")
    [(_, kind, text)] = look(client, cohort, train=TrainConfig(weights=weights))
    assert kind == "leakage"
    assert "'s2'" in text
    [(_, kind, text)] = look(client, cohort, train=TrainConfig(weights=str(tmp_path / "no.pth")))
    assert (kind, "there is no such file" in text) == ("settings", True)


def test_too_little_room_on_disk_is_named(cohort, client, monkeypatch):
    # 6 slides of some 40 squares of 32 px (200 px of tissue): 40 bytes each, and 3 bytes a px in
    # the cache, which the 4 slides of train and validation have.
    cached = 4 * 40 * 3 * 32**2
    free = {"bytes": cached * 1.3}
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free["bytes"])
    )
    train = TrainConfig(weights="none", cache=True)
    assert look(client, cohort, train=train) == []
    free["bytes"] = cached * 0.8
    [(_, kind, text)] = look(client, cohort, train=train)
    assert (kind, "train.cache takes the most" in text) == ("disk", True)
    assert look(client, cohort) == []
    for slide in ("s0", "s1"):  # what is there takes no more room
        (cohort[0] / f"run/cache/{slide}.zarr").mkdir(parents=True)
    assert look(client, cohort, train=train) == []


def test_what_failed_is_looked_at_again(cohort, client):
    """A file that was out of reach comes back with the same size and time."""
    path = cohort[0] / "s3.tif"
    data, stat = path.read_bytes(), path.stat()
    path.write_bytes(bytes(len(data)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert [slide for slide, *_ in look(client, cohort)] == ["s3"]
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert look(client, cohort) == []


def test_slide_ids_of_digits_stay_text(cohort, client):
    cohort[1][3][:2] = ["007", "none.tif"]
    [(slide, kind, _)] = look(client, cohort)
    assert (slide, kind) == ("007", "slide")


def test_hard_negatives_that_cannot_be_used_are_named(cohort, client, tmp_path):
    train = TrainConfig(weights="none", hard_negatives=tmp_path / "none.parquet")
    [(_, kind, text)] = look(client, cohort, train=train)
    assert (kind, "no table of hard negatives" in text) == ("settings", True)


def test_a_run_that_would_end_in_the_middle_is_refused_before_it_starts(cohort):
    folder, rows = cohort
    for row in rows:
        row[3] = "train" if row[3] == "test" else row[3]
    lines = ["slide_id,path,annotation,split,label", *(",".join(map(str, row)) for row in rows)]
    (folder / "slides.csv").write_text("\n".join(lines))
    settings = {
        "out": str(folder / "run"), "catalog": {"csv": str(folder / "slides.csv")},
        "train": {"weights": "none"},
        "tile": {"patch_px": 32, "stride_px": 32, "inner_px": 32}, "jobs": {"workers": 1},
    }  # fmt: skip
    (folder / "c.yaml").write_text(json.dumps(settings))
    done = CliRunner().invoke(main, ["run", "-c", str(folder / "c.yaml")])
    assert done.exit_code == 2
    assert "no slide of known label is in the test split" in done.output
    assert not (folder / "run/slides.parquet").exists()
    done = CliRunner().invoke(main, ["check", "-c", str(folder / "c.yaml")])
    assert done.exit_code == 1
    assert "1 found" in done.output
