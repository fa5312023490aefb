"""Slides that a process keeps open."""

import os
from functools import lru_cache
from pathlib import Path

from wsi_pipeline.errors import SlideError
from wsi_pipeline.slides.reader import Slide

# Training draws from hundreds of slides in turn, and opening one takes milliseconds.
OPEN_SLIDES = 64


def cached_slide(path, mpp: float | None = None) -> Slide:
    """Get a slide from the few that this process keeps open, for Dask workers.

    A file that was replaced is opened anew. A slide that falls out closes when its last reader
    lets go of it.

    Raises
    ------
    SlideError
        As `Slide`.
    """
    try:
        state = Path(path).stat()
    except OSError as error:
        raise SlideError(f"{path}: cannot be opened: {error.strerror}") from error
    return _cached(os.fspath(path), mpp, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=OPEN_SLIDES)
def _cached(path, mpp, _mtime_ns, _size) -> Slide:
    return Slide(path, mpp)
