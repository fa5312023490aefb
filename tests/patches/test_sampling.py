import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from wsi_pipeline.errors import RunError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.patches.index import PatchIndex
from wsi_pipeline.patches.sampling import (
    PatchPool,
    _below,
    add_hard_negatives,
    draw,
    read_hard_negatives,
)

N = 1_000_000
# (patches labelled 0, 1, -1) of each slide: very uneven, labels missing, one slide of no use
COUNTS = [(5000, 3, 0), (40, 0, 7), (0, 0, 9), (1, 700, 0), (300, 1, 2), (0, 12, 0), (90, 60, 0)]


def an_index(slide, counts, patch_px=512):
    """Patches of slide 7: x = 7, y = 0, 1, 2 ..., the labels in mixed order."""
    label = np.random.default_rng(slide).permutation(np.repeat([0, 1, -1], counts))
    columns = {
        "x": np.full(len(label), slide, np.int32),
        "y": np.arange(len(label), dtype=np.int32),
        "label": label.astype(np.int8),
    }
    grid = PatchGrid(Bounds(0, 0, 10_000, 10_000), mpp=0.25, downsample=1, patch_px=patch_px)
    return PatchIndex(f"slide_{slide}", grid, pa.table(columns))


@pytest.fixture(scope="module")
def pool():
    return PatchPool.from_indexes(an_index(s, counts) for s, counts in enumerate(COUNTS))


@pytest.fixture(scope="module")
def draws(pool):
    return draw(pool, seed=3, name="train", first=0, count=N)


def assert_same(left, right):
    for field in ("label", "slide", "x", "y"):
        np.testing.assert_array_equal(getattr(left, field), getattr(right, field))
        assert getattr(left, field).dtype == getattr(right, field).dtype


def assert_uniform(values, support):
    found, counts = np.unique(values, return_counts=True)
    np.testing.assert_array_equal(found, support)
    assert len(support) == 1 or chisquare(counts).pvalue > 1e-3


def test_pool_holds_exactly_the_labelled_patches(pool):
    assert pool.slide_ids == tuple(f"slide_{s}" for s in range(len(COUNTS)))
    np.testing.assert_array_equal(pool.labels, [0, 1])
    np.testing.assert_array_equal(pool.group_slide, [0, 1, 3, 4, 6, 0, 3, 4, 5, 6])
    np.testing.assert_array_equal(
        np.diff(pool.group_start), [5000, 40, 1, 300, 90, 3, 700, 1, 12, 60]
    )
    np.testing.assert_array_equal(pool.x, np.repeat(pool.group_slide, np.diff(pool.group_start)))


def test_label_of_every_draw_is_the_label_of_its_patch(pool, draws):
    labels = [an_index(s, counts).table["label"].to_numpy() for s, counts in enumerate(COUNTS)]
    np.testing.assert_array_equal(draws.slide, draws.x)
    for slide in np.unique(draws.slide):
        of_slide = draws.slide == slide
        np.testing.assert_array_equal(
            labels[slide][draws.y[of_slide]], draws.label[of_slide], err_msg=f"slide {slide}"
        )


def test_step_1_labels_are_uniform(draws):
    assert_uniform(draws.label, [0, 1])


@pytest.mark.parametrize(("label", "slides"), [(0, [0, 1, 3, 4, 6]), (1, [0, 3, 4, 5, 6])])
def test_step_2_slides_that_hold_the_label_are_uniform(draws, label, slides):
    assert_uniform(draws.slide[draws.label == label], slides)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("slide", [0, 3, 6])
def test_step_3_patches_of_slide_and_label_are_uniform(draws, label, slide):
    labels = an_index(slide, COUNTS[slide]).table["label"].to_numpy()
    chosen = (draws.label == label) & (draws.slide == slide)
    assert_uniform(draws.y[chosen], np.flatnonzero(labels == label))


def test_successive_draws_are_independent(draws):
    table = np.zeros((len(COUNTS), len(COUNTS)))
    np.add.at(table, (draws.slide[1:], draws.slide[:-1]), 1)
    used = np.flatnonzero(table.any(axis=0))
    assert chi2_contingency(table[np.ix_(used, used)]).pvalue > 1e-3


@settings(max_examples=50)
@given(cuts=st.lists(st.integers(0, 200)), start=st.integers(0, 2**62))
def test_any_partition_gives_the_same_draws(pool, cuts, start):
    whole = draw(pool, seed=1, name="train", first=start, count=200)
    bounds = [0, *sorted(cuts), 200]
    parts = [
        draw(pool, seed=1, name="train", first=start + a, count=b - a) for a, b in pairwise(bounds)
    ]
    for field in ("label", "slide", "x", "y"):
        np.testing.assert_array_equal(
            np.concatenate([getattr(part, field) for part in parts]), getattr(whole, field)
        )


@pytest.mark.parametrize(("seed", "name"), [(4, "train"), (3, "validation"), (3, "train2")])
def test_other_seed_or_name_is_another_sequence(pool, draws, seed, name):
    other = draw(pool, seed=seed, name=name, first=0, count=N)
    both_slide_0 = (draws.slide == 0) & (other.slide == 0) & (draws.label == 0) & (other.label == 0)
    share_equal = np.mean(draws.y[both_slide_0] == other.y[both_slide_0])
    assert share_equal < 10 / 5000  # by chance 1 / 5000


def test_draws_are_with_replacement(pool):
    few = PatchPool.from_indexes([an_index(0, (2, 1, 0))])
    assert len(draw(few, seed=0, name="train", first=0, count=50).x) == 50


def test_first_draws_never_change(pool):
    """A run begun with one version of the package can be resumed with the next."""
    first = draw(pool, seed=0, name="train", first=0, count=6)
    np.testing.assert_array_equal(first.label, [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(first.slide, [3, 4, 5, 1, 0, 0])
    np.testing.assert_array_equal(first.y, [318, 139, 1, 37, 3710, 2321])


@given(word=st.integers(0, 2**64 - 1), n=st.integers(1, 2**32))
def test_multiply_shift_is_exact(word, n):
    result = _below(np.array([n], np.int64), np.array([word], np.uint64))
    assert result[0] == word * n >> 64


def test_one_label_alone_is_drawn_always():
    pool = PatchPool.from_indexes([an_index(0, (0, 5, 3)), an_index(1, (0, 2, 0))])
    draws = draw(pool, seed=0, name="train", first=0, count=1000)
    assert set(draws.label) == {1}
    assert set(draws.slide) == {0, 1}


def test_pool_without_a_known_label_is_refused():
    with pytest.raises(RunError, match="2 slides has a known label"):
        PatchPool.from_indexes([an_index(0, (0, 0, 5)), an_index(1, (0, 0, 0))])


def test_pool_of_two_patch_sizes_is_refused():
    with pytest.raises(RunError, match=r"\[256, 512\] px"):
        PatchPool.from_indexes([an_index(0, (1, 1, 0)), an_index(1, (1, 1, 0), patch_px=256)])


def test_slide_given_twice_is_refused():
    with pytest.raises(RunError, match=r"\['slide_0'\] come twice"):
        PatchPool.from_indexes([an_index(0, (1, 1, 0)), an_index(0, (1, 1, 0))])


# Hard negatives of each slide, of which 7 is in no split that is trained on: (0, 1, -1) patches.
OTHER = (50, 4, 3)
HARD = {0: 200, 1: 3, 7: 20}
SHARE = 0.3


def labelled(slide, label):
    """``y`` of the patches of a slide with a label; their x is the slide's number."""
    index = an_index(slide, OTHER if slide == 7 else COUNTS[slide])
    return np.flatnonzero(index.table["label"].to_numpy() == label)


def a_hard_table(patches):
    """Rows of ``{slide: [y, ...]}``."""
    rows = [(f"slide_{slide}", slide, y) for slide, ys in patches.items() for y in ys]
    table = pd.DataFrame(rows, columns=["slide_id", "x", "y"])
    return table.astype({"slide_id": "str", "x": np.int32, "y": np.int32})


def with_hard(pool, patches, share=SHARE, slides=(0, 1, 7)):
    indexes = (an_index(slide, OTHER if slide == 7 else COUNTS[slide]) for slide in slides)
    table = a_hard_table(patches)
    return add_hard_negatives(pool, table, indexes, share=share, path="hard.parquet")


@pytest.fixture(scope="module")
def hard_patches():
    """Every so manieth of the patches without tumour, slides and patches in mixed order."""
    rng = np.random.default_rng(7)
    return {slide: rng.permutation(labelled(slide, 0))[:n] for slide, n in [*HARD.items()][::-1]}


@pytest.fixture(scope="module")
def hard_pool(pool, hard_patches):
    return with_hard(pool, hard_patches)


@pytest.fixture(scope="module")
def hard_draws(hard_pool):
    return draw(hard_pool, seed=3, name="train", first=0, count=N)


def test_hard_negatives_change_no_label_and_no_tumour_patch(draws, hard_draws):
    np.testing.assert_array_equal(hard_draws.label, draws.label)
    for field in ("slide", "x", "y"):
        np.testing.assert_array_equal(
            getattr(hard_draws, field)[draws.label == 1], getattr(draws, field)[draws.label == 1]
        )


def test_draws_without_tumour_follow_both_laws_in_their_shares(hard_draws, hard_patches):
    """Share s: slide of 3, patch of its rows; 1 - s: slide of 5 with label 0, patch of them."""
    ordinary = [slide for slide, counts in enumerate(COUNTS) if counts[0]]
    assert len(ordinary) == 5
    expected = {}
    for slide in ordinary:
        for y in labelled(slide, 0):
            expected[slide, y] = (1 - SHARE) / 5 / COUNTS[slide][0]
    for slide, ys in hard_patches.items():
        for y in ys:
            expected[slide, y] = expected.get((slide, y), 0) + SHARE / 3 / HARD[slide]
    assert sum(expected.values()) == pytest.approx(1)

    without = hard_draws.label == 0
    np.testing.assert_array_equal(hard_draws.slide[without], hard_draws.x[without])
    drawn = pd.MultiIndex.from_arrays([hard_draws.slide[without], hard_draws.y[without]])
    counts = drawn.value_counts()
    assert set(counts.index) <= set(expected)
    expected = pd.Series(expected) * without.sum()
    assert expected.min() > 5  # as the test below needs
    assert chisquare(counts.reindex(expected.index, fill_value=0), expected).pvalue > 1e-3


def test_draws_that_are_not_replaced_are_those_of_the_pool_alone(draws, hard_draws, hard_patches):
    changed = (hard_draws.slide != draws.slide) | (hard_draws.y != draws.y)
    drawn = pd.MultiIndex.from_arrays([hard_draws.slide[changed], hard_draws.y[changed]])
    table = a_hard_table(hard_patches)
    assert drawn.isin(pd.MultiIndex.from_frame(table[["x", "y"]])).all()
    # Of the half without tumour the share is replaced, now and then by the same patch.
    assert changed.mean() == pytest.approx(SHARE / 2, abs=0.002)  # 5 standard deviations


def test_whether_a_draw_is_replaced_is_independent_of_the_draw_before(hard_draws):
    replaced = (hard_draws.slide == 7).astype(int)
    table = np.zeros((2, 2))
    np.add.at(table, (replaced[1:], replaced[:-1]), 1)
    assert chi2_contingency(table).pvalue > 1e-3


def test_share_0_draws_as_the_pool_alone_and_share_1_never_so(pool, draws, hard_patches):
    none = draw(with_hard(pool, hard_patches, 0.0), seed=3, name="train", first=0, count=N)
    assert_same(none, draws)
    every = draw(with_hard(pool, hard_patches, 1.0), seed=3, name="train", first=0, count=N)
    without = every.label == 0
    assert_uniform(every.slide[without], sorted(HARD))
    for slide, ys in hard_patches.items():
        assert_uniform(every.y[without & (every.slide == slide)], np.sort(ys))


@settings(max_examples=50)
@given(cuts=st.lists(st.integers(0, 200)), start=st.integers(0, 2**62))
def test_any_partition_gives_the_same_hard_negatives(hard_pool, cuts, start):
    """So the draws do not depend on the number of loader workers, processes or resumptions."""
    whole = draw(hard_pool, seed=1, name="train", first=start, count=200)
    bounds = [0, *sorted(cuts), 200]
    parts = [
        draw(hard_pool, seed=1, name="train", first=start + a, count=b - a)
        for a, b in pairwise(bounds)
    ]
    for field in ("label", "slide", "x", "y"):
        np.testing.assert_array_equal(
            np.concatenate([getattr(part, field) for part in parts]), getattr(whole, field)
        )


def test_first_hard_draws_never_change(hard_pool):
    first = draw(hard_pool, seed=0, name="train", first=0, count=6)
    np.testing.assert_array_equal(first.label, [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(first.slide, [3, 4, 5, 1, 0, 0])
    np.testing.assert_array_equal(first.y, [318, 139, 1, 37, 1882, 4423])


def test_hard_negatives_take_8_bytes_each(pool):
    hard = with_hard(pool, {0: labelled(0, 0)}, slides=[0]).hard
    held = sum(value.nbytes for value in vars(hard).values() if isinstance(value, np.ndarray))
    assert held / 5000 < 8.01  # with the pool, under 16 a patch even if all without tumour are hard


def test_slides_of_hard_negatives_alone_are_appended_to_the_pools(pool, hard_pool):
    assert hard_pool.slide_ids == (*pool.slide_ids, "slide_7")
    assert len(hard_pool.grids) == len(hard_pool.slide_ids)
    assert hard_pool.hard.slide.tolist() == [0, 1, 7]
    assert hard_pool.x is pool.x  # nothing of the pool is copied


def test_indexes_of_other_slides_are_passed_over(pool, hard_patches, hard_pool):
    more = with_hard(pool, hard_patches, slides=(0, 1, 2, 4, 7))
    assert more.slide_ids == hard_pool.slide_ids
    np.testing.assert_array_equal(more.hard.slide, hard_pool.hard.slide)
    np.testing.assert_array_equal(more.hard.x, hard_pool.hard.x)


@pytest.mark.parametrize(
    ("slide", "label", "fault"),
    [
        (0, 1, "1 rows are tumour patches"),
        (1, -1, "1 rows are patches of unknown label"),
        (7, 1, "1 rows are tumour patches"),
        (0, None, "1 rows are no patches of their slide"),
        (4, 0, "1 rows are of unknown slides"),  # its index is not given
    ],
)
def test_what_is_no_patch_without_tumour_is_refused_by_row(pool, slide, label, fault):
    y = 99_999 if label is None else labelled(slide, label)[0]
    patches = {1: labelled(1, 0)[:3], slide: [*(labelled(1, 0)[:3] if slide == 1 else []), y]}
    message = rf"^hard\.parquet: {fault}: 3 \(slide slide_{slide}, x {slide}, y {y}\);"
    with pytest.raises(RunError, match=message):
        with_hard(pool, patches)


def test_hard_negatives_of_another_patch_size_are_refused(pool):
    index = an_index(7, OTHER, patch_px=256)
    table = a_hard_table({7: labelled(7, 0)[:1]})
    with pytest.raises(RunError, match=r"\[256, 512\] px"):
        add_hard_negatives(pool, table, [index], share=SHARE, path="hard.parquet")


def test_a_table_of_hard_negatives_is_read_from_parquet(tmp_path):
    path = tmp_path / "hard.parquet"
    written = a_hard_table({3: [5, 1], 0: [2]})
    pq.write_table(
        pa.table(
            {
                "score": [0.9, 0.8, 0.7],
                "y": pa.array(written["y"], pa.int64()),
                "x": pa.array(written["x"], pa.int64()),
                "slide_id": pa.array(written["slide_id"]).dictionary_encode(),
            }
        ),
        path,
    )
    pd.testing.assert_frame_equal(read_hard_negatives(path, test_slides={"slide_9"}), written)


def test_rows_of_the_test_split_are_refused(tmp_path):
    path = tmp_path / "hard.parquet"
    a_hard_table({3: [5], 0: range(7), 4: [1]}).to_parquet(path)
    first, fifth = r"1 \(slide slide_0, x 0, y 0\)", r"5 \(slide slide_0, x 0, y 4\)"
    with pytest.raises(
        RunError, match=rf"7 rows are of the test split: {first}, .*, {fifth} \.\.\."
    ):
        read_hard_negatives(path, test_slides={"slide_0", "slide_9"})


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        (
            {"slide_id": ["a"], "x": [1]},
            "no table of hard negatives with the columns slide_id, x, y",
        ),
        ({"slide_id": ["a"], "x": [1], "y": [0.5]}, "no table of hard negatives"),
        ({"slide_id": ["a"], "x": [1], "y": [2**40]}, "no table of hard negatives"),
        (
            {"slide_id": ["a", "b"], "x": [1, None], "y": [1, 1]},
            r"1 rows lack a value: 1 \(slide b",
        ),
        ({"slide_id": ["a", None], "x": [1, 1], "y": [1, 1]}, "1 rows lack a value: 1 "),
        (
            {"slide_id": ["a", "b", "a"], "x": [1, 1, 1], "y": [2, 2, 2]},
            r"2 rows name a patch more than once: 0 \(slide a, x 1, y 2\), 2 \(",
        ),
        ({"slide_id": pa.array([], pa.string()), "x": [], "y": []}, "holds no hard negative"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path, columns, fault):
    path = tmp_path / "hard.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(RunError, match=f"^{path}: {fault}"):
        read_hard_negatives(path, test_slides=())


@pytest.mark.parametrize("content", [None, b"slide_id,x,y"])
def test_a_missing_or_damaged_table_is_named(tmp_path, content):
    path = tmp_path / "hard.parquet"
    if content:
        path.write_bytes(content)
    with pytest.raises(RunError, match=f"^{path}: no table of hard negatives"):
        read_hard_negatives(path, test_slides=())


MEMORY = """
import resource
import numpy as np, pyarrow as pa
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.patches.index import PatchIndex
from wsi_pipeline.patches.sampling import PatchPool

GRID = PatchGrid(Bounds(0, 0, 10_000, 10_000), mpp=0.25, downsample=1)

def index(number):
    place, label = np.arange(10_000, dtype=np.int32), np.arange(10_000, dtype=np.int8) % 10 == 0
    columns = {"x": place, "y": place, "label": label.astype(np.int8)}
    return PatchIndex(str(number), GRID, pa.table(columns))

def peak_kb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

PatchPool.from_indexes(index(number) for number in range(50))
before = peak_kb()
PatchPool.from_indexes(index(number) for number in range(1000))
print(peak_kb() - before)
"""


def test_gathering_takes_12_bytes_a_patch_of_the_process_too():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    # Of 950 slides more: 8 bytes that are kept, and x or y once more while its parts are joined.
    assert int(done.stdout) * 1024 / (950 * 10_000) < 14


def test_the_lectures_cohort_takes_under_16_bytes_a_patch_and_draws_fast(capsys):
    """7,878,675 patches over 698 slides, of which a third hold 2 % tumour."""
    sizes = np.random.default_rng(0).lognormal(sigma=1, size=698)
    sizes = np.diff(np.round(np.cumsum(sizes) / sizes.sum() * 7_878_675), prepend=0).astype(int)
    pool = PatchPool.from_indexes(
        an_index(s, (n - n // 50, n // 50, 0) if s % 3 == 0 else (n, 0, 0))
        for s, n in enumerate(sizes)
    )
    assert len(pool.x) == 7_878_675
    held = sum(value.nbytes for value in vars(pool).values() if isinstance(value, np.ndarray))
    assert held / len(pool.x) < 8.01
    start = time.perf_counter()
    draw(pool, seed=0, name="train", first=0, count=N)
    per_second = N / (time.perf_counter() - start)
    with capsys.disabled():
        print(f"\n{held / len(pool.x):.4f} bytes a patch, {per_second:,.0f} draws a second")
