"""Patches with their scores, a file a slide: patch metrics and lecture FROC are made from them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.slide_level import slide_scores
from wsi_pipeline.files import replace_atomically


def write_scores(folder: Path, slide_id: str, patches: pa.Table, scores: np.ndarray) -> None:
    """Write ``slides/SLIDE.parquet``.

    Parameters
    ----------
    folder : Path
        Of the evaluation.
    slide_id : str
    patches : pyarrow.Table
        The patch index, whose columns are kept.
    scores : float32 array
        In its order, the column ``score``: NaN where a patch could not be read.
    """
    with replace_atomically(_scores_path(folder, slide_id)) as part:
        pq.write_table(patches.append_column("score", pa.array(scores)), part)


def read_scores(
    folder: Path,
    slide_ids: Sequence[str],
    columns: Sequence[str] = ("label", "score"),
    where: pc.Expression | None = None,
) -> pd.DataFrame:
    """Read what `write_scores` wrote of the patches of some slides.

    Parameters
    ----------
    folder : Path
    slide_ids, columns : sequence of str
    where : pyarrow.compute.Expression, optional
        Which patches; all unless given.

    Returns
    -------
    DataFrame
        The `columns`, and ``slide_id`` (categorical, in the order given); the patches lie in this
        order. Memory: some 10 bytes for each, with ``label`` and ``score``; a patch's list of
        ``lesions`` takes 130 more.

    Raises
    ------
    RunError
        If a slide's file is missing or no readable Parquet.
    """
    tables = [_read(_scores_path(folder, slide_id), columns, where) for slide_id in slide_ids]
    counts = [table.num_rows for table in tables]
    table = pa.concat_tables(tables)
    tables.clear()  # each column's pieces go as soon as they are joined
    patches = table.to_pandas(split_blocks=True, self_destruct=True)
    number = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    patches["slide_id"] = pd.Categorical.from_codes(number, list(slide_ids))
    return patches


def read_slide_scores(folder: Path, slide_ids: Sequence[str]) -> np.ndarray:
    """Each slide's score, float64: its best patch's, read from one slide after the other.

    NaN where no patch could be read, minus infinity where there is none: see `slide_scores`.
    """
    scores = [slide_scores([name], read_scores(folder, [name], ("score",))) for name in slide_ids]
    return np.concatenate(scores)


def _read(path: Path, columns: Sequence[str], where: pc.Expression | None) -> pa.Table:
    try:
        return pq.read_table(path, columns=list(columns), filters=where)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: no readable scores: {error}; run the evaluate stage") from error


def _scores_path(folder: Path, slide_id: str) -> Path:
    return folder / "slides" / f"{slide_id}.parquet"
