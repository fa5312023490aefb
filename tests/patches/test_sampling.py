import time
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from wsi_pipeline.errors import RunError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.patches.index import PatchIndex
from wsi_pipeline.patches.sampling import PatchPool, _below, draw

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


@settings(deadline=None, max_examples=50)
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
