import json

import numpy as np
import pandas as pd
import pytest

from wsi_pipeline.errors import CatalogError
from wsi_pipeline.evaluation.score_table import slide_score_metrics
from wsi_pipeline.report.slide_scores import write_slide_scores

QUICK = {"replicates": 200}


def a_table(**columns):
    table = {
        "name": ["a", "b", "c", "d", "e", "f"],
        "truth": ["Tumor", "tumour", "POSITIVE", "normal", "Negative ", "0"],
        "model": [0.9, 0.6, 0.2, 0.3, 0.1, 0.5],
    }
    return pd.DataFrame({**table, **columns})


def metrics_of(table, **options):
    return slide_score_metrics(table, "name", "truth", ["model"], **QUICK, **options)


def test_hand_worked_table_with_labels_in_words():
    metrics = metrics_of(a_table())
    counts = ("slides", "tumour_slides", "normal_slides", "patients")
    assert [metrics[name] for name in counts] == [6, 3, 3, 6]
    model = metrics["scores"]["model"]
    # At 0.5: 0.9 and 0.6 found, 0.2 missed; 0.5 false, 0.3 and 0.1 right: 4 of 6.
    assert (model["accuracy"], model["sensitivity"], model["specificity"]) == (
        4 / 6, 2 / 3, 2 / 3,
    )  # fmt: skip
    assert model["roc_auc"] == pytest.approx((3 + 3 + 1) / 9)
    assert (model["threshold"], model["threshold_from"]) == (0.5, "fallback")
    assert "no split column" in model["threshold_reason"]
    ends = model["intervals"]["accuracy"]
    assert 0 <= ends["low"] < 4 / 6 < ends["high"] <= 1


def a_split_table(test_scores=(0.35, 0.1)):
    return a_table(
        split=["Validation", "test", "train", "val", "test", "train"],
        model=[0.4, test_scores[0], 0.99, 0.2, test_scores[1], 0.99],
    )


def test_the_threshold_is_chosen_on_validation_rows_and_figures_are_of_test_rows():
    metrics = metrics_of(a_split_table(), split="split")
    model = metrics["scores"]["model"]
    # Validation: tumour 0.4, normal 0.2; the middle is 0.3. Test: 0.35 and 0.1, both right.
    assert model["threshold"] == pytest.approx(0.3)
    assert (model["threshold_from"], model["accuracy"], model["n"]) == ("validation", 1, 2)
    assert (metrics["slides"], metrics["validation_slides"], metrics["train_slides"]) == (2, 2, 2)


def test_test_scores_never_move_the_threshold():
    thresholds = {
        metrics_of(a_split_table(scores), split="split")["scores"]["model"]["threshold"]
        for scores in ((0.35, 0.1), (0.0, 1.0), (None, 0.3))
    }
    assert len(thresholds) == 1


def test_validation_rows_of_one_label_leave_the_given_threshold_and_say_so():
    table = a_table(split=["validation", "validation", *["test"] * 4])
    model = metrics_of(table, split="split", threshold=0.25)["scores"]["model"]
    assert (model["threshold"], model["threshold_from"]) == (0.25, "fallback")
    assert "2 scored slides with tumour and 0 without" in model["threshold_reason"]


def test_a_missing_score_is_left_out_and_counted():
    table = a_table(model=["0.9", "NaN", None, " 0.3", "", "n/a"])
    model = metrics_of(table)["scores"]["model"]
    assert (model["n"], model["unscored"], model["accuracy"]) == (2, 4, 1)


def test_slides_of_a_patient_are_resampled_together():
    apart = metrics_of(a_table())
    pairs = metrics_of(a_table(case=["p", "p", "q", "q", None, ""]), patient="case")
    assert (apart["patients"], pairs["patients"]) == (6, 4)
    ends = [found["scores"]["model"]["intervals"]["accuracy"] for found in (apart, pairs)]
    assert ends[0] != ends[1]


def test_slides_named_by_tcga_are_resampled_by_patient():
    names = [f"TCGA-AA-000{n // 2}-01Z-00-DX{n % 2 + 1}" for n in range(6)]
    assert metrics_of(a_table(name=names))["patients"] == 3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"truth": ["1", "0", "maybe", "0", "1", "0"]}, "row 3: truth is 'maybe': it must be one"),
        ({"truth": [1, 0, 2, 0, 1, 0]}, "row 3: truth is '2'"),
        ({"truth": ["1", "0", "", "0", "1", "0"]}, "row 3: truth is None"),
        ({"model": [0, 1, 0.5, 1.5, 0, 0]}, r"row 4: model is '1.5': .* in \[0, 1\]"),
        ({"model": [0, 1, 0.5, -0.1, 0, 0]}, "row 4: model is '-0.1'"),
        ({"model": [0, 1, 0.5, "high", 0, 0]}, "row 4: model is 'high'"),
        ({"model": [0, 1, 0.5, np.inf, 0, 0]}, "row 4: model is 'inf'"),
        ({"name": list("abcdea")}, "row 6: name is 'a': each slide is one row"),
        ({"name": list("abcdeA")}, "row 6: name is 'A': each slide is one row"),
        ({"name": ["a", "b", None, "d", "e", "f"]}, "row 3: name is None"),
        ({"split": ["test"] * 5 + ["hidden"]}, "row 6: split is 'hidden'"),
        ({"split": ["train"] * 6}, "no test row"),
        (
            {"split": ["train", "test"] * 3, "case": ["p", "q", "r", "s", "t", "p"]},
            "row 1: case is 'p': it is in two splits",
        ),
    ],
)
def test_what_a_table_cannot_hold_is_refused_with_row_and_value(columns, message):
    split, patient = (
        ("split" in columns or None) and "split",
        ("case" in columns or None) and "case",
    )
    with pytest.raises(CatalogError, match=message):
        metrics_of(a_table(**columns), split=split, patient=patient, source="scores.csv")


def test_a_column_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(CatalogError, match=r"'modle', one is needed; .*'model'"):
        slide_score_metrics(a_table(), "name", "truth", ["modle"])


def test_the_file_gives_metrics_a_table_and_a_figure(tmp_path):
    path = tmp_path / "scores.csv"
    a_table(other=[1, 1, 1, 0, 0, 0]).to_csv(path, index=False)
    columns = {"slide": "name", "label": "truth", "scores": ["model", "other"]}
    out = tmp_path / "new" / "out"
    found = write_slide_scores(path, out, **columns, **QUICK)
    assert found == out / "slide_scores.json"
    names = {"slide_scores.json", "slide_scores.csv", "slide_scores.svg"}
    assert {file.name for file in out.iterdir()} == names
    metrics = json.loads(found.read_text(), parse_constant=pytest.fail)
    assert metrics["scores"]["model"] == metrics_of(a_table())["scores"]["model"]
    table = pd.read_csv(out / "slide_scores.csv").set_index("score")
    assert table["roc_auc"].tolist() == [pytest.approx(7 / 9), 1]
    assert np.isnan(table["roc_auc_low"]["other"]) and table["accuracy_low"]["model"] < 4 / 6
    svg = (out / "slide_scores.svg").read_bytes()
    assert b"<svg" in svg[:1000]

    before = {name: (out / name).read_bytes() for name in names}
    write_slide_scores(path, out, **columns, **QUICK)
    assert before == {name: (out / name).read_bytes() for name in names}


def test_without_both_labels_there_is_no_figure_and_the_old_one_is_gone(tmp_path):
    path = tmp_path / "scores.csv"
    columns = {"slide": "name", "label": "truth", "scores": ["model"]}
    for labels, drawn in ((["1", "0"] * 3, True), (["0"] * 6, False)):
        a_table(truth=labels).to_csv(path, index=False)
        write_slide_scores(path, tmp_path, **columns, **QUICK)
        assert (tmp_path / "slide_scores.svg").exists() == drawn
    metrics = json.loads((tmp_path / "slide_scores.json").read_text())
    assert "no positive" in metrics["scores"]["model"]["undefined"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,truth,model\na,1,0.5,0.6\n", "row 1: it has 4 cells and the header 3"),
        ("", "0 columns are named 'name'"),
        ("name,truth,model,model\na,1,0.5,0.6\n", "2 columns are named 'model'"),
        ("name,truth,model\n", "no test row"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused_by_its_name(tmp_path, text, message):
    path = tmp_path / "scores.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CatalogError, match=rf"scores\.csv.*{message}"):
        write_slide_scores(path, tmp_path, slide="name", label="truth", scores=["model"])


@pytest.mark.parametrize(
    ("column", "roc_auc", "accuracy"),
    [
        ("Method_II_noise_norm", 0.9830, 0.9610),
        ("Method_I", 0.9518, 0.8831),
        ("pred_I", 0.9103, 0.8442),
    ],
)
@pytest.mark.parametrize("label", ["is_tumor", "truth"])
def test_a_published_table_of_camelyon16_scores_gives_its_figures(
    test_data, column, roc_auc, accuracy, label
):
    path = test_data / "didsr" / "reference_all_final_results_0515.subset.csv"
    table = pd.read_csv(path)
    metrics = slide_score_metrics(table, "slide_name", label, [column], **QUICK)
    found = metrics["scores"][column]
    assert (round(found["roc_auc"], 4), round(found["accuracy"], 4)) == (roc_auc, accuracy)
    assert not (table[column] == 0.5).any()  # so ">= 0.5" and "> 0.5" are one rule here
