import csv
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.errors import CatalogError, RunError
from wsi_pipeline.evaluation.detections import (
    detection_files,
    read_detections,
    write_detections,
)


def a_table(*rows):
    return pd.DataFrame(rows, columns=["probability", "x", "y"], dtype=np.float64)


def a_file(folder, text, name="tumor_001.csv"):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read_as_the_script_does(path):
    """``float(confidence), int(x), int(y)`` of each line: a fraction in a place is an error."""
    lines = [line.rstrip().split(",") for line in path.read_text().splitlines()]
    return [(float(p), int(x), int(y)) for p, x, y in lines]


def test_a_file_has_the_challenges_form(tmp_path):
    write_detections(tmp_path / "a.csv", a_table([0.99993, 15840, 13472], [0.1, 0, 221_771]))
    assert (tmp_path / "a.csv").read_text() == "0.99993,15840,13472\n0.1,0,221771\n"


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1), st.floats(0, 3e5) | st.integers(0, 2**31), st.integers(0, 2**31)
        ),
        max_size=5,
    )
)
def test_every_number_is_read_back_as_it_was(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("detections") / "a.csv"
    written = a_table(*rows)
    write_detections(path, written)
    in_order = written.sort_values("probability", ascending=False, kind="stable")
    pd.testing.assert_frame_equal(
        read_detections(path), in_order.reset_index(drop=True), check_exact=True
    )


def test_float32_probabilities_and_whole_places_suit_the_organisers_script(tmp_path):
    probability = np.random.default_rng(0).random(500, np.float32).astype(np.float64)
    places = np.random.default_rng(1).integers(0, 300_000, (500, 2))
    rows = np.column_stack([probability, places])
    write_detections(tmp_path / "a.csv", a_table(*rows))
    assert read_as_the_script_does(tmp_path / "a.csv") == [tuple(row) for row in rows.tolist()]


def test_detections_come_highest_first_and_ties_in_the_order_of_the_file(tmp_path):
    path = a_file(tmp_path, "0.2,1,1\n0.9,2,2\n0.2,0,0\n1,3,3\n")
    assert read_detections(path).to_numpy().tolist() == [
        [1, 3, 3], [0.9, 2, 2], [0.2, 1, 1], [0.2, 0, 0],
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "\n", "\r\n\r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_says_that_nothing_was_detected(tmp_path, text):
    found = read_detections(a_file(tmp_path, text), (10, 10))
    assert found.dtypes.to_dict() == dict.fromkeys(("probability", "x", "y"), np.float64)
    assert len(found) == 0


def test_no_detections_are_written_as_an_empty_file(tmp_path):
    write_detections(tmp_path / "a.csv", a_table())
    assert (tmp_path / "a.csv").read_bytes() == b""


@pytest.mark.parametrize(
    "text",
    [
        "0.5,10,20\n0.25,1.5,2\n",
        "0.5,10,20\r\n0.25,1.5,2",
        "\n0.5, 10, 20 \n\n\n0.25,1.5,2\n\n",
        b"\xef\xbb\xbf5e-1,1e1,20\n+.25,1.5,2.\n",
    ],
)
def test_forms_that_other_programs_write_are_read(tmp_path, text):
    expected = a_table([0.5, 10, 20], [0.25, 1.5, 2])
    pd.testing.assert_frame_equal(read_detections(a_file(tmp_path, text)), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("probability,x,y\n0.5,1,2\n", "line 1: 'probability,x,y' is a header: .* without one"),
        ("\n0.5,1,2\n\nconfidence,X,Y\n", "line 4: 'confidence,X,Y' is a header"),
        ("0.5,1,2\n0.5,1\n", "line 2: '0.5,1' has 2 cells: .* three"),
        ("0.5,1,2,tumour\n", "line 1: '0.5,1,2,tumour' has 4 cells"),
        ("0.5;1;2\n", "line 1: '0.5;1;2' has 1 cells: .* commas"),
        ("0.5,1,2\n0.5,1,2\n0.5,one,2\n", "line 3: 'one' in '0.5,one,2' is no number"),
        ("0.5,,2\n", "line 1: '' in '0.5,,2' is no number"),
        ('"0.5",1,2\n', "line 1: '\"0.5\"' in .* is no number"),
        (b"0.5,1,2\n\xff\xfe,1,2\n", "line 2: '\ufffd\ufffd' in .* is no number"),
        ("0.5,1_0,2\n", "invalid value '1_0'"),  # a number for Python alone
        ("0.5,1,2\n\nnan,1,2\n", r"line 3: probability is nan: a confidence is from 0 to 1"),
        ("inf,1,2\n", "line 1: probability is inf"),
        ("-0.5,1,2\n", "line 1: probability is -0.5"),
        ("15840,13472,0.99\n", "line 1: probability is 15840.0: a confidence is from 0 to 1"),
        ("0.5,1,2\n0.5,-1,2\n", "line 2: x is -1.0: a place is on the slide"),
        ("0.5,1,nan\n", "line 1: y is nan"),
        ("0.5,1e999,1\n", "line 1: x is inf"),
    ],
)
def test_a_bad_line_is_named_with_value_rule_and_file(tmp_path, text, message):
    path = a_file(tmp_path, text)
    with pytest.raises(RunError, match=message) as error:
        read_detections(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("300,0", r"x is 300\.0: .* from 0 to under 300 px"),  # the slide's far edge is off it
        ("0,200", r"y is 200\.0: .* under 200 px"),
        ("250,250", r"y is 250\.0"),  # x and y exchanged would be on the slide
    ],
)
def test_a_place_off_the_slide_is_refused(tmp_path, place, message):
    path = a_file(tmp_path, f"0.5,1,2\n0.5,{place}\n")
    assert len(read_detections(path)) == 2  # its size unknown, it may be on the slide
    with pytest.raises(RunError, match=f"line 2: {message}"):
        read_detections(path, (300, 200))


def test_the_slides_last_pixel_is_on_it(tmp_path):
    path = a_file(tmp_path, "0.5,299,199\n0.5,299.9,0\n")
    assert len(read_detections(path, (300, 200))) == 2


def test_a_missing_file_is_told_from_an_empty_one(tmp_path):
    with pytest.raises(RunError, match=r"a\.csv: no such file; .* an empty one"):
        read_detections(tmp_path / "a.csv")
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(RunError, match=r"b\.csv: cannot be read"):
        read_detections(tmp_path / "b.csv")


@pytest.mark.parametrize("row", [(np.nan, 1, 2), (1.5, 1, 2), (0.5, -1, 2), (0.5, 1, np.inf)])
def test_what_could_not_be_read_is_not_written_and_the_old_file_stays(tmp_path, row):
    path = a_file(tmp_path, "0.5,1,2\n")
    with pytest.raises(RunError, match="line 2: "):
        write_detections(path, a_table([0.5, 1, 2], row))
    assert path.read_text() == "0.5,1,2\n"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = a_file(tmp_path, "0.5,1,2\n")

    def full_disk(table, part, options):
        part.write_text("0.9,")
        raise OSError("no space left")

    monkeypatch.setattr("wsi_pipeline.evaluation.detections.csv.write_csv", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_detections(path, a_table([0.9, 1, 2]))
    assert path.read_text() == "0.5,1,2\n"
    assert list(tmp_path.iterdir()) == [path]


def test_real_detections_of_the_challenge(test_data, tmp_path):
    path = test_data / "ncrf-camelyon16" / "test_001.nms.csv"
    found = read_detections(path, (89_600, 86_016))  # level 6 is 1400 x 1344 px
    assert len(found) == 147
    assert found.iloc[0].tolist() == [0.99993, 15840, 13472]
    assert found.iloc[-1].tolist() == [0.50072, 62944, 18080]
    with path.open() as file:
        rows = [[float(cell) for cell in row] for row in csv.reader(file)]
    assert found.to_numpy().tolist() == sorted(rows, key=lambda row: -row[0])
    write_detections(tmp_path / "again.csv", found)
    assert read_as_the_script_does(tmp_path / "again.csv") == read_as_the_script_does(path)


def test_a_folder_is_read_by_the_slides_names(tmp_path):
    a_file(tmp_path, "0.5,1,2\n", "Tumor_1.csv")
    a_file(tmp_path, "", "normal_1.CSV")
    a_file(tmp_path, "0.25,3,4\n", "test_001.csv")
    a_file(tmp_path, "not read", "README.md")
    a_file(tmp_path, "not read", "Tumor_1.xml")
    a_file(tmp_path, "not read", ".hidden.csv")
    slides = ["Test_001", "Tumor_1", "normal_1"]
    found = detection_files(tmp_path, slides)
    assert list(found) == slides
    assert [path.name for path in found.values()] == ["test_001.csv", "Tumor_1.csv", "normal_1.CSV"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.csv"], "no file for the slides B, c; .*, empty where nothing was detected"),
        (["a.csv", "B.csv", "C.csv", "C.CSV"], "several files for the slides c;"),
    ],
)  # fmt: skip
def test_slides_and_files_that_do_not_pair_are_listed(tmp_path, files, message):
    for name in files:
        a_file(tmp_path, "0.5,1,2\n", name)
    slides = ["a", "B", "c"]
    with pytest.raises(CatalogError, match=message) as error:
        detection_files(tmp_path, slides)
    assert str(error.value).startswith(str(tmp_path))


def test_files_of_no_slide_are_passed_over_and_named(tmp_path, caplog):
    for name in ("a.csv", "B.csv", "b.csv", "a.x.csv", "d.csv"):
        a_file(tmp_path, "0.5,1,2\n", name)
    found = detection_files(tmp_path, ["a", "B"])
    assert [path.name for path in found.values()] == ["a.csv", "B.csv"]
    (told,) = caplog.messages
    assert told == f"{tmp_path}: passed over, of no slide in the table: a.x.csv, b.csv, d.csv"
    with pytest.raises(CatalogError, match="no file for the slides D_;"):
        detection_files(tmp_path, ["a", "B", "D_"])
    assert caplog.messages == [told] * 2  # d.csv may be the one that is missing


def test_a_long_list_of_missing_files_is_cut_and_counted(tmp_path):
    slides = [f"s{number:03d}" for number in range(129)]
    with pytest.raises(CatalogError, match=r"s000, .* s019 and 109 more;"):
        detection_files(tmp_path, slides)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(RunError, match=re.escape(f"{tmp_path / 'x'}: no such folder")):
        detection_files(tmp_path / "x", [])
