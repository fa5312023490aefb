"""The patch cache: a slide's labelled patches as they are read from it, in a sharded Zarr array.

One Zarr 3 array for each slide, uint8 (grid rows, grid columns, patch_px, patch_px, 3): a chunk is
the patch of a cell, and a shard `SHARD` x `SHARD` cells, written once and by one writer. Cells
without a patch take no room. Any Zarr library reads it, and `zarr` makes its metadata; shards are
written and read here, after the Zarr 3 specification ("sharding_indexed", version 1.0):

- zarr-python reads some 200 patches of 512 px a second, whatever the codec, which is slower than
  decoding the tiles of a JPEG slide (docs/training.md);
- a shard stays compressed in memory while it is written, patch by patch.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c
import numpy as np
import zarr
from numcodecs import Blosc
from zarr.codecs import BloscCodec, Crc32cCodec

from wsi_pipeline.errors import RunError, SlideReadError, WsiError
from wsi_pipeline.files import replace_atomically
from wsi_pipeline.geometry import PatchGrid

SCHEMA = 2
SHARD = 16
"""Side of a shard, cells: up to 201 MB of 512 px patches, which writing one keeps compressed."""

# Of the lossless codecs, the one that is decoded several times as fast as the others; zstd would
# save a tenth of the room on real slides (docs/training.md).
_LZ4 = Blosc("lz4", clevel=5, shuffle=Blosc.NOSHUFFLE)
_LZ4_METADATA = BloscCodec(typesize=1, cname="lz4", clevel=5, shuffle="noshuffle")
# A shard ends with its index, offset and length of each chunk, little-endian. The index and each
# chunk end with their CRC32C: LZ4 decodes most damage to other pixels, without a word.
_CHECKSUM_BYTES = 4
_ENTRY = np.dtype("<u8")
_ABSENT = np.iinfo(_ENTRY).max
_ENTRY_BYTES = 2 * _ENTRY.itemsize
_INDEX_BYTES = SHARD * SHARD * _ENTRY_BYTES + _CHECKSUM_BYTES


@dataclass(frozen=True)
class PatchCache:
    """The cached patches of one slide. It keeps no file open.

    Parameters
    ----------
    path : Path
        The Zarr array's folder.
    grid : PatchGrid
    made_of : dict
        What the patches depend on, as it was given to `create_cache`.
    unread : dict
        Corner (x, y) of each patch that could not be decoded, to the reason.
    """

    path: Path
    grid: PatchGrid
    made_of: dict
    unread: dict[tuple[int, int], str] = field(default_factory=dict)

    def read(self, x: int, y: int, out: np.ndarray | None = None) -> np.ndarray:
        """Pixels of a patch.

        Parameters
        ----------
        x, y : int
            Its upper left corner, level-0 px, as in the patch index.
        out : uint8 array, shape (patch_px, patch_px, 3), C-contiguous, optional
            Filled and returned.

        Returns
        -------
        uint8 array, shape (patch_px, patch_px, 3)

        Raises
        ------
        SlideReadError
            If the slide could not be decoded there: the error that reading it gave.
        RunError
            If the cache lacks the patch or is damaged.
        """
        if reason := self.unread.get((x, y)):
            raise SlideReadError(reason)
        row, col = (int(cell) for cell in self.grid.cells_at(x, y))
        if out is None:
            out = np.empty((self.grid.patch_px, self.grid.patch_px, 3), np.uint8)
        try:
            return _LZ4.decode(self._stored(row, col), out=out)
        except (OSError, RuntimeError, ValueError) as error:
            raise RunError(
                f"{shard_file(self.path, (row // SHARD, col // SHARD))}: the patch in row {row},"
                f" column {col} cannot be read: {error}; delete {self.path} and run `wsi cache`"
            ) from error

    def _stored(self, row: int, col: int) -> bytes:
        entry = _ENTRY_BYTES * (row % SHARD * SHARD + col % SHARD)
        with shard_file(self.path, (row // SHARD, col // SHARD)).open("rb", buffering=0) as file:
            # The whole index: where a file was cut off, an entry alone might be that of another.
            if file.seek(0, os.SEEK_END) < _INDEX_BYTES:
                raise ValueError("the shard is cut off")
            file.seek(-_INDEX_BYTES, os.SEEK_END)
            index = _checked(file.read(_INDEX_BYTES), "the shard's index")
            start, count = np.frombuffer(index, _ENTRY, 2, entry).tolist()
            if start == _ABSENT:
                raise ValueError("it is not there")
            file.seek(start)
            return _checked(file.read(count), "its pixels")


def create_cache(path, *, grid: PatchGrid, made_of: dict) -> None:
    """Write an empty cache; replaces what is there, such as what a kill left half made.

    Parameters
    ----------
    path : path-like
        Fill it under a temporary name and rename it when it is finished.
    grid : PatchGrid
    made_of : dict
        What the patches depend on, plain JSON values: another one tells another cache.
    """
    patch = (grid.patch_px, grid.patch_px, 3)
    zarr.create_array(
        path,
        shape=(*grid.shape, *patch),
        chunks=(1, 1, *patch),
        shards=(SHARD, SHARD, *patch),
        dtype=np.uint8,
        fill_value=0,
        compressors=(_LZ4_METADATA, Crc32cCodec()),
        dimension_names=("row", "column", "y", "x", "channel"),
        attributes={"wsi_pipeline": {"schema": SCHEMA, "grid": grid.to_dict(), "made_of": made_of}},
        overwrite=True,
    )


def write_shard(
    path, shard: tuple[int, int], patches: Iterable[tuple[int, int, np.ndarray]]
) -> None:
    """Write one shard, whole or not at all.

    Parameters
    ----------
    path : path-like
        The cache.
    shard : (int, int)
        Its row and column among the shards.
    patches : iterable of (row, column, pixels)
        Cells of the grid within the shard and their uint8 arrays (patch_px, patch_px, 3); taken
        one at a time.
    """
    chunks, offset = [], 0
    index = np.full((SHARD, SHARD, 2), _ABSENT, _ENTRY)
    for row, col, pixels in patches:
        chunks.append(_with_checksum(_LZ4.encode(np.ascontiguousarray(pixels))))
        index[row - shard[0] * SHARD, col - shard[1] * SHARD] = offset, len(chunks[-1])
        offset += len(chunks[-1])
    file = shard_file(path, shard)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(file) as part, part.open("wb") as whole:
        whole.writelines([*chunks, _with_checksum(index.tobytes())])


def shard_file(path, shard: tuple[int, int]) -> Path:
    """The file of a shard, by its row and column among the shards."""
    return Path(path, "c", str(shard[0]), str(shard[1]), "0", "0", "0")


def finish_cache(path, unread: Iterable[tuple[int, int, str]]) -> None:
    """Note the patches that could not be decoded: corner x, y and reason of each."""
    array = zarr.open_array(path, mode="r+")
    own = {**array.attrs["wsi_pipeline"], "unread": [list(patch) for patch in unread]}
    array.attrs["wsi_pipeline"] = own


def open_cache(path) -> PatchCache:
    """Open a finished cache for reading.

    Raises
    ------
    RunError
        If there is none, it is not of this pipeline or of another schema, or it is damaged.
    """
    path = Path(path)
    try:
        array = zarr.open_array(path, mode="r")
        own = array.attrs["wsi_pipeline"]
        if own["schema"] != SCHEMA:
            raise RunError(f"schema {own['schema']}, while this version reads {SCHEMA}")
        grid = PatchGrid.from_dict(own["grid"])
        unread = {(x, y): reason for x, y, reason in own["unread"]}
        return PatchCache(path, grid, own["made_of"], unread)
    except (OSError, KeyError, TypeError, ValueError, WsiError) as error:
        raise RunError(
            f"{path}: no finished patch cache, or a damaged one: {type(error).__name__}: {error};"
            " run `wsi cache`"
        ) from error


def _with_checksum(data: bytes) -> bytes:
    return data + google_crc32c.value(data).to_bytes(_CHECKSUM_BYTES, "little")


def _checked(stored: bytes, what: str) -> bytes:
    """What was given to `_with_checksum`; ValueError if it is not that any more."""
    data = stored[:-_CHECKSUM_BYTES]
    checksum = google_crc32c.value(data).to_bytes(_CHECKSUM_BYTES, "little")
    if checksum != stored[-_CHECKSUM_BYTES:]:
        raise ValueError(f"the checksum of {what} is wrong")
    return data
