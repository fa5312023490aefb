"""Which names, files and copies are one slide."""

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from wsi_pipeline.errors import CatalogError
from wsi_pipeline.slides.reader import Slide

BLOCK_BYTES, BLOCKS = 1 << 16, 16


def file_identity(path) -> tuple | str:
    """What is alike for all names of a file: links, hard links and ``..`` do not count.

    A file that is not there is known by its resolved path.
    """
    try:
        stat = Path(path).stat()
    except OSError:
        return os.path.realpath(path)
    # Size and time as well: some network file systems give two files one number.
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def existing_form(path: str) -> str:
    """Find a path whose accents a file system spells in another form of Unicode (macOS: NFD).

    Returns
    -------
    str
        `path` itself where a file of this name, or none of any form, exists.
    """
    if path.isascii() or Path(path).exists():
        return path
    forms = (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))
    return next((form for form in forms if Path(form).exists()), path)


def refuse_same_files(
    slides: pd.DataFrame, column: str, source: str, places: Sequence[str]
) -> None:
    """Refuse a file that several slides have, under one name or several.

    Parameters
    ----------
    slides : DataFrame
        ``slide_id`` and the column, in which paths may be missing.
    column : str
        ``path`` or ``annotation``.
    source : str
        The table or folder, for messages.
    places : sequence of str
        Where in it each slide is stated.

    Raises
    ------
    CatalogError
        If there is one; the message names the slides and the paths.
    """
    paths = slides[column].fillna("")
    for rows in _alike(file_identity(path) if path else None for path in paths):
        told = ", ".join(
            f"{slides['slide_id'].iloc[at]} ({places[at]}, {slides[column].iloc[at]})"
            for at in rows
        )
        raise CatalogError(
            f"{source}: the same {column} is there {len(rows)} times, for the slides {told}. Each"
            " slide is stated once, with files of its own; links to a file count as the file"
        )


def slide_fingerprint(slide: Slide) -> str:
    """What is alike for copies of a slide, whatever their names; little of it is read.

    OpenSlide's ``quickhash-1``, which identifies a slide by its coarsest level and what it states
    of itself (of DICOM files, by their series), with the size of level 0. Where OpenSlide gives
    none, since the coarsest level is large, the file's size and 16 blocks of it.
    """
    if slide.quickhash is None:
        return content_fingerprint(slide.path)
    return f"{slide.quickhash}, {slide.size[0]} x {slide.size[1]} px"


def content_fingerprint(path) -> str:
    """Hash of a file's size and of 16 blocks of 64 KiB, evenly spaced from its head to its tail."""
    size = Path(path).stat().st_size
    found = hashlib.sha256(f"{size} bytes".encode())
    with Path(path).open("rb") as file:
        for offset in np.linspace(0, max(0, size - BLOCK_BYTES), BLOCKS).astype(int).tolist():
            file.seek(offset)
            found.update(file.read(BLOCK_BYTES))
    return found.hexdigest()


def copies(fingerprints: dict[str, str]) -> list[list[str]]:
    """Slides with the same fingerprint: groups of slide ids, in the order given."""
    slide_ids = list(fingerprints)
    return [[slide_ids[at] for at in rows] for rows in _alike(fingerprints.values())]


def _alike(values: Iterable) -> list[list[int]]:
    """Positions of each value that is there more than once; None is no value."""
    positions = defaultdict(list)
    for at, value in enumerate(values):
        if value is not None:
            positions[value].append(at)
    return [found for found in positions.values() if len(found) > 1]
