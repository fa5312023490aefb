"""The list of slides, and its splits."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.errors import CatalogError
from wsi_pipeline.slides.catalog import (
    assign_splits,
    read_catalog,
    read_measured_slides,
    scan_folders,
)

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


@pytest.fixture
def table(tmp_path):
    """A function that writes the lines of a table."""

    def write(*lines):
        path = tmp_path / "slides.csv"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


# read_catalog


def test_reads_all_columns(table, tmp_path):
    path = table(
        "slide_id,path,annotation,patient_id,split,label,mpp",
        "a,images/a.svs,xml/a.xml,p1,train,1,0.25",
        "b.2, /elsewhere/b.svs ,,p1,train,0,",
        "",
        "C-3,c.svs,,,test,,",
    )
    frame = read_catalog(path)
    assert frame["slide_id"].tolist() == ["a", "b.2", "C-3"]
    assert frame["path"].tolist() == [
        str(tmp_path / "images/a.svs"),
        "/elsewhere/b.svs",
        str(tmp_path / "c.svs"),
    ]
    assert frame["annotation"].fillna("none").tolist() == [
        str(tmp_path / "xml/a.xml"),
        "none",
        "none",
    ]
    assert frame["patient_id"].tolist() == ["p1", "p1", "C-3"]
    assert frame["split"].tolist() == ["train", "train", "test"]
    assert frame["label"].dtype == "Int8"
    assert frame["label"].fillna(-9).tolist() == [1, 0, -9]
    assert frame["mpp"].fillna(-9).tolist() == [0.25, -9, -9]


def test_masks_made_elsewhere_count_from_the_tables_folder(table, tmp_path):
    frame = read_catalog(
        table("slide_id,path,tissue,exclude", "a,a.svs,m/a.png,/pens/a.geojson", "b,b.svs,,")
    )
    assert frame["tissue"].fillna("none").tolist() == [str(tmp_path / "m/a.png"), "none"]
    assert frame["exclude"].fillna("none").tolist() == ["/pens/a.geojson", "none"]


def test_absent_columns_are_missing_values_and_a_slide_is_its_own_patient(table):
    frame = read_catalog(table("path,slide_id", "a.svs,a", "b.svs,b"))
    assert frame["patient_id"].tolist() == ["a", "b"]
    absent = ["annotation", "tissue", "exclude", "split", "label", "mpp"]
    assert frame[absent].isna().all(axis=None)


def test_paths_count_from_the_tables_folder_not_the_current_one(table, tmp_path, monkeypatch):
    table("slide_id,path", "a,a.svs")
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    assert read_catalog("../slides.csv")["path"][0] == str(tmp_path / "else" / ".." / "a.svs")


def test_reads_what_a_spreadsheet_saves(tmp_path):
    path = tmp_path / "slides.csv"
    path.write_bytes('\ufeffslide_id,path\r\na,"Müller, 1.svs"\r\n'.encode())
    assert read_catalog(path)["path"][0] == str(tmp_path / "Müller, 1.svs")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["slide_id,path,stain,scanner", "a,a.svs,HE,x"],
            r"unknown columns \['stain', 'scanner'\]",
        ),
        (["slide_id", "a"], r"columns \['path'\] are missing"),
        ([""], "columns .* are missing"),
        (["slide_id,path,path", "a,a.svs,b.svs"], "a column is there twice"),
        (["slide_id,path"], "holds no slide"),
        (["slide_id,path", "a,a.svs,1"], "line 2: the row has more or fewer cells"),
        (["slide_id,path,label", "a,a.svs"], "line 2: the row has more or fewer cells"),
        (["slide_id,path", "a,a.svs", "b,"], "line 3: path is ''"),
        (["slide_id,path,label", "a,a.svs,2"], "line 2: label is '2'"),
        (["slide_id,path,label", "a,a.svs,tumor"], "line 2: label is 'tumor'"),
        (["slide_id,path,mpp", "a,a.svs,0"], "line 2: mpp is '0'"),
        (["slide_id,path,mpp", "a,a.svs,nan"], "line 2: mpp is 'nan'"),
        (["slide_id,path,mpp", "a,a.svs,40x"], "line 2: mpp is '40x'"),
        (["slide_id,path,split", "a,a.svs,dev"], "line 2: split is 'dev'"),
        (["slide_id,path", "a,a.svs", "A,b.svs"], "lines 2, 3: the same slide_id, 'a'"),
        (["slide_id,path", "a,a.svs", "b,b.svs", "c,a.svs"], "lines 2, 4: the same path"),
        (
            ["slide_id,path,annotation", "a,a,x/a.xml", "b,b,", "c,c,./x//a.xml", "d,d,"],
            r"lines 2, 4: the same annotation, '.*x/a\.xml', is there 2 times \(slides a, c\)",
        ),
        (
            ["slide_id,path,split", "a,a.svs,train", "b,b.svs,"],
            "line 3: slide 'b' has no split while others have",
        ),
        (
            ["slide_id,path,patient_id,split", "a,a,P7,train", "b,b,P8,test", "c,c,P7,test"],
            r"patient 'P7' is in more than one split: a \(train, line 2\), c \(test, line 4\)",
        ),
    ],
)
def test_refuses_and_names_table_and_line(table, lines, message):
    with pytest.raises(CatalogError, match=rf"slides\.csv.*{message}"):
        read_catalog(table(*lines))


@pytest.mark.parametrize(
    "slide_id",
    [
        "",
        "a/b",
        "..",
        ".hidden",
        "-a",
        "a b",
        "a.",
        "ä",
        "CON",
        "nul.svs",
        "com1",
        "a\\b",
        "x" * 129,
    ],
)
def test_refuses_ids_that_are_no_safe_file_names(table, slide_id):
    with pytest.raises(CatalogError, match="line 2: slide_id is"):
        read_catalog(table("slide_id,path", f"{slide_id},a.svs"))


@pytest.mark.parametrize("slide_id", ["a", "7", "Tumor_001", "TCGA-A7.01", "console", "x" * 128])
def test_accepts_ids_that_are_safe_file_names(table, slide_id):
    assert read_catalog(table("slide_id,path", f"{slide_id},a.svs"))["slide_id"][0] == slide_id


def test_unreadable_tables_are_named(tmp_path):
    with pytest.raises(CatalogError, match=r"none\.csv: cannot be read"):
        read_catalog(tmp_path / "none.csv")
    (tmp_path / "slides.csv").write_bytes(b"slide_id,path\n\xff\xfe\x00,a\n")
    with pytest.raises(CatalogError, match=r"slides\.csv: cannot be read"):
        read_catalog(tmp_path / "slides.csv")


# scan_folders


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
    frame = scan_folders(slides, xml)
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
    assert list(frame.columns) == list(read_catalog_columns(folder))
    assert scan_folders(slides)["annotation"].isna().all()


def test_pairs_slides_and_masks_by_name(folder):
    slides = folder("slides", "a.svs", "b.svs")
    tissue, exclude = folder("tissue", "b.png"), folder("pens", "a.geojson", "b.tif")
    frame = scan_folders(slides, tissue=tissue, exclude=exclude)
    assert frame["tissue"].fillna("none").tolist() == ["none", str(tissue / "b.png")]
    assert frame["exclude"].tolist() == [str(exclude / "a.geojson"), str(exclude / "b.tif")]
    with pytest.raises(CatalogError, match=r"c\.png: no slide of this name .*1 such tissue masks"):
        scan_folders(slides, tissue=folder("tissue", "c.png"))


def read_catalog_columns(folder):
    path = folder("table", "slides.csv") / "slides.csv"
    path.write_text("slide_id,path\na,a\n")
    return read_catalog(path).columns


def test_data_folder_of_an_mrxs_is_no_slide(folder):
    slides = folder("slides", "case.1.mrxs", "case.1/Data0000.dat", "case.1/preview.tif")
    assert scan_folders(slides)["slide_id"].tolist() == ["case.1"]


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


# assign_splits


def cohort(slides_of_patient, tumour):
    rows = [
        {"slide_id": f"s{patient}-{i}", "patient_id": f"p{patient}", "tumour": i == 0 and has}
        for patient, (count, has) in enumerate(zip(slides_of_patient, tumour, strict=True))
        for i in range(count)
    ]
    frame = pd.DataFrame(rows)
    frame["label"] = frame["tumour"].map({True: 1, False: None}).astype("Int8")
    frame["annotation"] = pd.Series(pd.NA, index=frame.index, dtype="string")
    return frame


def patients(frame):
    return frame.groupby("patient_id")["split"].first().value_counts().to_dict()


def test_exact_counts_by_hand():
    """Of 20 patients 14, 2 and 4; of the 10 with a tumour 7, 1 and 2."""
    frame = assign_splits(cohort([2] * 20, [True] * 10 + [False] * 10), SHARES, seed=0)
    assert patients(frame) == {"train": 14, "validation": 2, "test": 4}
    with_tumour = frame[frame["label"].eq(1).fillna(False)]
    assert patients(with_tumour) == {"train": 7, "validation": 1, "test": 2}


def test_largest_remainders_by_hand():
    """Of 8 patients 5.6, 0.8 and 1.6: the two left over go to remainders 0.8 and, first, 0.6."""
    frame = assign_splits(cohort([1] * 8, [False] * 8), SHARES, seed=0)
    assert patients(frame) == {"train": 6, "validation": 1, "test": 1}


def test_no_split_stays_empty_while_there_are_patients_for_all():
    frame = assign_splits(cohort([1] * 3, [True, True, False]), SHARES, seed=0)
    assert patients(frame) == {"train": 1, "validation": 1, "test": 1}
    frame = assign_splits(cohort([1] * 2, [True, False]), SHARES, seed=0)
    assert sum(patients(frame).values()) == 2


def test_split_without_a_share_stays_empty():
    shares = {"train": 0.5, "validation": 0.0, "test": 0.5}
    frame = assign_splits(cohort([1] * 9, [True] * 4 + [False] * 5), shares, seed=0)
    assert set(patients(frame)) == {"train", "test"}


def test_annotated_patients_count_as_those_with_a_tumour():
    frame = cohort([1] * 20, [False] * 20)
    frame.loc[:9, "annotation"] = "a.xml"
    split = assign_splits(frame, SHARES, seed=3)
    assert patients(split[:10]) == {"train": 7, "validation": 1, "test": 2}


def test_every_patient_has_the_same_chance():
    """Over 500 seeds, each of 10 patients is in the test split about 100 times (sd 9)."""
    frame = cohort([1] * 10, [True] * 5 + [False] * 5)
    shares = {"train": 0.8, "test": 0.2}
    in_test = np.zeros(10)
    for seed in range(500):
        in_test += (assign_splits(frame, shares, seed)["split"] == "test").to_numpy(float)
    assert np.abs(in_test - 100).max() < 45


@given(
    cohort_of=st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=40),
    weights=st.lists(st.integers(0, 10), min_size=3, max_size=3).filter(any),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_splits_hold_their_properties(cohort_of, weights, seed, data):
    names = ("train", "validation", "test")
    shares = {name: w / sum(weights) for name, w in zip(names, weights, strict=True)}
    frame = cohort(*zip(*cohort_of, strict=True))
    split = assign_splits(frame, shares, seed)

    assert (split.groupby("patient_id")["split"].nunique() == 1).all()

    # The order of the rows and of the shares changes nothing.
    order = data.draw(st.permutations(range(len(frame))))
    turned = assign_splits(frame.iloc[order], dict(reversed(shares.items())), seed)
    assert turned["split"].sort_index().tolist() == split["split"].tolist()

    total, count = len(cohort_of), patients(split)
    used = [name for name in names if shares[name] > 0]
    floors = {name: math.floor(total * shares[name] + 1e-9) for name in used}
    assert set(count) <= set(used)
    if total >= len(used):
        assert set(count) == set(used)
    if min(floors.values()) >= 1:
        assert all(floors[name] <= count[name] <= floors[name] + 1 for name in used)

    # Patients with a tumour are spread as all patients are.
    tumour = split[split["label"].eq(1).fillna(False)]
    for name, n in patients(tumour).items():
        assert abs(n - len(tumour) * count[name] / total) < 1


def test_measured_slides_need_no_files(tmp_path):
    table = tmp_path / "slides.csv"
    table.write_text("slide_id,label,width,height,mpp,patient_id\na,1,300,200,0.25,p\nb,0,9,8,1,\n")
    found = read_measured_slides(table)
    assert found.to_dict("list") == {
        "slide_id": ["a", "b"],
        "width": [300, 9],
        "height": [200, 8],
        "mpp": [0.25, 1.0],
        "label": [1, 0],
        "patient_id": ["p", "b"],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "slide_id,width,height,label\na,1,1,1\n",
            r"slides\.csv: the columns \['mpp'\] are missing",
        ),
        ("slide_id,width,height,mpp,label\na,1,1,1,2\n", r"line 2: label is '2'"),
        ("slide_id,width,height,mpp,label\na,0,1,1,1\n", r"line 2: width is '0'"),
        ("slide_id,width,height,mpp,label\na,1,1,,1\n", r"line 2: mpp is ''"),
        ("slide_id,width,height,mpp,label\na,1,1,1,1\nA,1,1,1,1\n", r"lines 2, 3: the same slide"),
    ],
)
def test_measured_slides_that_break_a_rule_are_refused(tmp_path, text, message):
    table = tmp_path / "slides.csv"
    table.write_text(text)
    with pytest.raises(CatalogError, match=message):
        read_measured_slides(table)
