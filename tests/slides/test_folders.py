"""Slides and annotations in folders: the table of docs/slides.md."""

import os
import unicodedata
from pathlib import Path

import pytest

from wsi_pipeline.errors import CatalogError
from wsi_pipeline.slides.folders import find_files, scan_folders


@pytest.fixture
def folder(tmp_path):
    """A function that makes empty files and gives their folder."""

    def make(name, *files):
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / name

    return make


def test_pairs_slides_and_annotations_by_name(folder):
    slides = folder("slides", "t2.tif", "normal/n1.SVS", "t1.svs", "notes.txt", ".t1.svs")
    xml = folder("xml", "t1.xml", "deep/t2.geojson", "readme.md")
    frame = scan_folders(slides, xml)[0]
    assert frame["slide_id"].tolist() == ["n1", "t1", "t2"]
    assert frame["path"].tolist() == [
        str(slides / file) for file in ("normal/n1.SVS", "t1.svs", "t2.tif")
    ]
    assert frame["annotation"].fillna("none").tolist() == [
        "none",
        str(xml / "t1.xml"),
        str(xml / "deep/t2.geojson"),
    ]
    assert frame["patient_id"].tolist() == ["n1", "t1", "t2"]
    assert frame[["split", "label", "mpp"]].isna().all(axis=None)
    assert scan_folders(slides)[0]["annotation"].isna().all()


def test_data_folder_of_an_mrxs_is_no_slide(folder):
    slides = folder("slides", "case.1.mrxs", "case.1/Data0000.dat", "case.1/preview.tif")
    assert scan_folders(slides)[0]["slide_id"].tolist() == ["case.1"]


@pytest.mark.parametrize(
    ("slides", "annotations", "message"),
    [
        (["a.svs"], ["a.xml", "b.xml"], r"b\.xml: no slide of this name"),
        (["a.svs"], ["a.xml", "a.json"], "two annotations have the same name"),
        (["a.svs", "old/a.tif"], ["a.xml"], "two slides have the same name"),
        (["a.svs", "A.tif"], ["a.xml"], "two slides have the same name"),
        (["a.dcm", "b.dcm"], ["a.xml"], "several DICOM files"),
        (["a b.svs"], ["a b.xml"], r"a b\.svs: slide_id is 'a b'"),
        (["a.jpg"], ["a.xml"], "holds no slides"),
        (["a.svs"], ["a.txt"], "holds no annotations"),
    ],
)
def test_refuses_folders_that_do_not_pair(folder, slides, annotations, message):
    with pytest.raises(CatalogError, match=message):
        scan_folders(folder("slides", *slides), folder("xml", *annotations))


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(CatalogError, match="nowhere: no such folder of slides"):
        scan_folders(tmp_path / "nowhere")


def ids(slides, annotations=None):
    return scan_folders(slides, annotations)[0]["slide_id"].tolist()


def test_what_is_passed_over_is_counted_and_the_first_is_named(folder):
    slides = folder(
        "slides",
        *("a.svs", "a.svs.xml", "b.svs.xml", "._a.svs", ".DS_Store", "~$a.svs", "Thumbs.db"),
        *("b.svs.part", "c.jpg", "README", "m.mrxs", "m/Data0000.dat", "m/Slidedat.ini"),
        *(".snapshot/a.svs", "run.zarr/c/0"),
    )
    frame, (note,) = scan_folders(slides)
    assert frame["slide_id"].tolist() == ["a", "m"]
    assert note == (
        f"passed over under {slides}: .jpg files: 1 (first: c.jpg); .xml files: 2 (first:"
        " a.svs.xml); Zarr stores: 1 (first: run.zarr); data folders of MIRAX slides: 1 (first: m);"
        " files without suffix: 1 (first: README); hidden or system files: 5 (first: .DS_Store);"
        " unfinished downloads: 1 (first: b.svs.part)"
    )


def test_nothing_is_noted_where_nothing_is_passed_over(folder):
    both = folder("both", "a.svs", "a.xml")
    assert scan_folders(both, both)[1] == []
    assert scan_folders(folder("slides", "a.svs"), folder("xml", "a.xml", "b.txt"))[1] == [
        f"passed over under {folder('xml')}: .txt files: 1 (first: b.txt)"
    ]


def test_linked_folders_are_searched_once_and_loops_end(folder):
    slides, elsewhere = folder("slides", "deep/a.svs"), folder("elsewhere", "b.svs")
    (slides / "0link").symlink_to(elsewhere)
    (slides / "0again").symlink_to(slides / "deep")
    (slides / "deep" / "loop").symlink_to(slides)
    frame, (note,) = scan_folders(slides)
    assert frame["path"].tolist() == [str(slides / "deep/a.svs"), str(slides / "0link/b.svs")]
    assert note.endswith("links to folders that were searched already: 2 (first: 0again)")


def test_a_link_to_a_slide_of_the_same_name_is_passed_over(folder):
    slides = folder("slides", "site/a.svs", "all/readme")
    (slides / "all" / "a.svs").symlink_to(slides / "site" / "a.svs")
    frame, (note,) = scan_folders(slides)
    assert len(frame) == 1
    assert "further names of a file: 1 (first: a.svs)" in note


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_to_a_slide_of_another_name_is_one_file_with_two_names(folder, link):
    slides = folder("slides", "a.svs")
    link(slides / "a.svs", slides / "b.svs")
    with pytest.raises(CatalogError, match=r"same path .* slides a \(a\.svs, .*b \(b\.svs, "):
        scan_folders(slides)


def test_a_link_that_leads_nowhere_is_a_slide_that_will_fail(folder):
    slides = folder("slides", "a.svs")
    (slides / "gone.svs").symlink_to(slides / "nowhere.svs")
    assert ids(slides) == ["a", "gone"]


def test_a_subfolder_that_cannot_be_read_is_an_error(folder, monkeypatch):
    slides, listed = folder("slides", "a.svs", "locked/b.svs"), Path.iterdir

    def iterdir(path):
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(CatalogError, match=r"locked: the folder cannot be read .* Permission"):
        scan_folders(slides)


@pytest.mark.parametrize(
    ("slide", "annotation"),
    [
        ("s1.svs", "s1.xml"),
        ("s1.svs", "S1.XML"),
        ("s1.svs", "s1.svs.geojson"),
        ("s2.ome.tif", "s2.ome.geojson"),
        ("s2.ome.tif", "s2.ome.tif.geojson"),
        ("s2.ome.tif", "s2.geojson"),
        ("s3.tif.svs", "s3.tif.xml"),
    ],
)
def test_an_annotation_belongs_to_the_slide_of_its_name_or_file_name(folder, slide, annotation):
    frame, _ = scan_folders(folder("slides", slide), folder("xml", annotation))
    assert frame["annotation"].tolist() == [str(folder("xml") / annotation)]


def test_two_annotations_of_one_slide_are_refused(folder):
    with pytest.raises(CatalogError, match="two annotations of the slide a"):
        scan_folders(folder("slides", "a.svs"), folder("xml", "a.xml", "a.svs.xml"))


def test_the_exact_name_wins_over_the_one_without_a_suffix(folder):
    slides = folder("slides", "a.svs", "a.ome.tif")
    frame, _ = scan_folders(slides, folder("xml", "a.xml", "a.ome.xml"))
    assert frame["slide_id"].tolist() == ["a", "a.ome"]
    assert frame["annotation"].tolist() == [
        str(folder("xml") / name) for name in ("a.xml", "a.ome.xml")
    ]


def test_slides_of_one_name_in_dated_folders_are_refused_with_both_paths(folder):
    slides = folder("slides", "2024-01-02/a.svs", "2024-03-04/a.svs")
    with pytest.raises(
        CatalogError, match=r"2024-03-04/a\.svs and .*2024-01-02/a\.svs: two slides"
    ):
        scan_folders(slides)


def test_an_empty_folder_says_what_is_there_instead(folder):
    with pytest.raises(CatalogError, match=r"holds no slides .*unfinished downloads: 1"):
        find_files(folder("slides", "a.svs.part"), {".svs"}, "slides")


def test_names_that_are_no_slide_ids_are_named_whatever_their_form_of_unicode(folder):
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "M\u00fcller.svs")
        with pytest.raises(CatalogError, match="it names files"):
            scan_folders(folder(form, name))


def test_patients_come_from_the_names_and_a_rule_names_the_slide_without(folder):
    slides = folder("slides", "TCGA-AA-0001-01Z-00-DX1.svs", "TCGA-AA-0001-01Z-00-DX2.svs")
    frame, notes = scan_folders(slides)
    assert frame["patient_id"].tolist() == ["TCGA-AA-0001"] * 2
    assert notes == []
    with pytest.raises(CatalogError, match=r"DX2\.svs: no patient is found in the slide id"):
        scan_folders(slides, patient_from="(.*DX1)")


def test_pairs_slides_and_masks_by_name(folder):
    slides = folder("slides", "a.svs", "b.svs")
    tissue, exclude = folder("tissue", "b.png"), folder("pens", "a.geojson", "b.tif")
    frame, _ = scan_folders(slides, tissue=tissue, exclude=exclude)
    assert frame["tissue"].fillna("none").tolist() == ["none", str(tissue / "b.png")]
    assert frame["exclude"].tolist() == [str(exclude / "a.geojson"), str(exclude / "b.tif")]
    with pytest.raises(CatalogError, match=r"c\.png: no slide of this name .*1 such tissue masks"):
        scan_folders(slides, tissue=folder("tissue", "c.png"))


def test_packed_annotations_pair_as_plain_ones_do(folder):
    slides = folder("slides", "a.svs", "b.svs", "c.svs")
    xml = folder("xml", "a.geojson.gz", "b.svs.xml.zip", "c.annotations")
    frame, _ = scan_folders(slides, xml)
    expected = [str(xml / file) for file in ("a.geojson.gz", "b.svs.xml.zip", "c.annotations")]
    assert frame["annotation"].tolist() == expected
    with pytest.raises(CatalogError, match="two annotations"):
        scan_folders(slides, folder("xml", "a.geojson"))
    with pytest.raises(CatalogError, match=r"other\.geojson\.gz: no slide of this name"):
        scan_folders(slides, folder("orphan", "other.geojson.gz"))


def test_an_unknown_file_named_as_a_slide_is_its_annotation_if_the_only_one(folder):
    """Passed over, it would make the slide one on which nothing was drawn."""
    slides = folder("slides", "a.svs", "b.svs", "c.svs", "d.svs")
    xml = folder("xml", "a.xml", "a.qpdata", "b.csv", "c.ndpa", "notes.zip", "d.jpg")
    frame, notes = scan_folders(slides, xml)
    found = dict(zip(frame["slide_id"], frame["annotation"].fillna("none"), strict=True))
    expected = {"a": "a.xml", "b": "b.csv", "c": "c.ndpa"}
    assert found == {s: str(xml / file) for s, file in expected.items()} | {"d": "none"}
    assert "notes.zip" in notes[0]
    assert "b.csv" not in notes[0]
