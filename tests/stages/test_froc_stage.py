"""FROC of anybody's detections, from files."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import tifffile
from distributed import LocalCluster

from wsi_pipeline.errors import CatalogError, RunError
from wsi_pipeline.evaluation.cohort_hits import cohort_hits
from wsi_pipeline.jobs.unit import Output, SmallFile
from wsi_pipeline.stages import froc

ASAP = """<?xml version="1.0"?><ASAP_Annotations><Annotations>
<Annotation Name="a" Type="Polygon" PartOfGroup="Tumor"><Coordinates>
<Coordinate Order="0" X="{0}" Y="{0}"/><Coordinate Order="1" X="{1}" Y="{0}"/>
<Coordinate Order="2" X="{1}" Y="{1}"/><Coordinate Order="3" X="{0}" Y="{1}"/>
</Coordinates></Annotation></Annotations></ASAP_Annotations>"""
SIDE = 6400


@pytest.fixture
def cohort(tmp_path):
    """Two tumour slides and a normal one: files as anybody would have them.

    ``Tumor_1`` has a lesion from 1600 to 3200 px, found at 0.9 and, 40 um beyond its edge, at
    0.95; and a false positive at 0.3. ``Tumor_2``'s is missed. ``Normal_1`` has one at 0.5.
    """
    for folder in ("detections", "annotations", "masks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "slides.csv").write_text(
        "slide_id,width,height,mpp,label,patient_id\n"
        f"Tumor_1,{SIDE},{SIDE},0.25,1,p\nTumor_2,{SIDE},{SIDE},0.25,1,q\n"
        f"Normal_1,{SIDE},{SIDE},0.25,0,r\n"
    )
    (tmp_path / "detections/Tumor_1.csv").write_text("0.9,2000,2000\n0.95,3376,2000\n0.3,5000,99\n")
    (tmp_path / "detections/Tumor_2.csv").write_text("")
    (tmp_path / "detections/Normal_1.csv").write_text("0.5,10,10\n")
    for slide in ("Tumor_1", "Tumor_2"):
        (tmp_path / f"annotations/{slide}.xml").write_text(ASAP.format(1600, 3200))
        mask = np.zeros((SIDE // 32, SIDE // 32), np.uint8)
        mask[50:100, 50:100] = 255
        tifffile.imwrite(
            tmp_path / f"masks/{slide}_Mask.tif", np.kron(mask, np.ones((32, 32), "B"))
        )
    return tmp_path


@pytest.fixture(scope="module")
def scheduler():
    """Address of a scheduler with a worker, both in this process: each command would start two."""
    options = {"processes": False, "n_workers": 1, "threads_per_worker": 1, "silence_logs": 50}
    place = {"host": "127.0.0.1", "protocol": "tcp://", "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(**options, **place) as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def wsi_froc(cohort, scheduler):
    """Function that runs the command in the cohort's folder."""

    def run_there(*arguments):
        command = [sys.executable, "-c", "from wsi_pipeline.cli import main; main()", "froc"]
        inputs = ["--detections", "detections", "--slides", "slides.csv", "--scheduler", scheduler]
        return subprocess.run(
            [*command, *inputs, *arguments], cwd=cohort, capture_output=True, text=True
        )

    return run_there


def run(folder, truth="annotations"):
    """Up to the point where work is submitted."""
    froc.run(
        folder / "detections", folder / "slides.csv", folder / "out", None,
        **{truth: folder / truth},
    )  # fmt: skip


@pytest.mark.parametrize("truth", ["annotations", "masks"])
def test_both_modes_from_annotations_and_from_masks(cohort, wsi_froc, truth):
    done = wsi_froc(f"--{truth}", truth, "--out", "out")
    assert done.returncode == 0, done.stderr
    found = json.loads((cohort / "out/froc.json").read_text())
    # Corrected: the detection 44 um off is a hit, so the lesion is found at 0.95, before any
    # false positive; one of two lesions. Official: it lies beyond 37.5 um and is a false positive
    # at 0.95, a third of one a slide; the lesion is found at 0.9.
    assert found["corrected"]["score"] == pytest.approx(0.5)
    assert found["official"]["sensitivity_at"]["0.5"] == pytest.approx(0.5)
    assert found["official"]["sensitivity_at"]["0.25"] == pytest.approx(0, abs=1e-9)
    assert found["corrected"]["lesions"] == found["official"]["lesions"] == 2
    lesions = pd.read_csv(cohort / "out/lesions.csv")
    assert lesions["status"].tolist() == ["missed", "found"]
    assert lesions["slide_id"].tolist() == ["Tumor_2", "Tumor_1"]
    assert lesions["confidence"].tolist() == [-np.inf, 0.95]
    assert lesions["area_mm2"].tolist() == pytest.approx([0.16, 0.16])
    wrong = pd.read_csv(cohort / "out/false_positives.csv")
    assert wrong.values.tolist() == [["Normal_1", 0.5, 10, 10], ["Tumor_1", 0.3, 5000, 99]]
    assert (cohort / "out/froc.svg").read_bytes().startswith(b"<?xml")


def test_one_mode_alone_and_nothing_is_done_again(cohort, wsi_froc):
    arguments = ("--annotations", "annotations", "--out", "out", "--mode", "corrected")
    assert wsi_froc(*arguments).returncode == 0
    assert list(json.loads((cohort / "out/froc.json").read_text())) == ["corrected"]
    again = wsi_froc(*arguments)
    assert "0 done, 3 already done" in again.stderr


def test_a_slide_that_fails_leaves_no_score_not_even_an_old_one(cohort, wsi_froc):
    assert wsi_froc("--annotations", "annotations", "--out", "out").returncode == 0
    (cohort / "annotations/Tumor_2.xml").write_text("<nothing/>")
    done = wsi_froc("--annotations", "annotations", "--out", "out")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Tumor_2" in (cohort / "out/failures.csv").read_text()
    left = {path.name for path in (cohort / "out").iterdir() if not path.name.startswith(".")}
    assert left == {"hits", "done", "failures.csv"}


def test_the_lectures_mode_needs_patches_and_is_not_offered(wsi_froc):
    done = wsi_froc("--annotations", "annotations", "--out", "out", "--mode", "lecture")
    assert done.returncode == 2
    assert "'lecture' is not one of 'official', 'corrected'" in done.stderr


def one_slide(folder, slide="Tumor_1", label=1, truth="annotations/Tumor_1.xml", side=SIDE):
    """The work of a unit."""
    froc.SlideHits(
        slide, SmallFile.at(folder / f"detections/{slide}.csv"), (side, SIDE), 0.25,
        {"official": label, "corrected": label}, truth and SmallFile.at(folder / truth),
        {"positive": ["Tumor"], "exclusion": []}, Output(folder),
    ).run()  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("probability,x,y\n0.5,1,1\n", r"line 1: .* is a header"),
        ("nan,1,1\n", r"Normal_1\.csv, line 1: probability is nan"),
        ("0.5,6400,1\n", r"x is 6400\.0: a place is on the slide"),
    ],
)
def test_detections_that_break_a_rule_are_refused(cohort, text, message):
    (cohort / "detections/Normal_1.csv").write_text(text)
    with pytest.raises(RunError, match=message):
        one_slide(cohort, "Normal_1", 0, None)


def test_files_of_slides_not_asked_for_are_passed_over_and_named(cohort, wsi_froc):
    """As in the challenge's folders, and those of a run, with the detections of validation slides.

    Nothing of them counts: neither a false positive at 1, nor two masks of one slide.
    """
    for suffix in ("txt", "xml"):
        (cohort / f"detections/Tumor_1.{suffix}").write_text("0.1,1,1\n")
    (cohort / "detections/Test_9.csv").write_text("1,1,1\n")
    for name in ("Test_9.tif", "Test_9_Mask.tif"):
        (cohort / "masks" / name).write_text("not read")
    done = wsi_froc("--masks", "masks", "--out", "out")
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stderr.split())
    assert "detections: passed over, of no slide in the table: Test_9.csv" in told
    assert "masks: passed over, of no slide in the table: Test_9.tif, Test_9_Mask.tif" in told
    found = json.loads((cohort / "out/froc.json").read_text())
    assert found["corrected"]["score"] == pytest.approx(0.5)  # as without these files
    assert pd.read_csv(cohort / "out/lesions.csv")["confidence"].max() == 0.95


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("detections/Tumor_2.csv", r"no file for the slides Tumor_2"),
        ("annotations/Tumor_2.xml", r"nothing for the slides Tumor_2 .* whose label is 1"),
    ],
)
def test_files_that_are_missing_are_named(cohort, file, message):
    (cohort / file).unlink()
    with pytest.raises(CatalogError, match=message):
        run(cohort)


def test_annotations_on_a_normal_slide_are_refused(cohort):
    with pytest.raises(CatalogError, match=r"Tumor_1\.xml annotates slide Normal_1.*label is 0"):
        one_slide(cohort, "Normal_1", 0)
    with pytest.raises(CatalogError, match=r"Mask\.tif annotates slide Normal_1.*label is 0"):
        one_slide(cohort, "Normal_1", 0, "masks/Tumor_1_Mask.tif")


def test_an_empty_mask_is_right_for_a_normal_slide_an_empty_annotation_wrong_for_a_tumour(cohort):
    tifffile.imwrite(cohort / "masks/Normal_1.tif", np.zeros((SIDE, SIDE), np.uint8))
    one_slide(cohort, "Normal_1", 0, "masks/Normal_1.tif")
    assert cohort_hits(cohort, ["Normal_1"], "corrected").fp_score.tolist() == [0.5]
    empty = "<ASAP_Annotations><Annotations/></ASAP_Annotations>"
    (cohort / "annotations/Tumor_1.xml").write_text(empty)
    with pytest.raises(CatalogError, match=r"holds no lesion, but the label of slide Tumor_1 is 1"):
        one_slide(cohort)


def test_two_masks_of_a_slide_are_refused(cohort):
    (cohort / "masks/Tumor_1.tif").write_bytes((cohort / "masks/Tumor_1_Mask.tif").read_bytes())
    with pytest.raises(CatalogError, match=r"Tumor_1_Mask\.tif.*two masks of one slide"):
        run(cohort, "masks")


def test_a_mask_of_another_slides_size_is_refused(cohort):
    with pytest.raises(RunError, match=r"it has 200 x 200 px, but its slide of 9600 x 6400"):
        one_slide(cohort, truth="masks/Tumor_1_Mask.tif", side=9600)


def test_hits_survive_their_files(cohort):
    one_slide(cohort)
    hits = cohort_hits(cohort, ["Tumor_1"], "corrected")
    assert hits.slide_ids == ("Tumor_1",)
    assert (hits.lesion_score.tolist(), hits.fp_score.tolist()) == ([0.95], [0.3])
