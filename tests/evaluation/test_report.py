import json
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from wsi_pipeline.evaluation.froc import froc_curve, froc_metrics, lecture_hits, lesion_scores
from wsi_pipeline.evaluation.patch_level import patch_metrics
from wsi_pipeline.evaluation.report import SlidePanel, slide_table, write_report
from wsi_pipeline.evaluation.slide_level import accuracy_curve, slide_metrics, slide_scores

PATCHES = pd.DataFrame(
    {
        "slide_id": ["t1", "t1", "t1", "t2", "t2", "t3", "t3"],
        "label": [1, 0, 1, 1, 0, 0, 0],
        "score": np.array([0.9, 0.2, np.nan, 0.4, 0.3, 0.8, 0.1], np.float32),
        "lesions": [[1], [], [2], [1], [], [], []],
    }
)
VALIDATION = pd.DataFrame({"slide_id": ["v1", "v2"], "label": [1, 0], "score": [0.8, 0.2]})
FAILURES = pd.DataFrame({"stage": ["tile"], "slide_id": ["t9"], "reason": ["<b>torn</b> file"]})
FILES = {
    "report.html", "metrics.json", "patches_by_slide.csv", "slides.csv", "slide_accuracy.csv",
    "froc_lecture.csv", "lesions.csv",
}  # fmt: skip


def a_jpeg(width=8):
    picture = BytesIO()
    Image.new("RGB", (width, 4), "red").save(picture, format="jpeg")
    return picture.getvalue()


def report_arguments(patches=PATCHES, labels=(1, 1, 0), validation=VALIDATION):
    slide_ids = ["t1", "t2", "t3"]
    scores = slide_scores(slide_ids, patches).to_numpy()
    test = pd.DataFrame({"slide_id": slide_ids, "label": labels, "score": scores})
    lesions = lesion_scores(patches, {"t1": [1, 2], "t2": [1]} if 1 in labels else {})
    froc = froc_curve(lecture_hits(patches, lesions, test.set_index("slide_id")["label"]))
    slide = slide_metrics(validation, test)
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
    return {
        "title": "Model <vgg16> & friends",
        "run": {"seed": 7, "settings": {"tile": {"patch_px": 512}}},
        "metrics": {
            "patch": patch_metrics(patches["label"], patches["score"]),
            "slide": slide,
            "froc": {"lecture": froc_metrics(froc, slides=3)},
        },
        "patches": patches,
        "slide_curves": {
            "validation": accuracy_curve(validation["label"], validation["score"]),
            "test": accuracy_curve(test["label"], test["score"]),
        },
        "froc": froc,
        "lesions": lesions,
        "slides": panels,
        "failures": FAILURES,
    }


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of styles."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.style = [], "", False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.style = tag == "style"

    def handle_endtag(self, tag):
        self.style = False

    def handle_data(self, data):
        self.text += "" if self.style else " ".join(data.split()) + " "

    def images(self):
        return [attributes["src"] for tag, attributes in self.tags if tag == "img"]


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
    # Lesion scores 0.9, never, 0.4; one normal slide with 0.8 and 0.1.
    lecture = metrics["froc"]["lecture"]
    assert lecture["sensitivity_at"]["0.25"] == pytest.approx(1 / 3)
    assert lecture["sensitivity_at"]["1"] == pytest.approx(2 / 3)
    assert lecture["score"] == pytest.approx((2 * 1 / 3 + 4 * 2 / 3) / 6)
    assert metrics["cohort"] == {
        "slides": 3, "tumour_slides": 2, "normal_slides": 1, "patients": 1, "lesions": 3,
        "validation_slides": 2,
    }  # fmt: skip


def test_tables_hold_what_the_page_shows(folder):
    lesions = pd.read_csv(folder / "lesions.csv")
    assert lesions["score"].tolist() == pytest.approx([0.9, -np.inf, 0.4])
    slides = pd.read_csv(folder / "slides.csv")
    assert slides["slide_id"].tolist() == ["t2", "t3", "t1", "v1", "v2"]
    assert slides["verdict"].tolist() == [
        "missed", "false alarm", "found", "found", "correctly negative",
    ]  # fmt: skip
    assert slides["lesions_found"][:3].tolist() == [0, 0, 1]
    assert slides["lesions"][:3].tolist() == [1, 0, 2]
    accuracy = pd.read_csv(folder / "slide_accuracy.csv")
    assert accuracy["split"].value_counts().to_dict() == {"test": 4, "validation": 3}
    assert pd.read_csv(folder / "patches_by_slide.csv")["unscored"].tolist() == [1, 0, 0]
    froc = pd.read_csv(folder / "froc_lecture.csv")
    assert froc["sensitivity"].iloc[-1] == pytest.approx(2 / 3)


def test_page_needs_no_network_and_no_script(page):
    assert "script" not in {tag for tag, _ in page.tags}
    links = [a.get("href", "") for tag, a in page.tags if tag in ("a", "link")]
    assert links and all(link.startswith("#") for link in links)
    assert all(source.startswith("data:image/") for source in page.images())
    assert "url(" not in page.source and "@import" not in page.source


def test_every_link_within_the_page_has_its_target(page):
    targets = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(targets) == len(set(targets))
    assert {a["href"][1:] for tag, a in page.tags if tag == "a"} <= set(targets)


def test_pictures_are_inside(page):
    kinds = [source.split(";")[0] for source in page.images()]
    assert kinds.count("data:image/svg+xml") == 5 and kinds.count("data:image/jpeg") == 1
    for source in page.images():
        data = b64decode(source.split(",")[1])
        assert data.startswith(b"\xff\xd8") or b"<svg" in data[:1000]
    assert all(a["alt"] for tag, a in page.tags if tag == "img")


def test_text_is_escaped(page):
    assert "Model <vgg16> & friends" in page.text
    assert "<b>torn</b> file" in page.text
    assert "<vgg16>" not in page.source and "<b>torn" not in page.source


def test_page_says_what_was_evaluated_and_how(page):
    assert "3 slides (2 with tumour, 1 without) of 1 patient, with 3 annotated tumours" in page.text
    assert "1 of 3 slides called correctly" in page.text
    assert "t was chosen on the 2 validation slides" in page.text
    assert "1 failure occurred" in page.text
    assert "patch_px: 512" in page.text
    assert "1 patch unreadable" in page.text


def test_mistakes_come_first_in_the_gallery(page):
    articles = [attributes["id"] for tag, attributes in page.tags if tag == "article"]
    assert articles[:3] == ["slide-test-t2", "slide-test-t3", "slide-test-t1"]


def test_report_is_the_same_when_written_again(folder):
    before = {name: (folder / name).read_bytes() for name in FILES}
    write_report(folder, **report_arguments())
    assert before == {name: (folder / name).read_bytes() for name in FILES}


def test_undefined_figures_are_said_so_and_null(tmp_path):
    patches = PATCHES.assign(label=0, lesions=[[] for _ in range(len(PATCHES))])
    arguments = report_arguments(patches, labels=(0, 0, 0), validation=VALIDATION[:1])
    page = Page(write_report(tmp_path, **{**arguments, "failures": FAILURES[:0]}))
    assert "No FROC curve: there is no lesion to evaluate" in page.text
    assert "Undefined: no positive among those evaluated" in page.text
    assert "The slide threshold was not chosen from data" in page.text
    assert "None: every slide went through every stage" in page.text
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["froc"]["lecture"]["score"] is None
    assert metrics["patch"]["roc_auc"] is None and metrics["slide"]["sensitivity"] is None


def test_nothing_scored_at_all_is_still_a_report(tmp_path):
    arguments = report_arguments(PATCHES.assign(score=np.nan), validation=VALIDATION[:0])
    page = Page(write_report(tmp_path, **arguments))
    assert "3 slides could not be scored and are left out" in page.text
    assert "nothing with a known label was scored" in page.text


def test_a_report_that_fails_leaves_the_old_one(folder):
    before = (folder / "report.html").read_bytes()
    arguments = report_arguments()
    with pytest.raises(KeyError):
        write_report(folder, **{**arguments, "metrics": {"patch": arguments["metrics"]["patch"]}})
    assert (folder / "report.html").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == FILES


def test_a_slide_of_unknown_label_is_shown_but_not_evaluated():
    panel = SlidePanel("x", "p", "test", -1, 0.9, True)
    table = slide_table([panel], pd.DataFrame({"slide_id": [], "score": []}), 0.75)
    assert table["verdict"].tolist() == ["not evaluated"]
    assert table["lesions"].isna().all()
