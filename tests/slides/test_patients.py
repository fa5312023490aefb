"""Patients: the table of docs/slides.md."""

import pandas as pd
import pytest

from wsi_pipeline.errors import CatalogError
from wsi_pipeline.slides.catalog import read_catalog
from wsi_pipeline.slides.patients import (
    check_patient_rule,
    known_patient,
    patient_notes,
    same_patient_key,
    with_patients,
)


def filled(*rows, rule="auto"):
    """Slides given as (slide_id, patient_id)."""
    slides = pd.DataFrame(rows, columns=["slide_id", "patient_id"])
    return with_patients(slides, rule, "slides.csv", [f"line {n + 2}" for n in range(len(rows))])


def patients(*rows, rule="auto"):
    return filled(*rows, rule=rule)["patient_id"].tolist()


@pytest.mark.parametrize(
    ("slide_id", "found"),
    [
        ("TCGA-AA-0001-01Z-00-DX1", ("tcga", "TCGA-AA-0001")),
        ("TCGA-A2-A0YE-01Z-00-DX1.8A2E3094-5755-42BC-969D", ("tcga", "TCGA-A2-A0YE")),
        ("TCGA-A2-A0YE-01Z-00-DX1_left-59206", ("tcga", "TCGA-A2-A0YE")),
        ("TCGA.A2.A0YE.01Z.00.DX1", ("tcga", "TCGA-A2-A0YE")),
        ("tcga-a2-a0ye-01z-00-dx1", ("tcga", "TCGA-A2-A0YE")),
        ("TCGA-AA-00012", None),
        ("my-TCGA-AA-0001", None),
        ("C3L-00001-21", ("cptac", "C3L-00001")),
        ("C3N-01234-22", ("cptac", "C3N-01234")),
        ("GTEX-1117F-0126", ("gtex", "GTEX-1117F")),
        ("patient_010_node_4", ("camelyon17", "patient_010")),
        ("patient_010", None),
        ("tumor_001", None),
    ],
)
def test_names_of_public_cohorts_state_the_patient(slide_id, found):
    assert known_patient(slide_id) == found


def test_a_stated_patient_wins_and_others_come_from_the_name_or_are_the_slide():
    rows = ("patient_001_node_1", "P7"), ("GTEX-1117F-0126", None), ("s3", None)
    found = filled(*rows)
    assert found["patient_id"].tolist() == ["P7", "GTEX-1117F", "s3"]
    assert found["patient_source"].tolist() == ["table", "gtex", "slide"]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (None, ["TCGA-AA-0001-01Z", "TCGA-AA-0001-02Z"]),
        ("auto", ["TCGA-AA-0001", "TCGA-AA-0001"]),
        ("tcga", ["TCGA-AA-0001", "TCGA-AA-0001"]),
        (r"-(\d{4})-", ["0001", "0001"]),
        (r"^(TCGA)-(?P<patient>..)", ["AA", "AA"]),
    ],
)
def test_the_rule_takes_the_patient_from_the_slide_id(rule, expected):
    assert patients(("TCGA-AA-0001-01Z", None), ("TCGA-AA-0001-02Z", None), rule=rule) == expected


@pytest.mark.parametrize("rule", ["tcga", "camelyon17", r"^(P\d+)_", "()"])
def test_an_id_that_does_not_match_the_rule_is_named(rule):
    with pytest.raises(CatalogError, match=r"slides\.csv, line 2: no patient .* slide id 's1'"):
        filled(("s1", None), rule=rule)


@pytest.mark.parametrize("rule", ["tgca", "(", "P1", r"(a)(b)", ""])
def test_a_rule_that_is_none_is_refused(rule):
    with pytest.raises(ValueError, match="regular expression"):
        check_patient_rule(rule)


@pytest.mark.parametrize("rule", [None, "auto", "tcga", "(a)", "(a)(?P<patient>b)"])
def test_a_rule_is_a_name_or_an_expression_with_one_group(rule):
    assert check_patient_rule(rule) == rule


ALIKE = [
    ("P1", "p1"),
    ("1", "01"),
    ("1", "1.0"),
    ("P1", "P01"),
    ("P 1", "P_1"),
    ("P-1", "P\u20131"),
    ("P  1", "P 1"),
    ("P1", "P1\u200b"),
    ("M\u00fcller", "Mu\u0308ller"),
    ("TCGA-AA-0001", "TCGA.AA.0001"),
    ("TCGA-AA-0001-01A", "TCGA-AA-0001-02A"),
    ("C3L-00001", "C3L-00001-21"),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_ids_that_differ_only_in_spelling_are_refused_with_both_lines(one, other):
    with pytest.raises(CatalogError, match=r"slide a, line 2.*slide c, line 4.*Write one patient"):
        filled(("a", one), ("b", "Q"), ("c", other))


@pytest.mark.parametrize(
    ("one", "other"), [("P1", "P10"), ("1", "11"), ("0", "1"), ("A1", "B1"), ("1.5", "15")]
)
def test_other_ids_are_other_patients(one, other):
    assert same_patient_key(one) != same_patient_key(other)
    assert patients(("a", one), ("b", other)) == [one, other]


def test_slides_that_are_their_own_patients_are_not_compared_by_spelling():
    assert patients(("s1", None), ("s01", None)) == ["s1", "s01"]
    with pytest.raises(CatalogError, match="differ only in spelling"):
        filled(("s1", None), ("x", "S1"))


def test_a_table_may_not_give_one_named_patient_several_ids_unless_names_do_not_count(tmp_path):
    def patients(*rows, rule="auto"):
        lines = [f"{slide_id},{slide_id}.svs,{patient or ''}\n" for slide_id, patient in rows]
        (tmp_path / "slides.csv").write_text("slide_id,path,patient_id\n" + "".join(lines))
        return read_catalog(tmp_path / "slides.csv", rule)["patient_id"].tolist()

    rows = ("patient_001_node_1", "a"), ("patient_001_node_2", "b")
    with pytest.raises(CatalogError, match=r"of one patient, patient_001, but .* set catalog"):
        patients(*rows)
    assert patients(*rows, rule=None) == ["a", "b"]
    with pytest.raises(CatalogError, match="of one patient, TCGA-AA-0001"):
        patients(("TCGA-AA-0001-01Z", "case 7"), ("TCGA-AA-0001-02Z", None))
    assert patients(("patient_001_node_1", "a"), ("patient_001_node_2", "a")) == ["a", "a"]


def test_notes_say_where_patients_come_from():
    assert patient_notes(filled(("a", "P1"), ("b", "P2"))) == []
    assert patient_notes(filled(("a", None))) == []  # one slide is one patient
    assert patient_notes(filled(("a", None), ("b", None))) == [
        "each of the 2 slides was taken as its own patient: no patient_id is stated, and none is"
        " known from the name. If a patient has several slides, fill in patient_id or set"
        " catalog.patient_from, since splits and intervals are over patients"
    ]
    mixed = filled(("a", "P1"), ("b", None), ("C3L-00001-21", None), ("C3L-00001-22", None))
    own, named = patient_notes(mixed)
    assert own.startswith("each of 1 of the 4 slides (first: b) was taken as its own patient")
    assert named == (
        "patients were taken from slide ids by cptac names: slides 2, patients 1 (first: slide"
        " C3L-00001-21 of patient C3L-00001)"
    )
