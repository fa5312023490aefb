"""Files of results, each written whole or not at all."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd


def write_whole(path, data: bytes):
    """Write beside `path`, then rename: readers see the old file or the new one."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def write_csv(path, table: pd.DataFrame):
    """A table without its index; lines end with LF."""
    write_whole(path, table.to_csv(index=False, lineterminator="\n").encode())


def write_json(path, values: Mapping):
    """Values in JSON's own types; NaN and infinity become null."""
    write_whole(path, (json.dumps(_plain(values), indent=2, allow_nan=False) + "\n").encode())


def _plain(value):
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
