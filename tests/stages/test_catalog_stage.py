import numpy as np
import pandas as pd
import pytest
from slide_files import write_pyramid_tiff

from wsi_pipeline.config import AnnotationConfig, Config
from wsi_pipeline.errors import AnnotationError, CatalogError, SlideError
from wsi_pipeline.jobs.unit import LargeFile, SmallFile
from wsi_pipeline.slides.annotations import write_asap_xml
from wsi_pipeline.stages.catalog import InspectSlide, _listed_slides

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
    frame, notes = _listed_slides(config)
    assert notes == ["no slide is in the validation split: its patients are drawn from train"]
    assert set(frame.loc[frame["slide_id"].isin([f"s{i}" for i in range(40, 50)]), "split"]) == {
        "test"
    }
    patients = frame.groupby("patient_id")["split"].agg(["nunique", "first"])
    assert patients["nunique"].max() == 1
    assert (patients["first"] == "validation").sum() == 5  # 20 patients of train, a quarter
