"""Who has seen which patient, whatever each run calls them."""

import json

import pandas as pd
import pytest

from wsi_pipeline.errors import RunError
from wsi_pipeline.stages.leakage import of_patients, patients_of_weights, refuse_leakage

SPELLINGS = [
    ("P1", "p1"),
    ("1", "01"),
    ("7.0", "7"),
    ("TCGA-AA-0001-01Z-00-DX1", "TCGA-AA-0001"),  # once its own patient, now taken from the name
]


def card(*patients, slides=()):
    return {"training": {"patients": {"train": list(patients)}, "slides": {"train": list(slides)}}}


@pytest.fixture
def weights(tmp_path):
    """A function that writes the card of weights and gives their path."""

    def write(*patients, slides=()):
        (tmp_path / "model.json").write_text(json.dumps(card(*patients, slides=slides)))
        return str(tmp_path / "model.safetensors")

    return write


@pytest.mark.parametrize(("then", "today"), SPELLINGS)
def test_a_patient_in_another_spelling_is_the_patient(weights, then, today):
    slides = pd.DataFrame({"patient_id": [today, "Q"]})
    assert of_patients(slides, {then}).tolist() == [True, False]
    with pytest.raises(RunError, match=rf"patients \['{today}'\]"):
        refuse_leakage(card(then), test={today, "Q"})
    with pytest.raises(RunError, match=rf"patients \['{today}'\]"):
        patients_of_weights(weights(then), test={today, "Q"})


def test_other_patients_may_be_tested(weights):
    refuse_leakage(card("P1"), test={"P2"})
    found = patients_of_weights(weights("P1", slides=["a"]), test={"P2"}, test_slides={"b"})
    assert found == {"earlier": ["P1"], "earlier_validation": []}


def test_a_slide_whose_patient_is_known_only_now_is_still_the_slide(weights):
    with pytest.raises(RunError, match=r"slides of the test split, .*\['tumor_001'\]"):
        patients_of_weights(
            weights("tumor_001", slides=["tumor_001"]), test={"P1"}, test_slides={"tumor_001"}
        )
