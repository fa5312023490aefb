"""The cache stage: the patches that training draws from, one sharded Zarr array for each slide.

Optional, between tile and train: docs/training.md says when it pays.
"""

import shutil
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
from distributed import Client

from wsi_pipeline.config import Config
from wsi_pipeline.errors import RunError
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.jobs.record import Record
from wsi_pipeline.jobs.run import Outcome, Unit
from wsi_pipeline.patches.bands import UnreadPatch, readable_patches
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
from wsi_pipeline.patches.slabs import Slab, slabs
from wsi_pipeline.slides.open_slides import cached_slide
from wsi_pipeline.stages.run_directory import (
    CACHE_STAGES,
    TRAINING_SPLITS,
    cache_path,
    tiled_slides,
)
from wsi_pipeline.stages.slab_stores import (
    StorePlan,
    all_unread,
    failure_texts,
    fill_stores,
    old_stores,
    plan_store,
    slide_inputs,
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
    plans = [
        plan_store(slide, config, folder, schema=SCHEMA) for slide in slides.itertuples(index=False)
    ]
    _check_room(config, plans, folder)
    shards, finish = CACHE_STAGES
    return fill_stores(
        config, client, plans, _shard_units, _finish_unit,
        fill=shards, finish=finish, schema_version=SCHEMA,
    )  # fmt: skip


def cache_shard(slide_path: str, mpp: float, grid: PatchGrid, slab: Slab, store: str) -> dict:
    """Read a slab and write its shard: the work of a unit.

    Returns
    -------
    dict
        ``patches`` (their number) and ``unread``: x, y, reason of those that cannot be decoded.
    """
    unread: list[UnreadPatch] = []
    slide = cached_slide(slide_path, mpp)
    patches = readable_patches(slide, grid, slab, unread, as_indexed=True)
    cells = ((slab.rows[n], slab.cols[n], pixels) for n, pixels in patches)
    write_shard(store, slab.chunk, cells)
    return {"patches": len(slab.rows), "unread": unread}


def finish_slide(part: str, out: str, unread: list[list]) -> dict:
    """Complete a slide's cache and give it its name: the work of a unit."""
    if Path(part).exists():  # else a worker died between renaming the store and saying so
        finish_cache(part, unread)
        Path(part).rename(out)
    return {"failures": failure_texts(unread)}


def cache_of(slide: dict) -> PatchCache:
    """Open the cache of a slide, made of the slide and the patch index that are there now.

    Parameters
    ----------
    slide : dict
        ``path``, ``mpp``, ``index`` (the patch index's path) and ``cache`` (the cache's).

    Raises
    ------
    RunError
        If it is missing or was made of others.
    """
    cache = open_cache(slide["cache"])
    now = slide_inputs(slide["path"], slide["mpp"], slide["index"])
    changed = [name.replace("_", " ") for name in now if cache.made_of.get(name) != now[name]]
    if changed:
        raise RunError(
            f"{cache.path}: made of another {' and '.join(changed)} than {slide['path']} has now:"
            " run `wsi cache`, or set train.cache to false"
        )
    return cache


def _shard_units(plan: StorePlan) -> Iterator[Unit]:
    """A unit for each shard of a slide's cache; it is made first."""
    grid, rows, cols = _labelled(plan.index)
    if not plan.part.exists():
        empty = plan.part.with_suffix(".empty")  # killed here, it is made anew
        create_cache(empty, grid=grid, made_of=plan.inputs)
        empty.rename(plan.part)
    for slab in slabs(grid, rows, cols, SHARD):
        arguments = {
            "slide_path": plan.slide_path,
            "mpp": plan.mpp,
            "grid": grid,
            "slab": slab,
            "store": str(plan.part),
        }
        key = f"{plan.slide_id}/{slab.chunk[0]}.{slab.chunk[1]}"
        output = shard_file(plan.part, slab.chunk)
        yield Unit(key, plan.slide_id, plan.inputs, cache_shard, arguments, output)


def _finish_unit(plan: StorePlan, results: list[dict]) -> Unit:
    arguments = {"part": str(plan.part), "out": str(plan.out), "unread": all_unread(results)}
    return Unit(plan.slide_id, plan.slide_id, plan.inputs, finish_slide, arguments, plan.out)


def _labelled(index) -> tuple[PatchGrid, np.ndarray, np.ndarray]:
    """Grid, rows and columns of the patches that can be drawn: their label is known."""
    found = read_index(index)
    known = found.table["label"].to_numpy() >= 0
    rows, cols = found.cells()
    return found.grid, rows[known], cols[known]


def _check_room(config: Config, plans: list[StorePlan], folder: Path) -> None:
    """Refuse what may not fit: the patches, uncompressed, of the shards that are not there.

    A slide's old caches make room for it and for those after it, but not for those before.
    """
    record = Record(config.out, CACHE_STAGES[1])
    waiting = [plan for plan in plans if not record.is_done(_finish_unit(plan, []), SCHEMA)]
    more = [_missing_bytes(plan) - _old_bytes(plan) for plan in waiting]
    needed = max(accumulate(more), default=0)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{folder}: the patches of {len(waiting)} slides may take {needed / 1e9:,.1f} GB beside"
            " the room of old caches that are deleted for them; compressed, patches take some half;"
            f" {free / 1e9:,.1f} GB are free"
        )


def _old_bytes(plan: StorePlan) -> int:
    files = (file for store in old_stores(plan) for file in store.rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files)


def _missing_bytes(plan: StorePlan) -> int:
    try:
        grid, rows, cols = _labelled(plan.index)
        shards = slabs(grid, rows, cols, SHARD)
    except RunError:
        return 0  # of this index there will be no cache: its slide fails when its turn comes
    missing = (len(s.rows) for s in shards if not shard_file(plan.part, s.chunk).exists())
    return sum(missing) * grid.patch_px**2 * 3
