"""Slides and annotations found in folders, and what is passed over there."""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wsi_pipeline.errors import CatalogError
from wsi_pipeline.slides.catalog import CatalogRow, catalog_frame, parse_row
from wsi_pipeline.slides.given_masks import MASK_SUFFIXES
from wsi_pipeline.slides.patients import AUTO
from wsi_pipeline.slides.same_slide import file_identity

# What OpenSlide opens; a MIRAX slide's data lie in a folder of the same name.
SLIDE_SUFFIXES = frozenset([
    ".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn",
    ".mrxs", ".svslide", ".bif", ".czi", ".avs", ".dcm",
])  # fmt: skip
PLAIN_ANNOTATION_SUFFIXES = (".xml", ".json", ".geojson", ".annotations")
PACKED = (".gz", ".zip")
ANNOTATION_SUFFIXES = frozenset([
    plain + packed for plain in PLAIN_ANNOTATION_SUFFIXES for packed in ("", *PACKED)
])  # fmt: skip
# Of files named as a slide without annotation: passed over, they would make it one on which nothing
# was drawn. Reading tells what they are.
OTHER_ANNOTATION_SUFFIXES = frozenset((
    ".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".rar", ".tar", ".tgz", ".annotation", ".qpdata",
    ".ndpa", ".roi", ".wkt", ".csv", ".tsv", ".txt", ".jsonl", ".sqlite", ".db", ".bak", ".xlsx",
))  # fmt: skip
PARTIAL_SUFFIXES = frozenset((".part", ".partial", ".crdownload", ".download", ".filepart", ".tmp"))
SYSTEM_NAMES = re.compile(r"\..*|~\$.*|\$.*|@eadir|__macosx|thumbs\.db|desktop\.ini", re.IGNORECASE)


@dataclass(frozen=True)
class FoundFiles:
    """Files of some kinds in a folder.

    Parameters
    ----------
    by_name : dict of str to Path
        By name without the suffix, sorted; no two alike but for upper and lower case.
    passed_over : dict of Path to str
        All other files and the folders that were not searched, and of what kind each is.
    """

    by_name: dict[str, Path]
    passed_over: dict[Path, str]


def scan_folders(
    slides, annotations=None, tissue=None, exclude=None, *, patient_from: str | None = AUTO
) -> tuple[pd.DataFrame, list[str]]:
    """Find slides, and annotations and masks named as they are.

    Parameters
    ----------
    slides : path-like
        A folder, searched as `find_files` does. A slide's id is its file name without the suffix.
    annotations : path-like, optional
        A folder of files of `ANNOTATION_SUFFIXES`, searched the same way. A file belongs to the
        slide of its name without the suffix, see `slide_named`.
    tissue, exclude : path-like, optional
        Folders of masks made elsewhere, searched the same way.
    patient_from : str or None
        How a slide's name states its patient: see `wsi_pipeline.slides.patients.with_patients`.

    Returns
    -------
    pandas.DataFrame
        As `read_catalog`, sorted by slide id, without splits and labels.
    list of str
        Notes: what was passed over in each folder, counted by kind.

    Raises
    ------
    CatalogError
        If a folder is missing, cannot be read or holds no slide, a name is no slide id, two slides
        have one name or one file, a slide has two annotations or masks of a kind, or one of these
        has no slide.
    """
    slide_files = find_files(slides, SLIDE_SUFFIXES, "slides")
    found, of_slides = {"slides": (Path(slides), slide_files)}, {}
    for column, folder, suffixes, what in (
        ("annotation", annotations, ANNOTATION_SUFFIXES, "annotations"),
        ("tissue", tissue, MASK_SUFFIXES, "tissue masks"),
        ("exclude", exclude, MASK_SUFFIXES, "masks to exclude"),
    ):
        if folder is not None:
            files = find_files(folder, suffixes, what)
            found[what] = Path(folder), files
            of_slides[column] = _pair(files.by_name, slide_files.by_name, slides, what)
            if column == "annotation":
                others = _other_annotations(files.passed_over, slide_files.by_name)
                of_slides[column] = others | of_slides[column]
    rows, places = [], []
    for stem, file in slide_files.by_name.items():
        cells = {"slide_id": stem, "path": str(file.absolute())}
        for column, paired in of_slides.items():
            if stem in paired:
                cells[column] = str(paired[stem].absolute())
        rows.append(parse_row(cells, str(file), CatalogRow))
        places.append(str(file.relative_to(slides)))
    frame = catalog_frame(rows, Path(slides), str(slides), places, patient_from)
    used = {file for _, files in found.values() for file in files.by_name.values()}
    used |= {file for paired in of_slides.values() for file in paired.values()}
    notes = [
        passed_over_note(folder, {p: k for p, k in files.passed_over.items() if p not in used})
        for folder, files in found.values()
    ]
    return frame, list(dict.fromkeys(filter(None, notes)))


def _pair(
    files: Mapping[str, Path], slides: Mapping[str, Path], folder, what: str
) -> dict[str, Path]:
    slide_ids = {slide_id.casefold(): slide_id for slide_id in slides}
    named = {file: slide_named(stem, slide_ids) for stem, file in files.items()}
    if orphans := [file for file, slide_id in named.items() if slide_id is None]:
        raise CatalogError(
            f"{orphans[0]}: no slide of this name under {folder} ({len(orphans)} such {what})"
        )
    paired: dict[str, Path] = {}
    for file, slide_id in named.items():
        if slide_id and (other := paired.setdefault(slide_id, file)) != file:
            raise CatalogError(f"{other} and {file}: two {what} of the slide {slide_id}")
    return paired


def _other_annotations(
    passed_over: Collection[Path], slides: Mapping[str, Path]
) -> dict[str, Path]:
    """Files of `OTHER_ANNOTATION_SUFFIXES` that are named as slides are."""
    slide_ids = {slide_id.casefold(): slide_id for slide_id in slides}
    found: dict[str, Path] = {}
    for file in sorted(passed_over):
        slide_id = slide_named(file.stem, slide_ids)
        if slide_id and file.suffix.lower() in OTHER_ANNOTATION_SUFFIXES:
            found.setdefault(slide_id, file)
    return found


def _suffix(name: str, suffixes: Collection[str]) -> str:
    """The longest of the suffixes that a file's name ends in, case ignored; else its own."""
    name = name.lower()
    known = [suffix for suffix in suffixes if name.endswith(suffix)]
    return max(known, key=len) if known else Path(name).suffix


def _stem(file: Path, suffixes: Collection[str]) -> str:
    return file.name[: len(file.name) - len(_suffix(file.name, suffixes))]


def slide_named(stem: str, slide_ids: Mapping[str, str]) -> str | None:
    """Find the slide that a file belongs to by its name.

    Parameters
    ----------
    stem : str
        The file's name without its suffix: ``s1`` and ``s1.svs`` are the slide ``s1``; ``s2``,
        ``s2.ome`` and ``s2.ome.tif`` are the slide ``s2.ome``. Upper and lower case are alike.
    slide_ids : mapping of str to str
        Slide ids by the same in lower case (`str.casefold`).
    """
    name = stem.casefold()
    bare = name.removesuffix(Path(name).suffix) if Path(name).suffix in SLIDE_SUFFIXES else name
    candidates = (name, bare, bare.removesuffix(".ome"), f"{bare}.ome")
    return next((slide_ids[one] for one in candidates if one in slide_ids), None)


def find_files(folder, suffixes: Collection[str], what: str) -> FoundFiles:
    """Find files by name, in a folder and its subfolders.

    Linked folders are searched too, each folder once. Hidden files and folders, those of operating
    systems, and the data folders of MIRAX slides and Zarr stores are passed over. A link that leads
    nowhere is found like a file: who opens it will say so.

    Parameters
    ----------
    folder : path-like
    suffixes : set of str
        In lower case; upper case counts too.
    what : str
        What the files are, in the plural, for messages.

    Raises
    ------
    CatalogError
        If there is no such folder or no such file in it, a subfolder cannot be read, two files
        have the same name (upper and lower case alike), or a folder has several DICOM files:
        their names do not say which of them are parts of one slide.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CatalogError(f"{folder}: no such folder of {what}")
    files, passed_over = _walk(folder, suffixes, what)
    by_name: dict[str, Path] = {}
    dicom_folders: dict[Path, Path] = {}
    for file in files:
        if file.suffix.lower() == ".dcm" and file != dicom_folders.setdefault(file.parent, file):
            raise CatalogError(
                f"{file.parent}: holds several DICOM files, which may be one slide; list the"
                " slides in a table, one file of each"
            )
        if (other := by_name.setdefault(_stem(file, suffixes).casefold(), file)) == file:
            continue
        if file_identity(file) != file_identity(other):
            raise CatalogError(
                f"{file} and {other}: two {what} have the same name. Rename one, or list them in a"
                " table with ids of their own"
            )
        passed_over[file] = "further names of a file"
    if not by_name:
        note = passed_over_note(folder, passed_over)
        raise CatalogError(
            f"{folder}: holds no {what} ({' '.join(sorted(suffixes))})" + (note and f"; {note}")
        )
    by_name = {_stem(file, suffixes): file for file in by_name.values()}
    return FoundFiles(dict(sorted(by_name.items())), passed_over)


def _walk(folder: Path, suffixes, what: str) -> tuple[list[Path], dict[Path, str]]:
    """Files of the given suffixes, sorted, and all else by kind."""
    files, passed_over, searched = [], {}, set()
    folders: list[Path] = [folder]
    links: list[Path] = []
    while folders or links:
        here = folders.pop() if folders else links.pop(0)  # links last: a file's own path wins
        if (real := os.path.realpath(here)) in searched:
            passed_over[here] = "links to folders that were searched already"
            continue
        searched.add(real)
        try:
            entries = sorted(here.iterdir())
        except OSError as error:
            raise CatalogError(
                f"{here}: the folder cannot be read and may hold {what}: {error}"
            ) from error
        names = {entry.name.casefold() for entry in entries}
        for entry in entries:
            is_folder = entry.is_dir()
            if kind := _passed_over_kind(entry, is_folder, names, suffixes):
                passed_over[entry] = kind
            elif not is_folder:
                files.append(entry)
            else:
                (links if entry.is_symlink() else folders).append(entry)
    return sorted(files), passed_over


def _passed_over_kind(entry: Path, is_folder: bool, names: set[str], suffixes) -> str:
    """Why a file or folder is none of those wanted; empty if it is, or is to be searched."""
    suffix = entry.suffix.lower()
    if SYSTEM_NAMES.fullmatch(entry.name):
        return "hidden or system files"
    if is_folder:
        if f"{entry.name.casefold()}.mrxs" in names:
            return "data folders of MIRAX slides"
        return "Zarr stores" if suffix == ".zarr" else ""
    if _suffix(entry.name, suffixes) in suffixes:
        return ""
    if suffix in PARTIAL_SUFFIXES:
        return "unfinished downloads"
    return f"{suffix} files" if suffix else "files without suffix"


def passed_over_note(folder: Path, passed_over: Mapping[Path, str]) -> str:
    """Count what was passed over by kind and name the first of each; empty where nothing was."""
    if not passed_over:
        return ""
    of_kind = defaultdict(list)
    for path, kind in sorted(passed_over.items()):
        of_kind[kind].append(path.name)
    told = (f"{kind}: {len(names)} (first: {names[0]})" for kind, names in sorted(of_kind.items()))
    return f"passed over under {folder}: {'; '.join(told)}"
