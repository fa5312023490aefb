"""Tables of slides: which a run has, and those that are evaluated without their files."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import pandas as pd
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from wsi_pipeline.errors import CatalogError
from wsi_pipeline.slides.patients import (
    AUTO,
    KNOWN_NAMES,
    NO_PATIENT,
    refuse_several_for_a_name,
    with_patients,
)
from wsi_pipeline.slides.same_slide import existing_form, refuse_same_files

FILE_COLUMNS = ("path", "annotation", "tissue", "exclude")
SLIDE_ID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?")
WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
DTYPES = {
    **dict.fromkeys(("slide_id", "path", "annotation", "patient_id", "split"), "string"),
    **dict.fromkeys(("tissue", "exclude"), "string"),
    "label": "Int8",
    "mpp": "float64",
}


def _safe_as_file_name(slide_id: str) -> str:
    if not SLIDE_ID.fullmatch(slide_id) or WINDOWS_DEVICE.fullmatch(slide_id):
        raise ValueError(
            "it names files, so it must be up to 128 letters, digits, '.', '_' and '-', begin with"
            " a letter or digit, not end in '.' and be no device name of Windows"
        )
    return slide_id


def _known(patient_id: str) -> str | None:
    return None if patient_id.casefold() in NO_PATIENT else patient_id


PatientId = Annotated[str, AfterValidator(_known)]


class _Identified(BaseModel):
    """A slide; an empty cell is an absent value."""

    model_config = ConfigDict(extra="forbid")

    slide_id: Annotated[str, AfterValidator(_safe_as_file_name)]


R = TypeVar("R", bound=_Identified)


class CatalogRow(_Identified):
    """A slide as the table states it."""

    path: str
    annotation: str | None = None
    tissue: str | None = None
    exclude: str | None = None
    patient_id: PatientId | None = None
    split: Literal["train", "validation", "test"] | None = None
    label: Annotated[int, Field(ge=0, le=1)] | None = None
    mpp: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class _MeasuredRow(_Identified):
    """A slide that is evaluated without its file."""

    width: Annotated[int, Field(gt=0)]
    height: Annotated[int, Field(gt=0)]
    mpp: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    label: Annotated[int, Field(ge=0, le=1)]
    patient_id: PatientId | None = None


def read_catalog(path, patient_from: str | None = AUTO) -> pd.DataFrame:
    """Read a table of slides.

    Parameters
    ----------
    path : path-like
        A CSV file with a header. Columns ``slide_id`` and ``path``; optionally ``annotation``,
        ``tissue`` and ``exclude`` (masks made elsewhere, see
        `wsi_pipeline.slides.given_masks.read_mask`), ``patient_id``, ``split`` (for all slides or
        none), ``label`` (1 tumour, 0 normal) and ``mpp`` (um per level-0 px). Paths count from the
        table's folder. Whether the files exist is not checked: a slide that cannot be opened is
        that slide's failure, not the batch's.
    patient_from : str or None
        How the id of a slide without ``patient_id`` states its patient: see
        `wsi_pipeline.slides.patients.with_patients`.

    Returns
    -------
    pandas.DataFrame
        One row a slide, in the table's order: ``slide_id, path, annotation, tissue, exclude,
        patient_id, split`` (str; paths absolute), ``label`` (Int8), ``mpp`` (float64); absent
        values are missing. ``patient_source`` (str) says where the patient comes from, see
        `with_patients`.

    Raises
    ------
    CatalogError
        If the table cannot be read, holds no slide, has unknown or missing columns, a bad value,
        a slide id twice (upper and lower case alike), a slide file or an annotation twice (under
        one name or several), a patient spelled in two ways or in two splits, several patients for
        slides that are of one by their names (with "auto"), or a split for only some slides; the
        message names the table and the line.
    """
    path = Path(path)
    lines, rows = _read_rows(path, CatalogRow)
    places = _refuse_repeated_ids(rows, path, lines)
    frame = catalog_frame(rows, path.parent.absolute(), str(path), places, patient_from)
    _check_splits(frame, path, lines)
    return frame


def read_measured_slides(path) -> pd.DataFrame:
    """Read a table of slides whose files need not be at hand: their size is stated instead.

    Parameters
    ----------
    path : path-like
        A CSV file with a header. Columns ``slide_id``, ``width`` and ``height`` (level-0 px),
        ``mpp`` (um per level-0 px) and ``label`` (1 tumour, 0 normal); optionally ``patient_id``.

    Returns
    -------
    pandas.DataFrame
        These columns, one row a slide, in the table's order, and ``patient_source``. A slide
        without a patient has that of its name in a public cohort (see
        `wsi_pipeline.slides.patients`) or is its own.

    Raises
    ------
    CatalogError
        If the table cannot be read, holds no slide, has unknown or missing columns, a bad value,
        a slide id twice or a patient spelled in two ways; the message names the table and the line.
    """
    path = Path(path)
    lines, rows = _read_rows(path, _MeasuredRow)
    places = _refuse_repeated_ids(rows, path, lines)
    frame = pd.DataFrame([row.model_dump() for row in rows])
    frame = with_patients(frame, AUTO, str(path), places)
    refuse_several_for_a_name(frame, str(path), places)
    return frame


def _read_rows(path: Path, kind: type[R]) -> tuple[list[int], list[R]]:
    lines, rows = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            _check_columns(path, reader.fieldnames or [], kind)
            for cells in reader:
                lines.append(reader.line_num)
                rows.append(parse_row(cells, f"{path}, line {reader.line_num}", kind))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CatalogError(f"{path}: cannot be read as a CSV table: {error}") from error
    if not rows:
        raise CatalogError(f"{path}: holds no slide")
    return lines, rows


def _check_columns(path: Path, columns, kind: type[BaseModel]):
    known = list(kind.model_fields)
    required = [name for name, field in kind.model_fields.items() if field.is_required()]
    if unknown := [column for column in columns if column not in known]:
        raise CatalogError(f"{path}: unknown columns {unknown}; known ones are {known}")
    if missing := [column for column in required if column not in columns]:
        raise CatalogError(f"{path}: the columns {missing} are missing")
    if len(set(columns)) < len(columns):
        raise CatalogError(f"{path}: a column is there twice among {list(columns)}")


def parse_row(cells: dict, where: str, kind: type[R]) -> R:
    """Check a row's cells; `where` it is, is for messages."""
    if None in cells or None in cells.values():
        raise CatalogError(f"{where}: the row has more or fewer cells than the header")
    cells = {column: value.strip() for column, value in cells.items()}
    try:
        return kind(**{column: value for column, value in cells.items() if value})
    except ValidationError as error:
        first = error.errors()[0]
        column = first["loc"][0]
        rule = first["msg"].removeprefix("Value error, ")
        raise CatalogError(f"{where}: {column} is {cells.get(column, '')!r}: {rule}") from None


def catalog_frame(
    rows: Sequence[CatalogRow],
    folder: Path,
    source: str,
    places: Sequence[str],
    patient_from: str | None,
) -> pd.DataFrame:
    """Make `read_catalog`'s frame of its rows; CatalogError if two share a file or a patient's id.

    `places` says where in `source` each row is; paths count from `folder`.
    """
    frame = pd.DataFrame([row.model_dump() for row in rows], columns=list(CatalogRow.model_fields))
    for column in FILE_COLUMNS:
        paths = [getattr(row, column) for row in rows]
        frame[column] = [path and existing_form(str(folder / path)) for path in paths]
    frame = frame.astype(DTYPES)
    for column in FILE_COLUMNS:
        refuse_same_files(frame, column, source, places)
    frame = with_patients(frame, patient_from, source, places)
    if patient_from == AUTO or patient_from in KNOWN_NAMES:
        refuse_several_for_a_name(frame, source, places)
    return frame


def _refuse_repeated_ids(rows: Sequence[_Identified], path: Path, lines: list[int]) -> list[str]:
    """Refuse a slide id that is there twice; else say where each row is."""
    ids = pd.Series([row.slide_id for row in rows])
    folded = ids.str.casefold()
    if (twice := folded.duplicated(keep=False)).any():
        at = np.flatnonzero(folded == folded[twice].iloc[0])
        raise CatalogError(
            f"{path}, lines {', '.join(str(lines[i]) for i in at)}: the same slide_id,"
            f" {ids[at[0]]!r}, is there {len(at)} times; each slide is one row"
        )
    return [f"line {line}" for line in lines]


def _check_splits(frame: pd.DataFrame, path: Path, lines: list[int]):
    missing = frame["split"].isna()
    if missing.all():
        return
    if missing.any():
        first = int(np.argmax(missing))
        raise CatalogError(
            f"{path}, line {lines[first]}: slide {frame['slide_id'].iloc[first]!r} has no split"
            " while others have; give all slides one, or none"
        )
    splits = frame.groupby("patient_id")["split"].nunique()
    for patient in splits.index[splits > 1]:
        listed = ", ".join(
            f"{row.slide_id} ({row.split}, line {lines[row.Index]})"
            for row in frame[frame["patient_id"] == patient].itertuples()
        )
        raise CatalogError(f"{path}: patient {patient!r} is in more than one split: {listed}")
