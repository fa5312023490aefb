"""Three-step sampling of training patches: a label, then a slide, then a patch (Lecture).

Beyond the Lecture, a share of the draws without tumour can come from *hard negatives*: patches
that an earlier model took for tumour. Everything else is drawn as without them.

A draw is a pure function of (seed, name, draw number). The counter-based generator Philox gives
one block of four 64-bit words for each value of its counter; draw ``i`` takes block ``i``. So any
process computes any draw on its own, in constant time, and loader workers, ranks and resumed
runs agree without exchanging state.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from wsi_pipeline.errors import RunError
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.patches.index import PatchIndex

LABELS = (0, 1)
MAX_MPP_RATIO = 1.2
"""Working resolutions further apart than this factor do not train or validate one model."""
HARD_COLUMNS = pa.schema({"slide_id": pa.string(), "x": pa.int32(), "y": pa.int32()})
LISTED = 5
"""As many rows stand in a message."""


@dataclass(frozen=True, eq=False)
class HardNegatives:
    """Patches without tumour that are drawn more often, sorted by slide: 8 bytes a patch.

    Parameters
    ----------
    share : float
        In [0, 1]: the part of the draws without tumour that is drawn from here.
    x, y : int32 arrays, shape (H,)
        Upper left corners of the patches, level-0 px.
    start : int64 array, shape (M + 1,)
        The slides' patches: ``start[m]:start[m + 1]``, at least one each.
    slide : int32 array, shape (M,)
        Positions in the pool's `slide_ids`.
    """

    share: float
    x: np.ndarray
    y: np.ndarray
    start: np.ndarray
    slide: np.ndarray


@dataclass(frozen=True, eq=False)
class PatchPool:
    """Every labelled patch of some slides, sorted by label, then slide: 8 bytes a patch.

    The patches of one label in one slide are a *group*, a slice of ``x`` and ``y``; the groups
    of one label are a slice of the groups. Only groups that hold a patch exist, so each step of
    the sampling picks a number within a slice, whatever the slides' sizes.

    Parameters
    ----------
    slide_ids : tuple of str, length S
        In the order given, which the draws depend on.
    grids : tuple of PatchGrid, length S
        How each slide's patches are read.
    x, y : int32 arrays, shape (N,)
        Upper left corners of the patches, level-0 px.
    group_start : int64 array, shape (G + 1,)
        Group ``g`` is patches ``group_start[g]:group_start[g + 1]``.
    group_slide : int32 array, shape (G,)
        Each group's slide, a position in `slide_ids`.
    labels : int8 array, shape (L,)
        The labels present, of 0 and 1.
    label_start : int64 array, shape (L + 1,)
        ``labels[l]`` has groups ``label_start[l]:label_start[l + 1]``.
    hard : HardNegatives, optional
        Their slides come in `slide_ids` and `grids` too, if only there.
    """

    slide_ids: tuple[str, ...]
    grids: tuple[PatchGrid, ...]
    x: np.ndarray
    y: np.ndarray
    group_start: np.ndarray
    group_slide: np.ndarray
    labels: np.ndarray
    label_start: np.ndarray
    hard: HardNegatives | None = None

    @classmethod
    def from_indexes(cls, indexes: Iterable[PatchIndex]) -> "PatchPool":
        """Gather the patches with a known label (0 or 1; -1 is left out).

        Parameters
        ----------
        indexes : iterable of PatchIndex
            One for each slide, in an order that does not change between runs. Taken one at a
            time; gathering needs 12 bytes a patch and one index at its peak.

        Raises
        ------
        RunError
            If no patch has a known label, a slide comes twice, or the patches differ in size.
        """
        slide_ids, grids, groups = [], [], []
        # Arrays that grow in place, where pieces would leave holes in memory as they are joined.
        xs, ys = ({label: array("i") for label in LABELS} for _ in range(2))
        for slide, index in enumerate(indexes):
            slide_ids.append(index.slide_id)
            grids.append(index.grid)
            x, y, label = (index.table[name].to_numpy() for name in ("x", "y", "label"))
            for value in LABELS:
                chosen = label == value
                if count := int(chosen.sum()):
                    groups.append((value, slide, count))
                    xs[value].frombytes(x[chosen].astype(np.int32).tobytes())
                    ys[value].frombytes(y[chosen].astype(np.int32).tobytes())
        _check(slide_ids, grids)
        if not groups:
            raise RunError(
                f"none of the patches of {len(slide_ids)} slides has a known label (0 or 1):"
                " nothing to train on; are there annotations, and does the tissue mask keep tissue?"
            )
        groups.sort(key=lambda group: group[0])  # stable: within a label, by slide
        group_labels, slides, group_counts = zip(*groups, strict=True)
        labels, label_counts = np.unique(group_labels, return_counts=True)
        return cls(
            slide_ids=tuple(slide_ids),
            grids=tuple(grids),
            x=_joined(xs),
            y=_joined(ys),
            group_start=_starts(group_counts),
            group_slide=np.array(slides, np.int32),
            labels=labels.astype(np.int8),
            label_start=_starts(label_counts),
        )


def _joined(parts: dict[int, array]) -> np.ndarray:
    """The labels' numbers, one after the other; lets go of the parts."""
    joined = np.concatenate([np.asarray(parts[label]) for label in LABELS])
    parts.clear()
    return joined


def _check(slide_ids: list[str], grids: list[PatchGrid]) -> None:
    repeated = {slide_id for slide_id, n in Counter(slide_ids).items() if n > 1}
    if repeated:
        raise RunError(f"slides {sorted(repeated)} come twice: each slide has one patch index")
    sizes_px = {grid.patch_px for grid in grids}
    if len(sizes_px) > 1:
        raise RunError(
            f"the patch indices have patches of {sorted(sizes_px)} px: one pool has one patch"
            " size; run the tile stage again on all slides"
        )


def _starts(counts) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def read_hard_negatives(path, test_slides: Collection[str]) -> pd.DataFrame:
    """Read a table of hard negatives.

    Parameters
    ----------
    path : path-like
        Parquet with the columns ``slide_id``, ``x``, ``y`` (upper left corners of patches,
        level-0 px); others, such as the score by which they were chosen, are passed over.
    test_slides : collection of str
        Slides that must not be trained on.

    Returns
    -------
    DataFrame
        ``slide_id`` (str), ``x``, ``y`` (int32), in the order of the file.

    Raises
    ------
    RunError
        If the file is missing or damaged, lacks a column, a value or any row, names a patch
        twice or one of a test slide; the message names the file and the rows, counted from 0.
    """
    try:
        columns = pq.read_table(path, columns=HARD_COLUMNS.names)
        table = columns.select(HARD_COLUMNS.names).cast(HARD_COLUMNS).to_pandas()
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise RunError(
            f"{path}: no table of hard negatives with the columns"
            f" {', '.join(HARD_COLUMNS.names)}: {type(error).__name__}: {error}"
        ) from error
    if table.empty:
        raise RunError(f"{path}: holds no hard negative; for a training without them set none")
    _refuse_rows(table, table.isna().any(axis=1), path, "lack a value")
    _refuse_rows(table, table["slide_id"].isin(test_slides), path, "are of the test split")
    _refuse_rows(table, table.duplicated(keep=False), path, "name a patch more than once")
    return table


def add_hard_negatives(
    pool: PatchPool, table: pd.DataFrame, indexes: Iterable[PatchIndex], *, share: float, path
) -> PatchPool:
    """Give a pool hard negatives, of its own slides or of others.

    With probability `share` a draw without tumour then takes, instead of steps 2 and 3, a slide
    uniformly from the table's slides and a patch uniformly from the slide's rows. All other draws
    are those of the pool alone, number by number.

    Parameters
    ----------
    pool : PatchPool
    table : DataFrame
        As `read_hard_negatives` gives it.
    indexes : iterable of PatchIndex
        One for each slide of the table, in an order that does not change between runs; others
        are passed over. A slide that the pool lacks is appended to its `slide_ids`, in this
        order, but no more of it is drawn than its rows of the table.
    share : float
        In [0, 1].
    path : path-like
        The table's file, for messages.

    Returns
    -------
    PatchPool
        8 bytes more for each row.

    Raises
    ------
    RunError
        If a row is of none of the `indexes`, is no patch of its slide, or one whose label is not
        0; or if the slides' patches differ in size.
    """
    position, grids = {name: i for i, name in enumerate(pool.slide_ids)}, list(pool.grids)
    rows_of, slides, rows = table.groupby("slide_id").indices, [], []
    for index in indexes:
        if index.slide_id not in rows_of:
            continue
        if index.slide_id not in position:
            position[index.slide_id] = len(grids)
            grids.append(index.grid)
        slides.append(position[index.slide_id])
        rows.append(rows_of.pop(index.slide_id))
        _check_labels(table.iloc[rows[-1]], index, path)
    _refuse_rows(table, table["slide_id"].isin(rows_of), path, "are of unknown slides")
    _check(list(position), grids)
    order = np.concatenate(rows)
    hard = HardNegatives(
        share=share,
        x=table["x"].to_numpy()[order],
        y=table["y"].to_numpy()[order],
        start=_starts([len(part) for part in rows]),
        slide=np.array(slides, np.int32),
    )
    return replace(pool, slide_ids=tuple(position), grids=tuple(grids), hard=hard)


def _check_labels(table: pd.DataFrame, index: PatchIndex, path) -> None:
    """Hold a slide's rows against its patch index."""
    patches = index.table.select(["x", "y", "label"]).to_pandas()
    label = table.merge(patches, "left", on=["x", "y"])["label"].set_axis(table.index)
    _refuse_rows(table, label.isna(), path, "are no patches of their slide")
    _refuse_rows(table, label == 1, path, "are tumour patches")
    _refuse_rows(table, label == -1, path, "are patches of unknown label")


def _refuse_rows(table: pd.DataFrame, wrong: pd.Series, path, fault: str) -> None:
    if wrong.any():
        first = ", ".join(
            f"{row.Index} (slide {row.slide_id}, x {row.x}, y {row.y})"
            for row in table[wrong].head(LISTED).itertuples()
        )
        raise RunError(
            f"{path}: {wrong.sum()} rows {fault}: {first}{' ...' if wrong.sum() > LISTED else ''};"
            " a hard negative is a patch of label 0 of a slide outside the test split, named once"
        )


@dataclass(frozen=True, eq=False)
class Draws:
    """Drawn patches, in the order of their draw numbers.

    Parameters
    ----------
    label : int8 array, shape (n,)
        1 (tumour) or 0 (no tumour).
    slide : int32 array, shape (n,)
        Position in the pool's `slide_ids`.
    x, y : int32 arrays, shape (n,)
        Upper left corners of the patches, level-0 px.
    """

    label: np.ndarray
    slide: np.ndarray
    x: np.ndarray
    y: np.ndarray


def draw(pool: PatchPool, *, seed: int, name: str, first: int, count: int) -> Draws:
    """Draws number ``first`` to ``first + count - 1``, with replacement.

    Parameters
    ----------
    pool : PatchPool
    seed : int
    name : str
        Sets apart the sequences of one seed ("train", "validation").
    first, count : int
        Both 0 or more. Splitting a range into several calls does not change its draws.
    """
    words = _words(seed, name, first, count)
    label = draw_label(pool, words[0])
    group = draw_slide(pool, label, words[1])
    patch = draw_patch(pool, group, words[2])
    draws = Draws(pool.labels[label], pool.group_slide[group], pool.x[patch], pool.y[patch])
    return draws if pool.hard is None else draw_hard_negatives(pool.hard, draws, words)


def draw_label(pool: PatchPool, words: np.ndarray) -> np.ndarray:
    """Step 1: a label, uniformly from the labels present.

    Parameters
    ----------
    words : uint64 array, shape (n,)
        Random bits, one word for each draw; so for all three steps.

    Returns
    -------
    int64 array, shape (n,)
        Positions in ``pool.labels``.
    """
    return _below(np.array(len(pool.labels), np.int64), words)


def draw_slide(pool: PatchPool, label: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Step 2: a slide, uniformly from those that hold at least one patch with the label.

    Returns
    -------
    int64 array, shape (n,)
        The groups of that label and slide.
    """
    return _position_in_part(pool.label_start, label, words)


def draw_patch(pool: PatchPool, group: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Step 3: a patch, uniformly from the slide's patches with the label.

    Returns
    -------
    int64 array, shape (n,)
        Positions in ``pool.x`` and ``pool.y``.
    """
    return _position_in_part(pool.group_start, group, words)


def draw_hard_negatives(hard: HardNegatives, draws: Draws, words: np.ndarray) -> Draws:
    """Instead of steps 2 and 3, for a share of the draws without tumour: slide, then patch.

    Parameters
    ----------
    hard : HardNegatives
    draws : Draws
        What the three steps have drawn.
    words : uint64 array, shape (4, n)
        The fourth word decides whether the draw is replaced; the second and third, which the
        replaced steps 2 and 3 do not need any more, give the slide and the patch.
    """
    replaced = np.flatnonzero((draws.label == 0) & (_unit(words[3]) < hard.share))
    group = _below(np.full(len(replaced), len(hard.slide)), words[1][replaced])
    patch = _position_in_part(hard.start, group, words[2][replaced])
    slide, x, y = draws.slide.copy(), draws.x.copy(), draws.y.copy()
    slide[replaced] = hard.slide[group]
    x[replaced], y[replaced] = hard.x[patch], hard.y[patch]
    return replace(draws, slide=slide, x=x, y=y)


def _unit(words: np.ndarray) -> np.ndarray:
    """Floats from 0 to under 1: the upper 53 bits."""
    return (words >> np.uint64(11)) * 2.0**-53


def _words(seed: int, name: str, first: int, count: int) -> np.ndarray:
    """Random bits of each draw: uint64, shape (4, count); column i is Philox block first + i."""
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    philox = np.random.Philox(key=int.from_bytes(key, "little"), counter=first)
    return philox.random_raw(4 * count).reshape(count, 4).T


def _position_in_part(start: np.ndarray, part: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Positions within ``start[part]:start[part + 1]``."""
    first = start[part]
    return first + _below(start[part + 1] - first, words)


def _below(n: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Integers from 0 to n - 1: floor(word * n / 2**64), for n up to 2**32.

    No integer's probability differs from 1 / n by more than 2**-64 (Lemire 2019, without its
    rejection step, so that each draw takes one word).
    """
    n = n.astype(np.uint64)
    low = (words & np.uint64(0xFFFFFFFF)) * n >> np.uint64(32)
    return (((words >> np.uint64(32)) * n + low) >> np.uint64(32)).astype(np.int64)
