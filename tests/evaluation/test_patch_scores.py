import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.patch_scores import read_scores, read_slide_scores, write_scores


@pytest.fixture
def scored(tmp_path):
    """Scores of slides b (two patches, one of them on lesions 1 and 2), a (one), e (none)."""
    (tmp_path / "slides").mkdir()
    for name, scores, lesions in (
        ("b", [0.5, 0.25], [[], [1, 2]]),
        ("a", [np.nan], [[]]),
        ("e", [], []),
    ):
        columns = {
            "label": pa.array([0] * len(scores), pa.int8()),
            "lesions": pa.array(lesions, pa.list_(pa.int32())),
        }
        write_scores(tmp_path, name, pa.table(columns), np.array(scores, np.float32))
    return tmp_path


def test_patches_are_read_in_the_order_of_their_slides_at_a_few_bytes_each(scored):
    patches = read_scores(scored, ["b", "a", "e"])
    assert patches["slide_id"].tolist() == ["b", "b", "a"]
    assert patches["slide_id"].cat.categories.tolist() == ["b", "a", "e"]
    # label int8, score float32, slide_id int8 at three slides
    assert [patches[name].to_numpy().itemsize for name in ("label", "score")] == [1, 4]
    assert patches["slide_id"].cat.codes.dtype == np.int8


def test_only_the_patches_asked_for_are_read(scored):
    on_lesions = pc.list_value_length(pc.field("lesions")) > 0
    patches = read_scores(scored, ["b", "a", "e"], ("lesions", "score"), on_lesions)
    assert [row.lesions.tolist() for row in patches.itertuples()] == [[1, 2]]
    assert patches["slide_id"].tolist() == ["b"] and patches["score"].tolist() == [0.25]


def test_a_slides_score_is_its_best_patch(scored):
    # a has a patch, which could not be read; e has none.
    np.testing.assert_equal(read_slide_scores(scored, ["b", "a", "e"]), [0.5, np.nan, -np.inf])


def test_scores_that_are_missing_or_damaged_are_named(scored):
    (scored / "slides" / "a.parquet").write_text("no Parquet")
    for slide_id in ("a", "nowhere"):
        path = re.escape(str(scored / "slides" / f"{slide_id}.parquet"))
        with pytest.raises(RunError, match=f"{path}: no readable scores: .*run the evaluate"):
            read_scores(scored, ["b", slide_id])
