import numpy as np
import pandas as pd
import pytest

from wsi_pipeline.report.tables import SlidePanel, cohort_counts, score_gap, slide_table

LESIONS = pd.DataFrame(
    {"slide_id": ["a", "a", "a", "b"], "status": ["missed", "found", "ITC", "found"]}
)
PANELS = (
    SlidePanel("v", "p4", "validation", 1, 0.1, False),
    SlidePanel("d", "p3", "test", 0, 0.2, False),
    SlidePanel("b", "p1", "test", 1, 0.9, True),
    SlidePanel("u", "p3", "test", -1, 0.9, True),
    SlidePanel("c", "p2", "test", 0, 0.8, True, notes=("one", "two")),
    SlidePanel("a", "p1", "test", 1, -np.inf, False),
    SlidePanel("e", "p2", "test", 1, np.nan, None),
)


def test_cohort_counts_slides_patients_and_lesions_of_the_test_split():
    assert cohort_counts(PANELS, LESIONS) == {
        "slides": 6, "tumour_slides": 3, "normal_slides": 2, "patients": 3, "lesions": 4,
        "lesions_found": 2, "lesions_missed": 1, "lesions_itc": 1, "validation_slides": 1,
    }  # fmt: skip


def test_slides_come_mistakes_first_and_the_validation_split_last():
    table = slide_table(PANELS, LESIONS)
    assert table[["slide_id", "verdict"]].to_numpy().tolist() == [
        ["a", "missed"],
        ["c", "false alarm"],
        ["e", "not evaluated"],
        ["u", "not evaluated"],
        ["b", "found"],
        ["d", "correctly negative"],
        ["v", "missed"],
    ]
    assert table["notes"].tolist() == ["", "one; two", "", "", "", "", ""]


def test_lesions_are_counted_where_they_are_known():
    table = slide_table(PANELS, LESIONS).set_index("slide_id")
    counts = table[["lesions_found", "lesions_missed", "lesions_itc"]]
    assert counts.loc["a"].tolist() == [1, 1, 1]
    assert counts.loc["b"].tolist() == [1, 0, 0]
    assert counts.loc["d"].tolist() == [0, 0, 0]
    assert counts.loc[["u", "v"]].isna().all(axis=None)  # unknown label; validation


def froc(score, sensitivities, undefined=None):
    points = dict(zip(("0.25", "1"), sensitivities, strict=True))
    return {"score": score, "sensitivity_at": points, "undefined": undefined}


def test_gap_is_between_the_outermost_definitions():
    gap = score_gap(
        {
            "lecture": froc(0.5, (0.5, 0.5)),
            "official": froc(0.25, (0.125, 0.375)),
            "corrected": froc(0.75, (0.625, 0.875)),
        }
    )
    # Scores 0.75 - 0.25. Sensitivities 0.625 - 0.125 at 0.25, 0.875 - 0.375 at 1: as far, the
    # first is named.
    assert gap == {
        "score": 0.5, "highest": "corrected", "lowest": "official",
        "sensitivity": 0.5, "average_fps": "0.25", "above": "corrected", "below": "official",
    }  # fmt: skip


def test_gap_passes_over_undefined_definitions():
    lecture = froc(None, (None, None), "there is no slide without tumour")
    others = {"official": froc(0.5, (0.25, 0.75)), "corrected": froc(0.5, (0.5, 0.5))}
    gap = score_gap({"lecture": lecture, **others})
    assert gap["score"] == 0 and gap["sensitivity"] == pytest.approx(0.25)
    assert score_gap({"lecture": lecture, "official": others["official"]}) is None
