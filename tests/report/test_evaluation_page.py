import json
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.froc import FrocHits, froc_curve, froc_metrics, lecture_hits
from wsi_pipeline.evaluation.patch_level import patch_metrics
from wsi_pipeline.evaluation.slide_level import accuracy_curve, slide_metrics, slide_scores
from wsi_pipeline.report.evaluation_page import SlidePanel, show_explanations, write_report

SLIDES = ("t1", "t2", "t3")
PATCHES = pd.DataFrame(
    {
        "slide_id": ["t1", "t1", "t1", "t2", "t2", "t3", "t3"],
        "label": [1, 0, 1, 1, 0, 0, 0],
        "score": np.array([0.9, 0.2, np.nan, 0.4, 0.3, 0.8, 0.1], np.float32),
    }
)
VALIDATION = pd.DataFrame({"slide_id": ["v1", "v2"], "label": [1, 0], "score": [0.8, 0.2]})
FAILURES = pd.DataFrame(
    {"stage": ["tile", "tile"], "slide_id": ["t9", None], "reason": ["<b>torn</b> file", np.nan]}
)
LESIONS = pd.DataFrame(
    [
        # The 27 false positives over 0.1 are 9 for each of 3 slides.
        ("t2", 1, 1, 0.25, 600.0, False, 0.1, 9.0, "missed", 0.4, 1),
        ("t1", 2, 2, 0.0125, 140.0, False, -np.inf, np.nan, "missed", -np.inf, 0),
        ("t1", 1, 1, 3.5, 2500.0, False, 0.9, 0.0, "found", 0.9, 2),
        ("t1", 3, 3, 0.002, 60.0, True, -np.inf, np.nan, "ITC", 0.2, 1),
    ],
    columns=["slide_id", "lesion_id", "region", "area_mm2", "longest_diameter_um", "itc",
             "confidence", "average_fps", "status", "patch_score", "n_patches"],
).assign(x0=0.0, y0=0.0, x1=9.0, y1=9.0)  # fmt: skip
FALSE_POSITIVES = pd.DataFrame(
    {
        "slide_id": ["t3"] + ["t1"] * 26,
        "probability": np.linspace(0.85, 0.2, 27),
        "x": 12345.0 + np.arange(27),
        "y": 678.0,
    }
)
MODES = ("lecture", "official", "corrected")
FILES = {
    "report.html", "metrics.json", "patches_by_slide.csv", "slides.csv", "slide_accuracy.csv",
    "calibration.csv", "patch_scores.csv", "lesions.csv", "false_positives.csv",
    *(f"froc_{mode}.csv" for mode in MODES), *(f"froc_{mode}_band.csv" for mode in MODES),
}  # fmt: skip
WHY_NOT = "it hangs on one patient: without them there is no such figure"
RATES = ("roc_auc", "accuracy", "sensitivity", "specificity")


def a_jpeg(width=8):
    picture = BytesIO()
    Image.new("RGB", (width, 4), "red").save(picture, format="jpeg")
    return picture.getvalue()


def interval(low=0.125, high=0.875, undefined=None):
    if undefined:
        low = high = None
    return {"low": low, "high": high, "replicates": 9, "undefined": undefined}


def detection_hits(mode, lesions, false_positives):
    """Those of the table of lesions; official does not know the best one."""
    counted = lesions[~lesions["itc"].astype(bool)]
    best = counted["confidence"].to_numpy(np.float64)
    slide = counted["slide_id"].map(SLIDES.index).to_numpy(int)
    return FrocHits(
        mode=mode,
        slide_ids=SLIDES,
        lesions=np.bincount(slide, minlength=3),
        averaged=np.ones(3, bool),
        lesion_slide=slide,
        lesion_score=np.where(best < 0.9, np.maximum(best, 0), 0) if mode == "official" else best,
        fp_slide=false_positives["slide_id"].map(SLIDES.index).to_numpy(int),
        fp_score=false_positives["probability"].to_numpy(),
    )


def froc_figures(patches, lesions, false_positives, labels, why_no_interval):
    by_patch = lesions[["slide_id"]].assign(score=lesions["patch_score"].astype(float))
    curves = {
        "lecture": froc_curve(lecture_hits(patches, by_patch, pd.Series(labels, SLIDES))),
        "official": froc_curve(detection_hits("official", lesions, false_positives)),
        "corrected": froc_curve(detection_hits("corrected", lesions, false_positives)),
    }
    metrics = {}
    for mode, curve in curves.items():
        metrics[mode] = froc_metrics(curve, slides=3)
        ends = dict.fromkeys(metrics[mode]["sensitivity_at"], interval(undefined=why_no_interval))
        metrics[mode]["intervals"] = {
            "score": interval(undefined=why_no_interval), "sensitivity_at": ends,
        }  # fmt: skip
    return curves, metrics


IN_FLOAT32 = {"training": "float32", "heatmaps": "float32", "difference": None}


def report_arguments(
    patches=PATCHES, labels=(1, 1, 0), validation=VALIDATION, lesions=LESIONS,
    false_positives=FALSE_POSITIVES, pictures=True, why_no_interval=None,
):  # fmt: skip
    scores = slide_scores(SLIDES, patches).to_numpy()
    test = pd.DataFrame({"slide_id": SLIDES, "label": labels, "score": scores})
    slide = slide_metrics(validation, test)
    patch = patch_metrics(patches["label"], patches["score"])
    slide["intervals"] = dict.fromkeys(RATES, interval(undefined=why_no_interval))
    patch["intervals"] = dict.fromkeys(RATES, interval(0.25, 0.75, undefined=why_no_interval))
    curves, froc = froc_figures(patches, lesions, false_positives, labels, why_no_interval)
    panels = [
        SlidePanel(
            row.slide_id,
            f"patient_{row.slide_id[0]}",
            "test" if row.slide_id[0] == "t" else "validation",
            row.label,
            row.score,
            None if np.isnan(row.score) else row.score >= slide["threshold"],
            a_jpeg() if row.slide_id == "t1" else None,
            ("1 patch unreadable",) if row.slide_id == "t1" else (),
        )
        for row in pd.concat([validation, test]).itertuples()
    ]
    band = pd.DataFrame({"average_fps": [0.0, 8], "sensitivity": 0.5, "low": 0.25, "high": np.nan})
    shown = lesions[lesions["status"] != "ITC"] if pictures else lesions[:0]
    return {
        "title": "Model <vgg16> & friends",
        "model": "vgg16@abc",
        "explanations": "../why/index.html",
        "run": {"seed": 7, "settings": {"tile": {"patch_px": 512}}},
        "metrics": {"patch": patch, "slide": slide, "froc": froc, "precision": IN_FLOAT32},
        "patches": patches,
        "slide_curves": {
            "validation": accuracy_curve(validation["label"], validation["score"]),
            "test": accuracy_curve(test["label"], test["score"]),
        },
        "curves": curves,
        "bands": dict.fromkeys(MODES, band),
        "lesions": lesions,
        "false_positives": false_positives,
        "lesion_pictures": {(row.slide_id, row.lesion_id): a_jpeg() for row in shown.itertuples()},
        "false_positive_pictures": {1: a_jpeg(), 0: a_jpeg()} if pictures else {},
        "slides": panels,
        "failures": FAILURES,
    }


VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags with their attributes and what they are in, and the text outside of styles."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.inside, self.open, self.words = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside.append(list(self.open))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if not (self.open and self.open[-1][0] == "style"):
            self.words += data.split()

    def images(self):
        return [attributes["src"] for tag, attributes in self.tags if tag == "img"]

    def links(self):
        return [attributes["href"] for tag, attributes in self.tags if tag == "a"]

    def folded(self, kind):
        """Whether each element of a class is in a <details>."""
        return [
            any(tag == "details" for tag, _ in inside)
            for (_, attributes), inside in zip(self.tags, self.inside, strict=True)
            if attributes.get("class") == kind
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "evaluation" / "vgg16"
    assert write_report(folder, **report_arguments()) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page(folder / "report.html")


def test_folder_holds_the_page_the_figures_and_no_temporary_file(folder):
    assert {path.name for path in folder.iterdir()} == FILES


def test_metrics_json_has_the_figures_under_their_names(folder):
    metrics = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    # t1 0.9 and t3 0.8 are called right and wrong, t2 0.4 wrong at t = 0.5: 1 of 3.
    assert metrics["slide"]["threshold"] == pytest.approx(0.5)
    assert metrics["slide"]["accuracy"] == pytest.approx(1 / 3)
    # At 0.75: 0.9 found, 0.4 missed, 0.8 false, three right: 4 of 6. AUC: 7 of 8 pairs.
    assert metrics["patch"]["accuracy"] == pytest.approx(4 / 6)
    assert metrics["patch"]["roc_auc"] == pytest.approx(7 / 8)
    # Patches of lesions 0.9, 0.4, 0.2, never; one normal slide with 0.8 and 0.1.
    lecture = metrics["froc"]["lecture"]
    assert lecture["sensitivity_at"]["0.25"] == pytest.approx(1 / 4)
    assert lecture["sensitivity_at"]["1"] == pytest.approx(3 / 4)
    assert lecture["score"] == pytest.approx((2 * 1 / 4 + 4 * 3 / 4) / 6)
    # One of three lesions before all false positives, the others after 9 a slide or never.
    assert metrics["froc"]["corrected"]["score"] == pytest.approx(1 / 3)
    assert metrics["froc"]["corrected"]["intervals"]["score"]["low"] == 0.125
    assert metrics["cohort"] == {
        "slides": 3, "tumour_slides": 2, "normal_slides": 1, "patients": 1, "lesions": 4,
        "lesions_found": 1, "lesions_missed": 2, "lesions_itc": 1, "validation_slides": 2,
    }  # fmt: skip


def test_tables_hold_what_the_page_shows(folder):
    tables = {path.stem: pd.read_csv(path) for path in folder.glob("*.csv")}
    assert tables["lesions"]["patch_score"].tolist() == [0.4, -np.inf, 0.9, 0.2]
    assert len(tables["false_positives"]) == 27
    slides = tables["slides"]
    assert slides["slide_id"].tolist() == ["t2", "t3", "t1", "v1", "v2"]
    assert slides["verdict"].tolist() == [
        "missed", "false alarm", "found", "found", "correctly negative",
    ]  # fmt: skip
    assert slides["lesions_found"][:3].tolist() == [0, 0, 1]
    assert {"split", "slide_id", "patient_id", "label", "score"} <= set(slides)
    accuracy = tables["slide_accuracy"]
    assert accuracy["split"].value_counts().to_dict() == {"test": 4, "validation": 3}
    assert tables["patches_by_slide"]["unscored"].tolist() == [1, 0, 0]
    assert tables["froc_lecture"]["sensitivity"].iloc[-1] == pytest.approx(3 / 4)
    assert tables["froc_corrected_band"]["low"].tolist() == [0.25, 0.25]
    # As float32 0.1 to 0.4 and 0.8 lie just above the edge of their bin, 0.9 just below.
    assert tables["calibration"]["n"].tolist() == [0, 1, 1, 1, 1, 0, 0, 0, 2, 0]
    assert tables["calibration"]["share_positive"][[4, 8]].tolist() == [1, 0.5]


def test_page_needs_no_network_and_no_script(page):
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.links() and all(link.startswith("#") for link in page.links())
    assert "link" not in {tag for tag, _ in page.tags}
    assert all(source.startswith("data:image/") for source in page.images())
    assert "url(" not in page.source and "@import" not in page.source
    assert "default-src 'none'" in page.source


def test_every_link_within_the_page_has_its_target(page):
    targets = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(targets) == len(set(targets))
    assert {link[1:] for link in page.links()} <= set(targets)


def test_pictures_are_inside_and_say_what_they_show(page):
    kinds = [source.split(";")[0] for source in page.images()]
    # FROC; slide accuracy and ROC; patch ROC, precision-recall, histogram, calibration.
    assert kinds.count("data:image/svg+xml") == 7
    # One slide, three lesions, two false positives.
    assert kinds.count("data:image/jpeg") == 6
    for source in page.images():
        data = b64decode(source.split(",")[1])
        assert data.startswith(b"\xff\xd8") or b"<svg" in data[:1000]
    texts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert all(texts) and len(set(texts)) == len(texts)


def test_headings_go_down_one_level_at_a_time(page):
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert max(np.diff(levels)) == 1


def test_every_table_scrolls_in_itself_on_a_narrow_screen(page):
    inside = [
        around for (tag, _), around in zip(page.tags, page.inside, strict=True) if tag == "table"
    ]
    assert len(inside) > 5
    for around in inside:
        assert any("scroll" in attributes.get("class", "").split() for _, attributes in around)


def test_text_is_escaped(page):
    assert "Model <vgg16> & friends" in page.text
    assert "<b>torn</b> file" in page.text
    assert "<vgg16>" not in page.source and "<b>torn" not in page.source


def test_page_says_what_was_evaluated_and_how(page):
    assert "3 slides (2 with tumour, 1 without) of 1 patient, with 4 annotated lesions" in page.text
    assert "1 of 3 slides: 1 with tumour missed, 1 false alarm." in page.text
    assert "t was chosen on the 2 validation slides" in page.text
    assert "2 failures occurred" in page.text
    assert "patch_px: 512" in page.text
    assert "1 patch unreadable" in page.text


def test_summary_says_how_many_lesions_are_found_and_how_sure_the_figures_are(page):
    assert "Lesions found 1 of 3 2 missed." in page.text
    assert "1 more of isolated tumour cells count neither way" in page.text
    assert "FROC score (corrected) 0.333 95 % interval: 0.125 to 0.875" in page.text
    assert "Slides called correctly 33.3 % 95 % interval: 12.5 to 87.5 %" in page.text
    assert "Patch ROC AUC 0.875 95 % interval: 0.250 to 0.750" in page.text


def test_lesions_that_froc_counts_as_one_are_told_beside_how_many_are_found(page, tmp_path):
    told = "For FROC these are 2: lesions close together count as one and are found together."
    assert told not in page.text
    arguments = report_arguments()
    arguments["metrics"]["froc"]["corrected"]["lesions"] = 2  # of three to be found
    text = Page(write_report(tmp_path, **arguments)).text
    assert told in text.split("Slides called correctly")[0]


def test_three_definitions_stand_side_by_side_and_their_distance_is_told(page):
    # At 1 false positive per slide: lecture 3 of 4 lesions, official none, corrected 1 of 3.
    row = "1 75.0 % 12.5 to 87.5 % 0.0 % 12.5 to 87.5 % 33.3 % 12.5 to 87.5 %"
    assert row in page.text
    # Scores (2 * 1/4 + 4 * 3/4) / 6 = 0.583 and 0.
    assert "up to 0.583 apart: lecture is the highest with 0.583, official the lowest" in page.text
    assert "differ most at 1 false positives per slide: 75.0 % by lecture, 0.0 %" in page.text
    counted = "lesions counted here 4 3 3 false positives averaged over 1 slide without tumour"
    assert counted in page.text


def test_each_lesion_tells_its_size_and_its_fate(page):
    text = page.text
    assert (
        "t2 · lesion 1 · missed Its best detection has a confidence of only 0.100. A threshold that"
        " low brings 9.00 false positives per slide, more than 8. 0.25 mm², longest diameter 600 µm"
    ) in text
    assert "t1 · lesion 2 · missed No detection lies in it. 0.013 mm²" in text
    assert "No patch of it was scored." in text
    assert (
        "Found at a confidence of 0.900, at the price of 0.00 false positives per slide. 3.50 mm²,"
        " longest diameter 2.50 mm. Highest probability of its 2 patches: 0.900."
    ) in text
    assert "1 more lesion without a picture: see lesions.csv" in text


def test_lesions_and_slides_link_to_each_other(page):
    for lesion, slide in (("lesion-t1-1", "slide-test-t1"), ("lesion-t2-1", "slide-test-t2")):
        articles = {
            around[-2][1].get("id"): attributes["href"]
            for (tag, attributes), around in zip(page.tags, page.inside, strict=True)
            if tag == "a" and len(around) > 2 and around[-2][0] == "article"
        }
        assert articles[lesion] == f"#{slide}"
        assert articles[slide].startswith("#lesion-t")
    assert {"#lesion-t1-1", "#lesion-t1-2", "#lesion-t2-1"} <= set(page.links())


def test_worst_false_positives_come_first_with_their_places(page):
    text = page.text
    assert "1. t3 · probability 0.850 Centre at x 12,345, y 678 (level-0 px) of slide t3" in text
    # linspace(0.85, 0.2, 27) falls by 0.025.
    assert "2. t1 · probability 0.825 Centre at x 12,346" in text
    assert text.index("1. t3") < text.index("2. t1")
    assert "25 more false positives without a picture: see false_positives.csv" in text


def test_mistakes_come_first_in_the_gallery(page):
    articles = [
        attributes["id"]
        for tag, attributes in page.tags
        if tag == "article" and attributes["class"] == "slide"
    ]
    assert articles[:3] == ["slide-test-t2", "slide-test-t3", "slide-test-t1"]


def test_report_is_the_same_when_written_again(folder):
    before = {name: (folder / name).read_bytes() for name in FILES}
    write_report(folder, **report_arguments())
    assert before == {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize(("status", "open_ones"), [("found", 12), ("missed", 15)])
def test_a_long_gallery_is_folded_but_nothing_missed_is(tmp_path, status, open_ones):
    row = LESIONS[LESIONS["status"] == status].iloc[[0]].assign(confidence=0.5, average_fps=9.0)
    lesions = pd.concat([row] * 15).assign(lesion_id=range(1, 16), slide_id="t1")
    arguments = report_arguments(lesions=lesions, false_positives=FALSE_POSITIVES[:0])
    arguments["false_positive_pictures"] = {}
    page = Page(write_report(tmp_path, **arguments))
    assert page.folded("place") == [False] * open_ones + [True] * (15 - open_ones)
    assert ("3 more lesions" in page.text) == (open_ones == 12)


def test_why_there_is_no_interval_is_said(tmp_path):
    page = Page(write_report(tmp_path, **report_arguments(why_no_interval=WHY_NOT)))
    assert f"FROC score (corrected) 0.333 No 95 % interval: {WHY_NOT}" in page.text
    # Below the tables of FROC, slides and patches.
    assert page.text.count(f"Where there is no interval: {WHY_NOT}.") == 3


def no_lesions():
    return report_arguments(
        PATCHES.assign(label=0), labels=(0, 0, 0), validation=VALIDATION[:1], lesions=LESIONS[:0],
        false_positives=FALSE_POSITIVES[:0], pictures=False,
        why_no_interval="the figure itself is undefined",
    )  # fmt: skip


def test_undefined_figures_are_said_so_and_null(tmp_path):
    page = Page(write_report(tmp_path, **no_lesions() | {"failures": FAILURES[:0]}))
    assert "No FROC curve: there is no lesion (ITC aside) to evaluate" in page.text
    assert "Undefined: no positive among those evaluated" in page.text
    assert "The slide threshold was not chosen from data" in page.text
    assert "No lesion is annotated in the test slides" in page.text
    assert "None: no detection lies off the annotated lesions" in page.text
    assert "None: every slide went through every stage" in page.text
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["froc"]["corrected"]["score"] is None
    assert metrics["patch"]["roc_auc"] is None and metrics["slide"]["sensitivity"] is None


def test_a_single_definition_may_be_undefined(tmp_path):
    # Without a slide that is free of tumour the lecture's has no false positives to average.
    arguments = report_arguments(labels=(1, 1, 1))
    page = Page(write_report(tmp_path, **arguments))
    assert "No lecture curve: there is no slide without tumour to evaluate" in page.text
    assert "up to 0.333 apart: corrected is the highest" in page.text


def test_isolated_tumour_cells_alone_are_neither_found_nor_missed(tmp_path):
    arguments = report_arguments(lesions=LESIONS[LESIONS["status"] == "ITC"])
    arguments["lesion_pictures"] = {("t1", 3): a_jpeg()}
    page = Page(write_report(tmp_path, **arguments))
    assert "There are isolated tumour cells only" in page.text
    assert "counted neither as found nor as missed" in page.text


def test_nothing_scored_at_all_is_still_a_report(tmp_path):
    arguments = report_arguments(PATCHES.assign(score=np.nan), validation=VALIDATION[:0])
    page = Page(write_report(tmp_path, **arguments))
    assert "3 slides could not be scored and are left out" in page.text
    assert "nothing with a known label was scored" in page.text


@pytest.mark.parametrize("arguments", [report_arguments, no_lesions])
def test_nothing_missing_is_written_in_a_programmers_words(tmp_path, arguments):
    words = Page(write_report(tmp_path, **arguments())).words
    assert not {"None", "nan", "NaN", "inf", "-inf", "<NA>"} & set(words)
    assert "–" in words


def test_a_report_that_fails_leaves_the_old_one(folder):
    before = {name: (folder / name).read_bytes() for name in FILES}
    arguments = report_arguments(lesions=LESIONS[:1])
    del arguments["metrics"]["slide"]
    with pytest.raises(KeyError):
        write_report(folder, **arguments)
    assert before == {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("table", ["lesions", "false_positives"])
def test_rows_of_slides_that_are_not_shown_are_refused(tmp_path, table):
    arguments = report_arguments()
    arguments[table] = arguments[table].replace({"slide_id": {"t1": "v1"}})
    with pytest.raises(RunError, match=r"\['v1'\]: none of the test slides"):
        write_report(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


EXPLAINED = {
    "places": 3,
    "ranked_on": 2,
    "tried_on": 1,
    "methods": [
        {"name": "LIME", "auroc": 0.9, "energy_inside": 0.5, "pointing_game": 1.0, "recall": 0.25,
         "exact_match": 0.75, "seconds": 2.5, "similarity": 0.125, "warning": ""},
        {"name": "Deconvolution", "auroc": 0.4, "energy_inside": 0.5, "pointing_game": 0.0,
         "recall": None, "exact_match": 0.75, "seconds": 0.01, "similarity": 0.8,
         "warning": "it shows the image"},
        {"name": "CAM", "auroc": 0.3, "energy_inside": 0.5, "pointing_game": 0.0, "recall": 0.5,
         "exact_match": 0.75, "seconds": 0.01, "similarity": None, "warning": None},
    ],
}  # fmt: skip


def test_the_explanations_ranking_and_verdicts_are_in_the_report(tmp_path):
    page = Page(write_report(tmp_path, **report_arguments(), explained=EXPLAINED))
    assert page.links().count("../why/index.html") == 1
    assert "3 places of the slides" in page.text
    assert "Ranked on 2 annotated test patches" in page.text
    assert "Tried on 1 patch with all weights of the model random" in page.text
    assert "LIME 0.900 50.0 % 100.0 % 25.0 % 75.0 % 2.5 changes (0.125)" in page.text
    assert "0.01 much the same (0.800) CAM" in page.text
    assert "CAM 0.300 50.0 % 0.0 % 50.0 % 75.0 % 0.01 –" in page.text


def test_explanations_made_later_are_put_where_an_evaluation_would_put_them(tmp_path):
    known = write_report(tmp_path / "known", **report_arguments(), explained=EXPLAINED)
    later = write_report(tmp_path / "later", **report_arguments())
    before = later.read_text()
    assert "There are no explanations of this model yet" in before
    whose = {"model": "vgg16@abc", "explanations": "../why/index.html"}
    for found in (EXPLAINED, EXPLAINED, None):
        show_explanations(later, **whose, explained=found)
        assert later.read_text() == (before if found is None else known.read_text())
    show_explanations(later, **whose | {"model": "vgg16@abcd"}, explained=EXPLAINED)
    assert later.read_text() == before
    show_explanations(tmp_path / "none.html", **whose, explained=EXPLAINED)
    assert not (tmp_path / "none.html").exists()


def test_what_bfloat16_changed_is_said_beside_the_figures(tmp_path):
    arguments = report_arguments()
    assert "bfloat16" not in write_report(tmp_path / "exact", **arguments).read_text()
    difference = {"patches": 64, "largest": 0.01234, "mean": 0.000987}
    arguments["metrics"]["precision"] = {
        "training": "float32", "heatmaps": "bfloat16", "difference": difference,
    }  # fmt: skip
    page = write_report(tmp_path / "fast", **arguments).read_text()
    assert (
        "On 64 patches drawn at random, they differ from float32 by at most 0.012 (mean 0.00099)."
    ) in page
    metrics = json.loads((tmp_path / "fast" / "metrics.json").read_text())
    assert metrics["precision"]["difference"] == difference
