import hashlib
import os
import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict, Field

from wsi_pipeline.jobs.unit import (
    LargeFile,
    Output,
    SmallFile,
    Unhashed,
    Unit,
    hash_inputs,
    state_of,
)


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True)

    stride_px: int = 256
    batch_size: int = Field(32, json_schema_extra={"changes_result": False})


@dataclass(frozen=True)
class Model:
    weights: str
    folder: Unhashed[str]


@dataclass(frozen=True)
class Predict(Unit):
    slide: LargeFile
    annotation: SmallFile | None
    settings: Settings
    model: Model
    chunk: Unhashed[int]
    out: Output

    def run(self):
        return {}


@pytest.fixture
def unit(tmp_path):
    (tmp_path / "s.svs").write_bytes(b"pixels")
    (tmp_path / "s.xml").write_bytes(b"outlines")
    return Predict(
        "s", LargeFile.at(tmp_path / "s.svs"), SmallFile.at(tmp_path / "s.xml"), Settings(),
        Model("abc", "models/a"), 3, Output("s.zarr"),
    )  # fmt: skip


def test_each_type_of_field_enters_the_hash_in_its_own_way(unit, tmp_path):
    stat = (tmp_path / "s.svs").stat()
    assert state_of(unit) == {
        "slide_id": "s",
        "slide": {"state": f"6 bytes, {stat.st_mtime_ns} ns"},
        "annotation": {"state": hashlib.sha256(b"outlines").hexdigest()},
        "settings": {"stride_px": 256},
        "model": {"weights": "abc"},
    }
    assert unit.hash(1) == hash_inputs({"schema_version": 1, "inputs": state_of(unit)})


def test_what_says_how_or_where_does_not_change_the_hash(unit, tmp_path):
    moved = tmp_path / "elsewhere.xml"
    moved.write_bytes(b"outlines")
    for other in (
        replace(unit, chunk=4),
        replace(unit, out=Output("elsewhere.zarr")),
        replace(unit, settings=Settings(batch_size=4)),
        replace(unit, model=Model("abc", "models/b")),
        replace(unit, annotation=SmallFile.at(moved)),
    ):
        assert other.hash(1) == unit.hash(1)


def test_whatever_else_changes_it(unit, tmp_path):
    os.utime(tmp_path / "s.svs", ns=(0, 1))
    (tmp_path / "s.xml").write_bytes(b"outlinez")
    others = [
        replace(unit, slide_id="t"),
        replace(unit, slide=LargeFile.at(tmp_path / "s.svs")),
        replace(unit, annotation=SmallFile.at(tmp_path / "s.xml")),
        replace(unit, annotation=None),
        replace(unit, settings=Settings(stride_px=128)),
        replace(unit, model=Model("abd", "models/a")),
    ]
    hashes = {other.hash(1) for other in [unit, *others]} | {unit.hash(2)}
    assert len(hashes) == len(others) + 2


def test_the_state_of_a_file_is_that_of_when_the_unit_was_made(unit, tmp_path):
    before = unit.hash(1)
    (tmp_path / "s.xml").write_bytes(b"drawn anew")
    assert unit.hash(1) == before
    assert pickle.loads(pickle.dumps(unit)).hash(1) == before


def test_a_path_in_place_of_a_file_is_refused(unit):
    """Its text would be hashed, and the file's content forgotten."""
    with pytest.raises(TypeError, match=r"Predict\.annotation is 's\.xml', not a SmallFile"):
        replace(unit, annotation="s.xml").hash(1)
    with pytest.raises(TypeError, match="not a LargeFile"):
        replace(unit, slide=unit.annotation).hash(1)


class Idle(Unit):
    """A unit without outputs."""

    def run(self):
        return {}


def test_a_unit_that_does_no_work_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Unit("s")


def test_a_units_outputs_are_those_that_it_names(unit, tmp_path):
    assert [str(path) for path in unit.outputs] == ["s.zarr"]
    assert Idle("s").outputs == ()
    assert Idle("s").key == "s"


def test_the_hash_ignores_the_order_of_keys_and_nothing_else():
    assert hash_inputs({"a": 1, "b": [1, 2]}) == hash_inputs({"b": (1, 2), "a": 1})
    values = [{"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": None}, {"a": [1]}, {"b": 1}, {}]
    assert len({hash_inputs(inputs) for inputs in values}) == len(values)


@pytest.mark.parametrize("value", [np.float32(1), {1, 2}, b"a", object()])
def test_values_without_a_stable_text_are_not_hashed(value):
    for refuse in (state_of, hash_inputs):
        with pytest.raises(TypeError):
            refuse({"a": value})


def test_a_large_file_is_known_by_size_and_time_and_a_small_one_by_content(tmp_path):
    path = tmp_path / "slide"
    path.write_bytes(b"pixels")
    large, small = LargeFile.at(path), SmallFile.at(path)
    assert small.state == hashlib.sha256(b"pixels").hexdigest()
    os.utime(path, ns=(0, 1))
    assert LargeFile.at(path) != large
    assert SmallFile.at(path) == small
    path.write_bytes(b"pixelz")
    assert SmallFile.at(path) != small


def test_a_missing_file_has_a_state_so_that_opening_it_can_fail_elsewhere(tmp_path):
    assert LargeFile.at(tmp_path / "none").state == "unreadable"
    assert SmallFile.at(tmp_path).state == "unreadable"
