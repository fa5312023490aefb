"""The phantom stage: a cohort goes on where it was, and is not overwritten by another."""

import pytest

from wsi_pipeline.errors import RunError
from wsi_pipeline.stages import phantom

COHORT = {"size": (1100, 1100), "mpp": 1.0}


@pytest.fixture(scope="module")
def cohort(client, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "new/cohort"
    assert phantom.run(out, client, slides=2, seed=1, **COHORT).done == 2
    return out


def content(out):
    return {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("changed", [{"seed": 2}, {"seed": 1, "naevi": 1}])
def test_a_cohort_of_another_plan_is_not_overwritten(cohort, client, changed):
    before = content(cohort)
    with pytest.raises(RunError, match=r"slides/phantom_000\.tif: it was drawn to another plan"):
        phantom.run(cohort, client, slides=2, **COHORT, **changed)
    assert content(cohort) == before


def test_a_slide_that_is_on_no_record_is_not_overwritten(tmp_path, client):
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides/phantom_001.tif").touch()
    with pytest.raises(RunError, match=r"phantom_001\.tif"):
        phantom.run(tmp_path, client, slides=2, seed=1, **COHORT)


@pytest.mark.parametrize("recorded", [1, 0])
def test_a_cohort_of_the_same_plan_goes_on(cohort, client, recorded):
    record = cohort / "done/phantom.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(lines[:recorded]))  # as if killed before others were recorded
    outcome = phantom.run(cohort, client, slides=3, seed=1, **COHORT)
    assert (outcome.done, outcome.skipped, outcome.failed) == (3 - recorded, recorded, 0)
