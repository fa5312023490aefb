import dataclasses
import hashlib
import json

import pytest
from unit_functions import call

from wsi_pipeline.errors import RunError
from wsi_pipeline.jobs.record import Record, read_done, read_failures
from wsi_pipeline.jobs.unit import Output

UNIT = call("a", "slide a", {"stride_px": 256}, dict)


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
    assert not record.is_done(changed(UNIT, name="b"), 1)
    assert not Record(tmp_path, "heatmap").is_done(UNIT, 1)


def test_a_unit_whose_output_is_gone_is_not_done(tmp_path):
    unit = changed(UNIT, out=Output(tmp_path / "a.parquet"), picture=Output(tmp_path / "a.jpg"))
    record_done(tmp_path, unit)
    assert not Record(tmp_path, "tile").is_done(unit, 1)
    for output in unit.outputs:
        assert not Record(tmp_path, "tile").is_done(unit, 1)
        output.touch()
    assert Record(tmp_path, "tile").is_done(unit, 1)


def test_a_line_holds_key_hash_time_seconds_and_result(tmp_path):
    record_done(tmp_path, UNIT, result={"patches": 7})
    line = json.loads((tmp_path / "done" / "tile.jsonl").read_text())
    # The canonical JSON, written out by hand.
    inputs = '{"inputs":{"stride_px":256},"name":"a","slide_id":"slide a"}'
    text = f'{{"inputs":{inputs},"schema_version":1}}'
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
        record.fail(changed(UNIT, name="b"), error="SlideError", reason="no slide")
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
    record_done(tmp_path, changed(UNIT, name="b"))
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
                record.fail(changed(UNIT, name=key), error="SlideError", reason=f"{stage} {key}")
    rows = [(row.stage, row.slide_id, row.unit, row.error, row.reason)
            for row in read_failures(tmp_path)]  # fmt: skip
    assert rows == [
        ("heatmap", "slide a", "c", "SlideError", "heatmap c"),
        ("tile", "slide a", "b", "SlideError", "tile b"),
    ]


def fail_at(record, key, time, monkeypatch):
    monkeypatch.setattr("wsi_pipeline.jobs.record._now", lambda: time)
    record.fail(changed(UNIT, name=key), error="SlideError", reason=key)


def test_failures_of_units_that_a_run_does_not_touch_can_stay(tmp_path, monkeypatch):
    """Of five that failed earlier: b is tried again, c is done since, e does not count any more.

    d was done in part: its row came with its line, not before it.
    """
    with Record(tmp_path, "explain") as record:
        for key in "abce":
            fail_at(record, key, "2026-01-01T00:00:01+00:00", monkeypatch)
        monkeypatch.setattr("wsi_pipeline.jobs.record._now", lambda: "2026-01-01T00:00:02+00:00")
        record.add(changed(UNIT, name="c"), 1, seconds=0, result={})
        record.add(changed(UNIT, name="d"), 1, seconds=0, result={"failures": ["d"]})
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
