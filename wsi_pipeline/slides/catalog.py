"""Which slides a run has: read from a table or found in folders, and split by patient."""

import csv
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from wsi_pipeline.errors import CatalogError
from wsi_pipeline.slides.given_masks import MASK_SUFFIXES

# What OpenSlide opens; a MIRAX slide's data lie in a folder of the same name.
SLIDE_SUFFIXES = frozenset([
    ".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn",
    ".mrxs", ".svslide", ".bif", ".czi", ".avs", ".dcm",
])  # fmt: skip
ANNOTATION_SUFFIXES = frozenset((".xml", ".json", ".geojson"))
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


class _Row(BaseModel):
    """A slide as the table states it; an empty cell is an absent value."""

    model_config = ConfigDict(extra="forbid")

    slide_id: Annotated[str, AfterValidator(_safe_as_file_name)]
    path: str
    annotation: str | None = None
    tissue: str | None = None
    exclude: str | None = None
    patient_id: str | None = None
    split: Literal["train", "validation", "test"] | None = None
    label: Annotated[int, Field(ge=0, le=1)] | None = None
    mpp: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class _MeasuredRow(BaseModel):
    """A slide that is evaluated without its file."""

    model_config = ConfigDict(extra="forbid")

    slide_id: Annotated[str, AfterValidator(_safe_as_file_name)]
    width: Annotated[int, Field(gt=0)]
    height: Annotated[int, Field(gt=0)]
    mpp: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    label: Annotated[int, Field(ge=0, le=1)]
    patient_id: str | None = None


def read_catalog(path) -> pd.DataFrame:
    """Read a table of slides.

    Parameters
    ----------
    path : path-like
        A CSV file with a header. Columns ``slide_id`` and ``path``; optionally ``annotation``,
        ``tissue`` and ``exclude`` (masks made elsewhere, see
        `wsi_pipeline.slides.given_masks.read_mask`), ``patient_id`` (a slide without one is its
        own patient), ``split`` (for all slides or none), ``label`` (1 tumour, 0 normal) and
        ``mpp`` (um per level-0 px). Paths count from
        the table's folder. Whether the files exist is not checked: a slide that cannot be opened
        is that slide's failure, not the batch's.

    Returns
    -------
    pandas.DataFrame
        One row a slide, in the table's order: ``slide_id, path, annotation, tissue, exclude,
        patient_id, split`` (str; paths absolute), ``label`` (Int8), ``mpp`` (float64);
        absent values are missing.

    Raises
    ------
    CatalogError
        If the table cannot be read, holds no slide, has unknown or missing columns, a bad value,
        a slide id twice (upper and lower case alike), a slide file or an annotation twice, a split
        for only some slides, or a patient in two splits; the message names the table and the line.
    """
    path = Path(path)
    lines, rows = _read_rows(path, _Row)
    frame = _to_frame(rows, folder=path.parent.absolute())
    _refuse_duplicates(frame, path, lines, ("slide_id", "path", "annotation"))
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
        These columns, one row a slide, in the table's order; a slide without a patient is its own.

    Raises
    ------
    CatalogError
        If the table cannot be read, holds no slide, has unknown or missing columns, a bad value,
        or a slide id twice; the message names the table and the line.
    """
    path = Path(path)
    lines, rows = _read_rows(path, _MeasuredRow)
    frame = pd.DataFrame([row.model_dump() for row in rows])
    _refuse_duplicates(frame, path, lines, ("slide_id",))
    return frame.assign(patient_id=frame["patient_id"].fillna(frame["slide_id"]))


def _read_rows(path: Path, kind: type[BaseModel]) -> tuple[list[int], list[BaseModel]]:
    lines, rows = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            _check_columns(path, reader.fieldnames or [], kind)
            for cells in reader:
                lines.append(reader.line_num)
                rows.append(_parse_row(cells, f"{path}, line {reader.line_num}", kind))
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


def _parse_row(cells: dict, where: str, kind: type[BaseModel] = _Row) -> BaseModel:
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


def _to_frame(rows: list[_Row], folder: Path) -> pd.DataFrame:
    frame = pd.DataFrame([row.model_dump() for row in rows], columns=list(_Row.model_fields))
    frame["path"] = [str(folder / row.path) for row in rows]
    for column in ("annotation", "tissue", "exclude"):
        files = (getattr(row, column) for row in rows)
        frame[column] = [file and str(folder / file) for file in files]
    frame["patient_id"] = frame["patient_id"].fillna(frame["slide_id"])
    return frame.astype(DTYPES)


def _refuse_duplicates(frame: pd.DataFrame, path: Path, lines: list[int], columns):
    for column in columns:
        values = frame[column].str.casefold() if column == "slide_id" else frame[column]
        if (twice := values.notna() & values.duplicated(keep=False)).any():
            at = np.flatnonzero((values == values[twice].iloc[0]).fillna(False))
            raise CatalogError(
                f"{path}, lines {', '.join(str(lines[i]) for i in at)}: the same {column},"
                f" {frame[column].iloc[at[0]]!r}, is there {len(at)} times (slides"
                f" {', '.join(frame['slide_id'].iloc[at])}); each slide is one row, with files of"
                " its own"
            )


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


def scan_folders(slides, annotations=None, tissue=None, exclude=None) -> pd.DataFrame:
    """Find slides, and annotations and masks named as they are.

    Parameters
    ----------
    slides : path-like
        A folder; its subfolders are searched too, except those that hold a MIRAX slide's data.
        A slide's id, and its patient's, is its file name without the suffix. A folder may hold
        one DICOM file: of several, which are parts of one slide is not told by their names.
    annotations : path-like, optional
        A folder of ``.xml``, ``.json`` and ``.geojson`` files, searched the same way.
    tissue, exclude : path-like, optional
        Folders of masks made elsewhere, searched the same way.

    Returns
    -------
    pandas.DataFrame
        As `read_catalog`, sorted by slide id, without splits and labels.

    Raises
    ------
    CatalogError
        If a folder is missing or holds no slide, a name is no slide id, two slides, annotations or
        masks have the same name, or an annotation or a mask has no slide.
    """
    slide_files = files_by_stem(slides, SLIDE_SUFFIXES, "slides")
    beside = {
        column: _files_of_slides(folder, suffixes, what, slide_files, slides)
        for column, folder, suffixes, what in (
            ("annotation", annotations, ANNOTATION_SUFFIXES, "annotations"),
            ("tissue", tissue, MASK_SUFFIXES, "tissue masks"),
            ("exclude", exclude, MASK_SUFFIXES, "masks to exclude"),
        )
    }
    rows = []
    for stem, file in sorted(slide_files.items()):
        cells = {"slide_id": stem, "path": str(file.absolute())}
        cells |= {
            name: str(found[stem].absolute()) for name, found in beside.items() if stem in found
        }
        rows.append(_parse_row(cells, where=str(file)))
    return _to_frame(rows, folder=Path(slides))


def _files_of_slides(folder, suffixes, what, slide_files, slides) -> dict[str, Path]:
    """Files of a folder by the names of their slides; none where there is no folder."""
    files = {} if folder is None else files_by_stem(folder, suffixes, what)
    if orphans := sorted(set(files) - set(slide_files)):
        raise CatalogError(
            f"{files[orphans[0]]}: no slide of this name under {slides}"
            f" ({len(orphans)} such {what})"
        )
    return files


def files_by_stem(folder, suffixes, what: str) -> dict[str, Path]:
    """Find files by name, in a folder and its subfolders, those of MIRAX slides left out.

    Parameters
    ----------
    folder : path-like
    suffixes : set of str
        In lower case; upper case counts too.
    what : str
        What the files are, in the plural, for messages.

    Returns
    -------
    dict of str to Path
        By name without the suffix, sorted.

    Raises
    ------
    CatalogError
        If there is no such folder or no such file in it, or two of the same name (upper and
        lower case alike), or several DICOM files in one folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CatalogError(f"{folder}: no such folder of {what}")
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in suffixes and file.is_file() and not file.name.startswith(".")
    ]
    found, dicom_folders = {}, {}
    for file in files:
        if any(Path(f"{parent}.mrxs").is_file() for parent in file.parents):
            continue
        if file.suffix.lower() == ".dcm" and file != dicom_folders.setdefault(file.parent, file):
            raise CatalogError(
                f"{file.parent}: holds several DICOM files, which may be one slide; list the"
                " slides in a table, one file of each"
            )
        if (other := found.setdefault(file.stem.casefold(), file)) != file:
            raise CatalogError(f"{file} and {other}: two {what} have the same name")
    if not found:
        raise CatalogError(f"{folder}: holds no {what} ({' '.join(sorted(suffixes))})")
    return {file.stem: file for file in found.values()}


def assign_splits(frame: pd.DataFrame, shares: Mapping[str, float], seed: int) -> pd.DataFrame:
    """Split the slides by patient.

    The patients of each split are counted first, by the largest remainders of their shares, at
    least one where there are enough; then patients with a tumour (a slide labelled 1 or
    annotated) and without are spread over the splits in proportion, to within one. Who goes
    where depends on the seed and the patients' ids, not on the order of rows.

    Parameters
    ----------
    frame : pandas.DataFrame
        As `read_catalog` gives it.
    shares : mapping of str to float
        Share of the patients for each split; they add up to 1.
    seed : int

    Returns
    -------
    pandas.DataFrame
        A copy with the column ``split`` filled.
    """
    tumour = (frame["label"].eq(1) | frame["annotation"].notna()).fillna(False)
    has_tumour = tumour.astype(bool).groupby(frame["patient_id"]).any()
    order = sorted(has_tumour.index, key=lambda patient: _draw(seed, patient))
    with_tumour = [patient for patient in order if has_tumour[patient]]
    without = [patient for patient in order if not has_tumour[patient]]

    # Ties of remainders go to the larger share.
    names = sorted((name for name in shares if shares[name] > 0), key=lambda n: (-shares[n], n))
    counts = _at_least_one(_apportion(len(order), [shares[name] for name in names]))
    counts_with = _apportion(len(with_tumour), counts)
    split_of = {
        **dict(zip(with_tumour, np.repeat(names, counts_with), strict=True)),
        **dict(zip(without, np.repeat(names, counts - counts_with), strict=True)),
    }
    return frame.assign(split=frame["patient_id"].map(split_of).astype("string"))


def _draw(seed: int, patient: str) -> bytes:
    return hashlib.sha256(f"{seed}/split/{patient}".encode()).digest()


def _apportion(total: int, weights) -> np.ndarray:
    """Share out `total` by the largest remainders of the weights' quotas (Hamilton's method)."""
    quotas = total * np.asarray(weights, float) / np.sum(weights)
    counts = np.floor(quotas + 1e-9).astype(int)
    largest_first = np.argsort(counts - quotas, kind="stable")
    counts[largest_first[: total - counts.sum()]] += 1
    return counts


def _at_least_one(counts: np.ndarray) -> np.ndarray:
    counts = counts.copy()
    while counts.min() == 0 and counts.sum() >= len(counts):
        counts[counts.argmax()] -= 1
        counts[counts.argmin()] += 1
    return counts
