"""Tables of slides."""

import pytest

from wsi_pipeline.errors import CatalogError
from wsi_pipeline.slides.catalog import read_catalog, read_measured_slides


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
        (
            ["slide_id,path", "a,a.svs", "b,b.svs", "c,a.svs"],
            r"the same path .* for the slides a \(line 2, .*\), c \(line 4, ",
        ),
        (
            ["slide_id,path,annotation", "a,a,x/a.xml", "b,b,", "c,c,./x//a.xml", "d,d,"],
            r"the same annotation .* for the slides a \(line 2, .*x/a\.xml\), c \(line 4, ",
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


# read_measured_slides


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
        "patient_source": ["table", "slide"],
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
