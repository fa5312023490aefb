"""Detections as files: CAMELYON16's form, one CSV file for each slide.

Lines of ``probability,x,y`` without a header: the confidence that there is tumour, and the place
in level-0 px. The organisers' script (``Python/Evaluation_FROC.py`` of
computationalpathologygroup/Camelyon16) takes any number as confidence and integers as place. Here:

- A confidence is from 0 to 1. FROC needs no more than the order, so scores of another scale can
  be mapped to it. A number outside is most often a coordinate, in a file whose columns are in
  another order; and the script, in which a lesion begins at 0, never counts a hit below.
- A place may have a fraction: the pixel that holds it counts. It is on the slide: in a slide of
  ``width`` px, x is at least 0 and less than ``width``.
- An empty file says that nothing was detected; blank lines are passed over.

In memory detections are a table ``probability, x, y`` (float64), the highest first.
"""

import codecs
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv

from wsi_pipeline.errors import CatalogError, RunError
from wsi_pipeline.files import replace_atomically

COLUMNS = ("probability", "x", "y")
LISTED = 20
"""As many names stand in a message."""

log = logging.getLogger(__name__)


def write_detections(path, detections: pd.DataFrame) -> None:
    """Write a slide's detections; whole or not at all.

    Numbers are written so that they are read back exactly; whole ones as integers.

    Parameters
    ----------
    path : path-like
    detections : DataFrame
        ``probability`` in [0, 1], ``x``, ``y`` (level-0 px, 0 or more); may be empty.

    Raises
    ------
    RunError
        If a value breaks these rules: nobody could read the file.
    """
    path = Path(path)
    table = detections[list(COLUMNS)].astype(np.float64)
    _check(table, None, lambda row: f"{path}, line {row + 1}")
    with replace_atomically(path) as part:
        csv.write_csv(
            pa.Table.from_pandas(table, preserve_index=False),
            part,
            csv.WriteOptions(include_header=False),
        )


def read_detections(path, size: tuple[int, int] | None = None) -> pd.DataFrame:
    """Read a slide's detections.

    Parameters
    ----------
    path : path-like
    size : (int, int), optional
        Width and height of the slide, level-0 px; without it, only that no coordinate is negative
        or infinite is known of the places.

    Returns
    -------
    DataFrame
        ``probability`` in [0, 1], ``x``, ``y`` (level-0 px), all float64, by falling probability;
        equal ones in the order of the file.

    Raises
    ------
    RunError
        If the file is missing, or a line is a header, has more or fewer than three cells, holds
        what is no number, a confidence outside [0, 1] or a place off the slide; the message names
        the file, the line, the value and the rule.
    """
    data = _read_bytes(Path(path))
    table = _parse(data, path)
    _check(table, size, lambda row: f"{path}, line {_filled_lines(data)[row][0]}")
    return table.sort_values("probability", ascending=False, kind="stable", ignore_index=True)


def detection_files(folder, slide_ids: Iterable[str]) -> dict[str, Path]:
    """Find the detections of many slides: ``SLIDE.csv`` in one folder.

    A file belongs to the slide of exactly its name or else, if that is one file and one slide,
    to the slide whose name differs only in upper and lower case (CAMELYON16 has both
    ``Test_001`` and ``test_001``). Files of other slides are passed over with a warning that names
    them; those of other kinds and hidden ones without.

    Parameters
    ----------
    folder : path-like
    slide_ids : iterable of str
        No two of them alike but for upper and lower case, as in every catalogue.

    Returns
    -------
    dict of str to Path
        For each slide, in the order given.

    Raises
    ------
    CatalogError
        If a slide has no file or several; the message lists them.
    RunError
        If there is no such folder.
    """
    folder, slide_ids = Path(folder), dict.fromkeys(slide_ids)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder of detections")
    exact, alike = defaultdict(list), defaultdict(list)
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() == ".csv" and not file.name.startswith("."):
            if file.stem in slide_ids:
                exact[file.stem].append(file)
            else:
                alike[file.stem.casefold()].append(file)
    found = {slide_id: exact[slide_id] or alike[slide_id.casefold()] for slide_id in slide_ids}
    used = {file for files in found.values() for file in files}
    left = {file for files in alike.values() for file in files} - used
    tell_passed_over(folder, left)
    _refuse(
        folder,
        {
            "no file for the slides": [slide_id for slide_id, files in found.items() if not files],
            "several files for the slides": [
                slide_id for slide_id, files in found.items() if len(files) > 1
            ],
        },
    )
    return {slide_id: files[0] for slide_id, files in found.items()}


def tell_passed_over(folder: Path, files: Collection[Path]) -> None:
    """Warn of files in a folder, if there are any, that belong to none of the slides asked for."""
    if files:
        names = _listed(sorted(file.name for file in files))
        log.warning("%s: passed over, of no slide in the table: %s", folder, names)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError:
        raise RunError(
            f"{path}: no such file; of a slide without detections there must be an empty one"
        ) from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error}") from error


def _parse(data: bytes, path) -> pd.DataFrame:
    if not data.strip(b"\r\n"):
        return pd.DataFrame(columns=COLUMNS, dtype=np.float64)
    try:
        return csv.read_csv(
            pa.BufferReader(data),
            csv.ReadOptions(column_names=COLUMNS),
            csv.ParseOptions(quote_char=False),
            csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.float64()), null_values=[]),
        ).to_pandas()
    except pa.ArrowInvalid as error:
        raise RunError(f"{path}, {_why_not_parsed(data) or error}") from error


def _filled_lines(data: bytes) -> list[tuple[int, str]]:
    """Line numbers, from 1, and text of the lines that are not blank."""
    lines = enumerate(data.splitlines(), start=1)
    return [(number, line.decode(errors="replace")) for number, line in lines if line]


def _why_not_parsed(data: bytes) -> str | None:
    """The first line that is no three numbers, and what it is instead."""
    for number, line in _filled_lines(data):
        cells = line.split(",")
        words = [cell for cell in cells if not _is_number(cell)]
        if len(words) == len(cells) == len(COLUMNS):
            return (
                f"line {number}: {line!r} is a header: detections are lines of"
                " probability,x,y without one"
            )
        if len(cells) != len(COLUMNS):
            return (
                f"line {number}: {line!r} has {len(cells)} cells: a detection has the three"
                " probability,x,y, with commas between them"
            )
        if words:
            return f"line {number}: {words[0]!r} in {line!r} is no number"
    return None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _check(table: pd.DataFrame, size: tuple[int, int] | None, where: Callable[[int], str]) -> None:
    """Hold every value against its rule; NaN breaks each."""
    sides = dict(zip(COLUMNS[1:], size or (np.inf, np.inf), strict=True))
    rules = {"probability": (table["probability"] <= 1, "a confidence is from 0 to 1")} | {
        axis: (table[axis] < side, f"a place is on the slide, from 0 to under {side} px")
        for axis, side in sides.items()
    }
    for column, (low_enough, rule) in rules.items():
        holds = (low_enough & (table[column] >= 0)).to_numpy()
        if not holds.all():
            row = int(np.argmin(holds))
            value = float(table[column].iloc[row])
            raise RunError(f"{where(row)}: {column} is {value!r}: {rule}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _refuse(folder: Path, faults: dict[str, list[str]]) -> None:
    if told := [f"{what} {_listed(names)}" for what, names in faults.items() if names]:
        raise CatalogError(
            f"{folder}: {'; '.join(told)}; each slide has one file, SLIDE.csv, empty where nothing"
            " was detected"
        )
