import dataclasses
import hashlib
import json
import os

import numpy as np
import pytest

from wsi_pipeline.errors import RunError
from wsi_pipeline.jobs.record import (
    Record,
    Unit,
    file_fingerprint,
    hash_inputs,
    read_done,
    read_failures,
)

UNIT = Unit("a", "slide a", {"stride_px": 256}, dict)


def changed(unit, **values):
    return dataclasses.replace(unit, **values)


def record_done(run_dir, *units, result=None, version=1, stage="tile"):
    with Record(run_dir, stage) as record:
        for unit in units:
            record.add(unit, version, seconds=0.5, result=result or {})


def test_a_unit_is_done_under_the_same_inputs_and_schema_version_only(tmp_path):
    record_done(tmp_path, UNIT, result={"patches": 7})
    record = Record(tmp_path, "tile")
    assert record.is_done(UNIT, 1)
    assert record.result("a") == {"patches": 7}
    assert not record.is_done(UNIT, 2)
    assert not record.is_done(changed(UNIT, inputs={"stride_px": 128}), 1)
    assert not record.is_done(changed(UNIT, key="b"), 1)
    assert not Record(tmp_path, "heatmap").is_done(UNIT, 1)


def test_a_unit_whose_output_is_gone_is_not_done(tmp_path):
    unit = changed(UNIT, output=tmp_path / "a.parquet")
    record_done(tmp_path, unit)
    assert not Record(tmp_path, "tile").is_done(unit, 1)
    unit.output.touch()
    assert Record(tmp_path, "tile").is_done(unit, 1)


def test_a_line_holds_key_hash_time_seconds_and_result(tmp_path):
    record_done(tmp_path, UNIT, result={"patches": 7})
    line = json.loads((tmp_path / "done" / "tile.jsonl").read_text())
    # The canonical JSON, written out by hand.
    text = '{"inputs":{"stride_px":256},"schema_version":1}'
    assert line.pop("finished").endswith("+00:00")
    assert line == {
        "key": "a",
        "hash": hashlib.sha256(text.encode()).hexdigest(),
        "seconds": 0.5,
        "result": {"patches": 7},
    }


def test_the_last_line_for_a_key_wins(tmp_path):
    record_done(tmp_path, UNIT, result={"patches": 7})
    redone = changed(UNIT, inputs={"stride_px": 128})
    record_done(tmp_path, redone, result={"patches": 28})
    record = Record(tmp_path, "tile")
    assert record.is_done(redone, 1)
    assert not record.is_done(UNIT, 1)
    assert record.result("a") == {"patches": 28}


def test_what_is_recorded_can_be_read_at_once(tmp_path):
    with Record(tmp_path, "tile") as record:
        record.add(UNIT, 1, seconds=0, result={})
        record.fail(changed(UNIT, key="b"), error="SlideError", reason="no slide")
        assert list(read_done(tmp_path, "tile")) == ["a"]
        assert [row.unit for row in read_failures(tmp_path)] == ["b"]


@pytest.mark.parametrize("torn", [b'{"key": "c", "ha', b'{"key": "\xc3', b"\0\0\0"])
def test_a_line_torn_by_a_kill_is_passed_over_and_cut_off(tmp_path, torn):
    record_done(tmp_path, UNIT)
    path = tmp_path / "done" / "tile.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert list(read_done(tmp_path, "tile")) == ["a"]
    assert path.read_bytes() == whole + torn  # reading changes nothing
    record_done(tmp_path, changed(UNIT, key="b"))
    assert path.read_bytes().startswith(whole + b'{"key": "b"')
    assert list(read_done(tmp_path, "tile")) == ["a", "b"]


@pytest.mark.parametrize("damaged", ["{", "[]", '{"key": "b"}', "7"])
def test_a_damaged_line_is_an_error_that_names_it(tmp_path, damaged):
    record_done(tmp_path, UNIT)
    path = tmp_path / "done" / "tile.jsonl"
    path.write_text(path.read_text() + damaged + "\n")
    with pytest.raises(RunError, match=r"tile\.jsonl, line 2: .* no record"):
        Record(tmp_path, "tile")


def test_failures_of_a_stage_give_way_to_those_of_its_next_run(tmp_path):
    for stage, keys in (("tile", "ab"), ("heatmap", "c"), ("tile", "b")):
        with Record(tmp_path, stage) as record:
            for key in keys:
                record.fail(changed(UNIT, key=key), error="SlideError", reason=f"{stage} {key}")
    rows = [(row.stage, row.slide_id, row.unit, row.error, row.reason)
            for row in read_failures(tmp_path)]  # fmt: skip
    assert rows == [
        ("heatmap", "slide a", "c", "SlideError", "heatmap c"),
        ("tile", "slide a", "b", "SlideError", "tile b"),
    ]


def fail_at(record, key, time, monkeypatch):
    monkeypatch.setattr("wsi_pipeline.jobs.record._now", lambda: time)
    record.fail(changed(UNIT, key=key), error="SlideError", reason=key)


def test_failures_of_units_that_a_run_does_not_touch_can_stay(tmp_path, monkeypatch):
    """Of five that failed earlier: b is tried again, c is done since, e does not count any more.

    d was done in part: its row came with its line, not before it.
    """
    with Record(tmp_path, "explain") as record:
        for key in "abce":
            fail_at(record, key, "2026-01-01T00:00:01+00:00", monkeypatch)
        monkeypatch.setattr("wsi_pipeline.jobs.record._now", lambda: "2026-01-01T00:00:02+00:00")
        record.add(changed(UNIT, key="c"), 1, seconds=0, result={})
        record.add(changed(UNIT, key="d"), 1, seconds=0, result={"failures": ["d"]})
        fail_at(record, "d", "2026-01-01T00:00:02+00:00", monkeypatch)
    with Record(tmp_path, "explain", keep="acd") as record:
        fail_at(record, "b", "2026-01-01T00:00:03+00:00", monkeypatch)
    assert [(row.unit, row.time[18]) for row in read_failures(tmp_path)] == [
        ("a", "1"), ("d", "2"), ("b", "3"),
    ]  # fmt: skip


def test_a_run_without_failures_leaves_the_header(tmp_path):
    record_done(tmp_path, UNIT)
    header = "stage,slide_id,unit,error,reason,time\n"
    assert (tmp_path / "failures.csv").read_text() == header
    assert read_failures(tmp_path) == []


def test_an_interrupted_run_keeps_earlier_failures_and_its_own(tmp_path):
    with Record(tmp_path, "tile") as record:
        record.fail(UNIT, error="SlideError", reason="earlier")
    with pytest.raises(KeyboardInterrupt), Record(tmp_path, "tile") as record:
        record.fail(UNIT, error="SlideError", reason="own")
        raise KeyboardInterrupt
    assert [row.reason for row in read_failures(tmp_path)] == ["earlier", "own"]


def test_a_reason_with_lines_quotes_and_commas_is_one_row(tmp_path):
    with Record(tmp_path, "tile") as record:
        record.fail(UNIT, error="SlideError", reason='"a", b:\r\n  Grüße\u2028c\n')
    assert (tmp_path / "failures.csv").read_text().count("\n") == 2
    assert [row.reason for row in read_failures(tmp_path)] == ['"a", b: Grüße c']


def test_a_torn_row_of_failures_is_cut_off(tmp_path):
    with Record(tmp_path, "tile") as record:
        record.fail(UNIT, error="SlideError", reason="whole")
    path = tmp_path / "failures.csv"
    path.write_text(path.read_text() + 'tile,slide b,b,SlideError,"tor')
    assert [row.reason for row in read_failures(tmp_path)] == ["whole"]
    with Record(tmp_path, "heatmap") as record:
        record.fail(UNIT, error="RunError", reason="next")
        assert [row.reason for row in read_failures(tmp_path)] == ["whole", "next"]


@pytest.mark.parametrize("text", ["slide,why\n", "stage,slide_id,unit,error,reason,time\na,b\n"])
def test_another_table_named_failures_is_an_error(tmp_path, text):
    (tmp_path / "failures.csv").write_text(text)
    with pytest.raises(RunError, match=r"failures\.csv does not hold the columns"):
        read_failures(tmp_path)


def test_the_hash_ignores_the_order_of_keys_and_nothing_else():
    assert hash_inputs({"a": 1, "b": [1, 2]}) == hash_inputs({"b": (1, 2), "a": 1})
    values = [{"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": None}, {"a": [1]}, {"b": 1}, {}]
    assert len({hash_inputs(inputs) for inputs in values}) == len(values)


@pytest.mark.parametrize("value", [np.float32(1), {1, 2}, b"a", object()])
def test_values_without_a_stable_text_are_not_hashed(value):
    with pytest.raises(TypeError):
        hash_inputs({"a": value})


def test_a_slide_is_known_by_size_and_time_and_a_small_file_by_content(tmp_path):
    slide = tmp_path / "slide"
    slide.write_bytes(b"pixels")
    by_time, by_content = file_fingerprint(slide), file_fingerprint(slide, content=True)
    assert by_content == hashlib.sha256(b"pixels").hexdigest()
    os.utime(slide, ns=(0, 1))
    assert file_fingerprint(slide) != by_time
    assert file_fingerprint(slide, content=True) == by_content
    slide.write_bytes(b"pixelz")
    assert file_fingerprint(slide, content=True) != by_content


def test_a_missing_file_has_a_fingerprint_so_that_opening_it_can_fail_elsewhere(tmp_path):
    assert file_fingerprint(tmp_path / "none") == "unreadable"
    assert file_fingerprint(tmp_path, content=True) == "unreadable"
