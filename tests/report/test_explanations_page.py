"""What is written of explanations beside their pictures, and read for the evaluation's report."""

import pandas as pd
import pytest

from wsi_pipeline.report.explanations_page import MethodChecks, read_summary, write_explanations

RANKING = pd.DataFrame(
    [("lime", 2, 0.5, 0.5, 0.9, 1.0, 0.5, 2.5), ("cam", 1, 0.5, float("nan"), 0.4, 0.0, 0.5, 0.1)],
    columns=["method", "patches", "exact_match", "recall", "auroc", "pointing_game",
             "energy_inside", "seconds"],
)  # fmt: skip
TRUST = pd.DataFrame(
    [("saliency", 1, 0.2, 0.8, 0.1, ""), ("lime", 1, 0.2, 0.8, 0.7, "the same")],
    columns=["method", "patches", "deletion_area", "insertion_area", "similarity", "warning"],
)  # fmt: skip
LAYERS = pd.DataFrame(columns=["method", "depth", "layer", "similarity"])


def write(folder, ranking=RANKING, trust=TRUST):
    names = {"lime": "LIME", "cam": "CAM", "saliency": "Saliency"}
    return write_explanations(
        folder, title="Why", model="net@1", report=None, run={}, places=[], table=pd.DataFrame(),
        words={method: {"name": name, "legend": ""} for method, name in names.items()},
        checks=MethodChecks(ranking, 3, trust, LAYERS), failures=pd.DataFrame(),
    )  # fmt: skip


def test_the_summary_joins_ranking_and_verdicts_in_the_order_of_the_ranking(tmp_path):
    write(tmp_path)
    found = read_summary(tmp_path, "net@1")
    assert (found["places"], found["ranked_on"], found["tried_on"]) == (0, 2, 1)
    lime, cam, saliency = found["methods"]
    assert (lime["name"], lime["auroc"], lime["similarity"], lime["warning"]) == (
        "LIME", 0.9, 0.7, "the same",
    )  # fmt: skip
    assert (cam["name"], cam["recall"], cam["warning"]) == ("CAM", None, None)
    assert (saliency["auroc"], saliency["similarity"], saliency["warning"]) == (None, 0.1, "")


def test_without_checks_there_are_no_methods(tmp_path):
    write(tmp_path, RANKING[:0], TRUST[:0])
    found = read_summary(tmp_path, "net@1")
    assert (found["ranked_on"], found["tried_on"], found["methods"]) == (0, 0, [])


def test_there_is_no_summary_of_another_model_or_of_a_page_that_is_gone(tmp_path):
    page = write(tmp_path)
    assert read_summary(tmp_path, "net@2") is None
    page.unlink()
    assert read_summary(tmp_path, "net@1") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"model": "net@1", "more": 1}'])
def test_a_damaged_summary_is_named_and_done_without(tmp_path, caplog, text):
    write(tmp_path)
    (tmp_path / "summary.json").write_text(text)
    assert read_summary(tmp_path, "net@1") is None
    assert "summary.json: no readable summary of explanations" in caplog.text
