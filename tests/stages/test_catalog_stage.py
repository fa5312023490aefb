import shutil

import numpy as np
import pandas as pd
import pytest
from slide_files import write_pyramid_tiff

from wsi_pipeline.config import AnnotationConfig, Config
from wsi_pipeline.errors import AnnotationError, CatalogError, SlideError
from wsi_pipeline.jobs.unit import LargeFile, SmallFile
from wsi_pipeline.slides.annotation_xml import write_asap_xml
from wsi_pipeline.stages import catalog
from wsi_pipeline.stages.catalog import InspectSlide, listed_slides
from wsi_pipeline.stages.run_directory import catalog_notes

RULES = AnnotationConfig(positive=("Tumor",), exclusion=())


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Two slides of 600 x 400 px: one states 0.5 um per px, the other nothing."""
    folder = tmp_path_factory.mktemp("slides")
    pixels = np.full((400, 600, 3), 200, np.uint8)
    return (
        write_pyramid_tiff(folder / "stated.tif", [pixels], mpp=0.5),
        write_pyramid_tiff(folder / "silent.tif", [pixels]),
    )


def inspect(path, mpp=None, default_mpp=None, annotation=None, label=None, unannotated="unknown"):
    file = annotation and SmallFile.at(annotation)
    unit = InspectSlide("s", LargeFile.at(path), mpp, default_mpp, file, label, unannotated, RULES)
    return unit.run()


def test_the_default_resolution_is_for_slides_that_state_none(slides):
    stated, silent = slides
    assert inspect(stated, default_mpp=0.25)["mpp"] == pytest.approx(0.5)
    assert inspect(silent, default_mpp=0.25)["mpp"] == 0.25
    assert inspect(stated, mpp=0.25)["mpp"] == 0.25  # the table's own value wins over all
    with pytest.raises(SlideError, match="states no resolution"):
        inspect(silent)


def test_a_missing_slide_is_not_excused_by_a_default_resolution(tmp_path):
    with pytest.raises(SlideError, match="no such file"):
        inspect(tmp_path / "none.tif", default_mpp=0.25)


@pytest.mark.parametrize(
    ("annotated", "label", "unannotated", "expected"),
    [
        (True, None, "unknown", 1),
        (True, 1, "unknown", 1),
        (False, None, "unknown", -1),
        (False, None, "normal", 0),
        (False, 1, "normal", 1),
        (False, 0, "unknown", 0),
    ],
)
def test_labels_come_from_the_table_else_the_annotation_else_the_setting(
    slides, tmp_path, annotated, label, unannotated, expected
):
    annotation = None
    if annotated:
        from shapely import box

        annotation = str(tmp_path / "a.xml")
        write_asap_xml(annotation, [box(10, 10, 50, 50)])
    found = inspect(slides[0], annotation=annotation, label=label, unannotated=unannotated)
    assert found["label"] == expected


def test_a_lesion_on_a_slide_labelled_normal_is_a_contradiction(slides, tmp_path):
    from shapely import box

    annotation = str(tmp_path / "a.xml")
    write_asap_xml(annotation, [box(10, 10, 50, 50)])
    with pytest.raises(CatalogError, match=r"lesions \(1\), but the catalog's label .* is 0"):
        inspect(slides[0], annotation=annotation, label=0)
    write_asap_xml(annotation, [box(1000, 1000, 1100, 1100)])
    with pytest.raises(AnnotationError, match="off the slide"):
        inspect(slides[0], annotation=annotation)


def test_a_table_without_validation_gets_it_from_the_patients_of_train(tmp_path):
    rows = [
        {"slide_id": f"s{i}", "path": f"s{i}.tif", "patient_id": f"p{i // 2}", "label": i // 2 % 2,
         "split": "test" if i >= 40 else "train"}
        for i in range(50)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "slides.csv", index=False)
    config = Config.model_validate(
        {
            "out": "run",
            "catalog": {
                "csv": tmp_path / "slides.csv",
                "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
            },
        }
    )
    frame, notes = listed_slides(config)
    assert notes == ["no slide is in the validation split: its patients are drawn from train"]
    assert set(frame.loc[frame["slide_id"].isin([f"s{i}" for i in range(40, 50)]), "split"]) == {
        "test"
    }
    patients = frame.groupby("patient_id")["split"].agg(["nunique", "first"])
    assert patients["nunique"].max() == 1
    assert (patients["first"] == "validation").sum() == 5  # 20 patients of train, a quarter


def slide_of(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (256, 256, 3), np.uint8)
    return write_pyramid_tiff(path, [pixels], mpp=0.5)


def config_of(tmp_path, **settings):
    (tmp_path / "run").mkdir(exist_ok=True)
    return Config.model_validate({"out": tmp_path / "run", "catalog": settings})


def test_copies_of_a_slide_are_an_error_that_names_slides_and_paths(tmp_path, client):
    folder = tmp_path / "slides"
    folder.mkdir()
    for seed, name in enumerate(("a", "b", "c")):
        slide_of(folder / f"{name}.tif", seed)
    shutil.copy(folder / "a.tif", folder / "d.tif")
    (folder / "empty.tif").touch()  # it fails alone
    told = r"copies of one slide: a \(.*slides/a\.tif\), d \(.*slides/d\.tif\).*copies: 1"
    with pytest.raises(CatalogError, match=told):
        catalog.run(config_of(tmp_path, slides=folder), client)
    slides = pd.read_parquet(tmp_path / "run/slides.parquet").set_index("slide_id")
    assert slides["status"].to_dict() == {
        "a": "copy", "b": "ok", "c": "ok", "d": "copy", "empty": "failed",
    }  # fmt: skip
    (folder / "d.tif").unlink()
    catalog.run(config_of(tmp_path, slides=folder), client)
    slides = pd.read_parquet(tmp_path / "run/slides.parquet")
    assert slides["status"].tolist() == ["ok", "ok", "ok", "failed"]


def test_slides_of_a_tcga_patient_are_in_one_split_and_notes_say_so(tmp_path, client):
    folder = tmp_path / "slides"
    folder.mkdir()
    for patient in range(6):
        for number in (1, 2):
            name = f"TCGA-AA-000{patient}-01Z-00-DX{number}.tif"
            slide_of(folder / name, 2 * patient + number)
    (folder / ".hidden").touch()
    catalog.run(config_of(tmp_path, slides=folder), client)
    slides = pd.read_parquet(tmp_path / "run/slides.parquet")
    assert slides["patient_id"].nunique() == 6
    assert (slides.groupby("patient_id")["split"].nunique() == 1).all()
    assert catalog_notes(tmp_path / "run") == [
        f"passed over under {folder}: hidden or system files: 1 (first: .hidden)",
        "patients were taken from slide ids by tcga names: slides 12, patients 6 (first: slide"
        " TCGA-AA-0000-01Z-00-DX1 of patient TCGA-AA-0000)",
    ]


def test_a_patient_known_by_name_may_not_be_in_two_splits_of_a_table(tmp_path):
    table = tmp_path / "slides.csv"
    table.write_text("slide_id,path,split\npatient_001_node_1,a,train\npatient_001_node_2,b,test\n")
    with pytest.raises(CatalogError, match="'patient_001' is in more than one split"):
        listed_slides(config_of(tmp_path, csv=table))
    frame, notes = listed_slides(config_of(tmp_path, csv=table, patient_from=None))
    assert frame["patient_id"].tolist() == ["patient_001_node_1", "patient_001_node_2"]
    assert not any("own patient" in note for note in notes)  # it was asked for


@pytest.mark.parametrize(("drawn", "noted"), [(True, 1), (False, 0)])
def test_annotations_that_are_copies_are_noted_if_they_hold_a_lesion(
    tmp_path, client, drawn, noted
):
    from shapely import box

    rows = []
    for name in ("a", "b"):
        slide_of(tmp_path / f"{name}.tif", ord(name))
        rows.append(f"{name},{name}.tif,{name}.xml,p_{name}")
        write_asap_xml(tmp_path / f"{name}.xml", [box(9, 9, 99, 99)] if drawn else [])
    table = tmp_path / "slides.csv"
    table.write_text("\n".join(["slide_id,path,annotation,patient_id", *rows]))
    catalog.run(config_of(tmp_path, csv=table), client)
    notes = catalog_notes(tmp_path / "run")
    assert len(notes) == noted
    assert all("the annotations of the slides a, b have the same content" in n for n in notes)


def test_an_empty_file_is_named_as_such(tmp_path):
    (tmp_path / "a.svs").touch()
    with pytest.raises(SlideError, match="the file is empty"):
        inspect(tmp_path / "a.svs")
