"""A model in words."""

import subprocess
import sys
from dataclasses import replace

import pytest
from own_networks import Colours

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.card import ModelCard, NetworkOutput, Thresholds, read_card, write_card
from wsi_pipeline.models.checkpoint import save_model
from wsi_pipeline.models.describe import describe_model


@pytest.fixture
def folder(tmp_path):
    card = ModelCard(
        architecture="own_networks:classes", arguments={"count": 2}, name="mine",
        output=NetworkOutput(tumour_class=1), mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2),
        patch_px=256, mpp=0.5, gamma=2.2,
        tiling={"stride_px": 128, "tissue": {"min_chroma": 0.045}},
        thresholds=Thresholds(slide=0.75),
        training={
            "best": {"epoch": 3, "validation_roc_auc": 0.91234, "train_loss": 0.5},
            "slides": {"train": [f"s{n}" for n in range(7)], "validation": ["v"]},
            "patients": {"train": ["p"], "hard_negatives": []},
        },
        evaluation={
            "run": "demo", "slides": 4,
            "slide_accuracy": {"value": 0.75, "low": 0.25, "high": 1.0},
            "patch_roc_auc": {"value": None, "low": None, "high": None},
        },
    )  # fmt: skip
    save_model(tmp_path / "folder", Colours(2), card)
    return tmp_path / "folder"


def rows(folder):
    return {title: dict(rows) for title, rows in describe_model(folder)}


def test_what_the_card_says_is_told(folder):
    found = rows(folder)
    assert found["Model"]["name"] == "mine"
    assert "runs code of this Python environment" in found["Model"]["network"]
    assert found["Model"]["argument count"] == "2"
    # 4 * 3 * 3 * 3 + 4 of the convolution, 4 * 4 + 1 of batch normalisation, 2 * 4 + 2 of the head.
    assert found["Model"]["weights"].endswith("139 numbers")
    assert found["Input"]["patches"] == "256 x 256 px (128 x 128 um)"
    assert found["Input"]["resolution"] == "0.5 um per px"
    assert found["Input"]["mean of red, green, blue"] == "0.4, 0.5, 0.6"
    assert found["Input"]["colours"] == "gamma correction 2.2"
    assert found["Input"]["tiling tissue"] == "min_chroma 0.045"
    assert found["Output"] == {
        "network returns": "logit, classes; tumour is column 1",
        "slide threshold": "probability >= 0.75",
        "patch threshold": "none: no evaluation has chosen one",
    }
    assert found["Training"]["best epoch"] == "3"
    assert found["Training"]["validation roc auc"] == "0.9123"
    assert found["Training"]["slides, train"] == "7: s0, s1, s2, s3, s4 and 2 more"
    assert found["Training"]["patients, train"] == "1: p"
    assert "patients, hard negatives" not in found["Training"]
    assert found["Evaluation"]["slide accuracy"] == "0.750 (95 % interval 0.250 to 1.000)"
    assert found["Evaluation"]["patch ROC AUC"] == "undefined"
    assert "torch" in found["Made with"]


def test_a_model_from_elsewhere_is_called_after_its_folder_and_says_what_is_not_known(folder):
    write_card(folder, replace(read_card(folder), name="", training={}, evaluation={}))
    found = rows(folder)
    assert found["Model"]["name"] == "folder"
    assert "not known" in found["Training"]["slides"]
    assert "Evaluation" not in found


def test_missing_and_damaged_weights_are_named(folder):
    (folder / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(ModelError, match="is damaged"):
        describe_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        describe_model(folder)


def test_it_needs_no_torch(folder):
    program = (
        "import sys; from wsi_pipeline.models.describe import describe_model;"
        " describe_model(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, folder], check=True)
