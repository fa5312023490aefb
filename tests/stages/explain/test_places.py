"""Places of the run made by hand, see explain_run.py."""

import shutil

from explain_run import write_lesions

from wsi_pipeline.stages.explain.places import annotated_patches, evaluated_places
from wsi_pipeline.stages.run_directory import evaluation_folder, index_path


def places(run, top):
    return [(p.kind, p.x, p.y, p.lesion_id) for p in evaluated_places(run, "net", top)]


def test_places_are_the_patches_with_the_highest_probability_there(run):
    """Lesion 1 has cells of 0.9, 0.95 and 0.6; the detection at (48, 208) is cell (6, 1)'s."""
    wrong = ("false-positive", 32 * 1 - 16, 32 * 6 - 16, None)
    missed = ("missed", 32 * 6 - 16, 32 * 1 - 16, 2)
    hit = ("hit", 32 * 4 - 16, 32 * 3 - 16, 1)
    assert places(run, 1) == [wrong, missed, hit]
    second = ("false-positive", 32 * 6 - 16, 32 * 6 - 16, None)
    assert places(run, 2) == [wrong, second, missed, hit]


def test_without_missed_lesions_the_lowest_found_ones_stand_in(run):
    write_lesions(evaluation_folder(run, "net"), "found")
    assert [(kind, lesion) for kind, *_, lesion in places(run, 1)] == [
        ("false-positive", None), ("lowest", 2), ("hit", 1),
    ]  # fmt: skip


def test_patches_that_rank_are_those_partly_annotated(run):
    """Beside cell (3, 3), which is all tumour, and lesion 2 within cell (1, 6)."""
    found = annotated_patches(run, "net", 10, seed=0)
    cells = {((p.y + 16) // 32, (p.x + 16) // 32) for p in found}
    assert cells == {(3, 4), (4, 3), (4, 4), (1, 6)}
    assert annotated_patches(run, "net", 10, seed=0) == found
    assert annotated_patches(run, "net", 2, seed=0) == found[:2]


def test_slides_take_turns_in_ranking(run):
    """A second slide like the first: they come by turns, four of each."""
    folder = evaluation_folder(run, "net")
    shutil.copy(folder / "slides/s.parquet", folder / "slides/t.parquet")
    shutil.copy(index_path(run, "s"), index_path(run, "t"))
    (folder / "slides.csv").write_text("split,slide_id,label\ntest,t,1\ntest,s,1\ntrain,u,1\n")
    for seed in range(5):
        found = [place.slide_id for place in annotated_patches(run, "net", 3, seed)]
        assert found == ["s", "t", "s"]
    assert len(annotated_patches(run, "net", 10, seed=0)) == 8
