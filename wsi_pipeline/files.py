"""Files that are there whole or not at all."""

import json
import math
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd


@contextmanager
def replace_atomically(path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; then rename it to `path`.

    Readers see the old file or the new one, never half of one, also after a kill of the process.
    After an exception the old file stays and the temporary one is removed.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path, data: bytes) -> None:
    """Write `data`, whole or not at all."""
    with replace_atomically(path) as part:
        part.write_bytes(data)


def write_csv(path, table: pd.DataFrame) -> None:
    """Write a table without its index; lines end with LF."""
    write_whole(path, table.to_csv(index=False, lineterminator="\n").encode())


def write_json(path, values: Mapping) -> None:
    """Write values in JSON's own types; NaN and infinity become null."""
    write_whole(path, (json.dumps(_plain(values), indent=2, allow_nan=False) + "\n").encode())


def _plain(value):
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
