"""The cache stage: the patches that training draws from, one sharded Zarr array for each slide.

Optional, between tile and train: docs/training.md says when it pays.
"""

import shutil
from itertools import accumulate
from pathlib import Path

import numpy as np
from distributed import Client

from wsi_pipeline.config import Config
from wsi_pipeline.errors import RunError
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.jobs.record import Record
from wsi_pipeline.jobs.run import Outcome
from wsi_pipeline.patches.cache import (
    SCHEMA,
    SHARD,
    PatchCache,
    create_cache,
    finish_cache,
    open_cache,
    shard_file,
    write_shard,
)
from wsi_pipeline.patches.index import read_index
from wsi_pipeline.patches.overlapping_reads import UnreadPatch, readable_patches
from wsi_pipeline.patches.slabs import Slab, slabs
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages.run_directory import (
    CACHE_STAGES,
    TRAINING_SPLITS,
    cache_path,
    tiled_slides,
)
from wsi_pipeline.stages.stores import (
    SlabStore,
    begin_whole,
    failure_texts,
    fill_stores,
    finish_unit,
)


def run(config: Config, client: Client) -> Outcome:
    """Write ``RUN/cache/SLIDE.zarr`` for each tiled slide of the train and validation splits.

    Raises
    ------
    RunError
        If no such slide is tiled, or the disk may have too little room.
    """
    slides = tiled_slides(config.out, TRAINING_SPLITS)
    folder = cache_path(config.out, "any").parent
    folder.mkdir(exist_ok=True)
    stores = [CacheStore.of_slide(s, config, folder) for s in slides.itertuples(index=False)]
    _check_room(config, stores, folder)
    shards, finish = CACHE_STAGES
    return fill_stores(config, client, stores, fill=shards, finish=finish, schema_version=SCHEMA)


class CacheStore(SlabStore):
    """A slide's cached patches: those whose label is known."""

    def begin(self) -> tuple[PatchGrid, list[Slab]]:
        """A slab is the labelled patches of a shard."""
        grid, rows, cols = _labelled(self.index.path)
        begin_whole(self.part, lambda path: create_cache(path, grid=grid, made_of=self.made_of))
        return grid, slabs(grid, rows, cols, SHARD)

    def chunk_file(self, slab: Slab) -> Path:
        """The shard's file."""
        return shard_file(self.part, slab.chunk)

    def fill(self, slide: Slide, grid: PatchGrid, slab: Slab) -> dict:
        """Read the slab's patches and write its shard; ``patches`` is their number."""
        unread: list[UnreadPatch] = []
        patches = readable_patches(slide, grid, slab, unread, as_indexed=True)
        cells = ((slab.rows[n], slab.cols[n], pixels) for n, pixels in patches)
        write_shard(self.part, slab.chunk, cells)
        return {"patches": len(slab.rows), "unread": unread}

    def finish(self, unread: list[list]) -> dict:
        """Note what cannot be decoded in the cache; returns ``failures``."""
        if self.part.exists():  # else a worker died between renaming the store and saying so
            finish_cache(self.part, ((x, y, reason) for x, y, reason in unread))
            self.part.rename(self.out)
        return {"failures": failure_texts(unread, "patch")}


def cache_of(store: CacheStore) -> PatchCache:
    """Open the cache of a slide, made of the slide and the patch index that are there now.

    Raises
    ------
    RunError
        If it is missing or was made of others.
    """
    cache = open_cache(store.out)
    now = store.made_of
    changed = [name for name in now if cache.made_of.get(name) != now[name]]
    if changed:
        raise RunError(
            f"{cache.path}: made of another {' and '.join(changed)} than {store.slide.path} has"
            " now: run `wsi cache`, or set train.cache to false"
        )
    return cache


def _labelled(index) -> tuple[PatchGrid, np.ndarray, np.ndarray]:
    """Grid, rows and columns of the patches that can be drawn: their label is known."""
    found = read_index(index)
    known = found.table["label"].to_numpy() >= 0
    rows, cols = found.cells()
    return found.grid, rows[known], cols[known]


def _check_room(config: Config, stores: list[CacheStore], folder: Path) -> None:
    """Refuse what may not fit: the patches, uncompressed, of the shards that are not there.

    A slide's old caches make room for it and for those after it, but not for those before.
    """
    record = Record(config.out, CACHE_STAGES[1])
    waiting = [store for store in stores if not record.is_done(finish_unit(store), SCHEMA)]
    more = [_missing_bytes(store) - _older_bytes(store) for store in waiting]
    needed = max(accumulate(more), default=0)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{folder}: the patches of {len(waiting)} slides may take {needed / 1e9:,.1f} GB beside"
            " the room of old caches that are deleted for them; compressed, patches take some half;"
            f" {free / 1e9:,.1f} GB are free"
        )


def _older_bytes(store: CacheStore) -> int:
    files = (file for older in store.older() for file in older.rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files)


def _missing_bytes(store: CacheStore) -> int:
    try:
        grid, rows, cols = _labelled(store.index.path)
        shards = slabs(grid, rows, cols, SHARD)
    except RunError:
        return 0  # of this index there will be no cache: its slide fails when its turn comes
    missing = (len(s.rows) for s in shards if not store.chunk_file(s).exists())
    return sum(missing) * grid.patch_px**2 * 3
