"""Stores that are filled slab by slab: the cache's, the heatmaps' and the fine heatmaps'.

A store is a value: it says what it is made of, and begins, fills and finishes itself. `fill_stores`
is the loop over them. The slabs of all slides are the units of one batch, so that no worker waits
for the last slab of a slide. A slide's store is filled under a temporary name and gets its own when
all of its slabs are there.
"""

import os
import shutil
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from distributed import Client

from wsi_pipeline.config import Config
from wsi_pipeline.errors import RunError
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.jobs.cluster import GPU_CORES
from wsi_pipeline.jobs.record import Record
from wsi_pipeline.jobs.run import Outcome, run_units
from wsi_pipeline.jobs.unit import (
    LargeFile,
    Output,
    SmallFile,
    Unhashed,
    Unit,
    hash_inputs,
    state_of,
)
from wsi_pipeline.patches.slabs import Slab
from wsi_pipeline.slides.open_slides import cached_slide
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.threads import decoding_in
from wsi_pipeline.stages.run_directory import index_path

HASH_DIGITS = 12


@dataclass(frozen=True)
class SlabStore(ABC):
    """One slide's store, and all that it depends on.

    Parameters
    ----------
    slide_id : str
    slide : LargeFile
    mpp : float
        Micrometres per level-0 px.
    index : SmallFile
        The patch index.
    folder : Output
        Where the store lies.
    """

    slide_id: str
    slide: LargeFile
    mpp: float
    index: SmallFile
    folder: Output

    @classmethod
    def of_slide(cls, row, config: Config, folder: Path, **inputs) -> Self:
        """Plan the store of a row of the catalog; `inputs` are the class's own."""
        return cls(
            slide_id=row.slide_id,
            slide=LargeFile.at(row.path),
            mpp=float(row.mpp),
            index=SmallFile.at(index_path(config.out, row.slide_id)),
            folder=Output(folder),
            **inputs,
        )

    @cached_property
    def made_of(self) -> dict:
        """What the store depends on, as plain JSON values."""
        return state_of(self)

    @property
    def part(self) -> Path:
        """The store while it is filled."""
        name = hash_inputs(self.made_of)[:HASH_DIGITS]
        return Path(self.folder) / f".{self.slide_id}-{name}.zarr"

    @property
    def out(self) -> Path:
        """The store when it is finished."""
        return Path(self.folder) / f"{self.slide_id}.zarr"

    @abstractmethod
    def begin(self) -> tuple[PatchGrid, Iterable[Slab]]:
        """Make an empty store, unless an earlier run has begun it.

        Returns
        -------
        grid : PatchGrid
            Of the patch index.
        slabs : sequence of Slab
            What is to be filled.

        Raises
        ------
        RunError, OSError
            If the index is damaged or the disk is full.
        """

    @abstractmethod
    def chunk_file(self, slab: Slab) -> Path:
        """What must exist for a slab to be filled."""

    @abstractmethod
    def fill(self, slide: Slide, grid: PatchGrid, slab: Slab) -> dict:
        """Do the work on a slab, on a worker.

        Returns
        -------
        dict
            ``unread``: x, y (level-0 px), reason of what cannot be decoded.
        """

    @abstractmethod
    def finish(self, unread: list[list]) -> dict:
        """Complete the store and give it its name, on a worker.

        Returns
        -------
        dict
            ``failures``: what cannot be decoded, a sentence each; and what the stage records.
        """

    def older(self) -> list[Path]:
        """The slide's stores that give way to this one; one that is finished is among them."""
        begun = self.out.parent.glob(f".{self.slide_id}-{'?' * HASH_DIGITS}.zarr")
        return [store for store in (self.out, *begun) if store != self.part and store.exists()]


@dataclass(frozen=True)
class FillSlab(Unit):
    """Fill a slab of a store. On a local worker, a GPU is fed by its share of all cores."""

    store: SlabStore
    grid: Unhashed[PatchGrid]
    slab: Unhashed[Slab]

    @property
    def key(self) -> str:
        """Slide and chunk."""
        return f"{self.slide_id}/{self.slab.chunk[0]}.{self.slab.chunk[1]}"

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The chunk."""
        return (self.store.chunk_file(self.slab),)

    def run(self) -> dict:
        """As `SlabStore.fill`."""
        with decoding_in(int(os.environ.get(GPU_CORES, 0))):
            slide = cached_slide(self.store.slide.path, self.store.mpp)
            return self.store.fill(slide, self.grid, self.slab)


@dataclass(frozen=True)
class FinishStore(Unit):
    """Complete a store all of whose slabs are filled."""

    store: SlabStore
    unread: Unhashed[list[list]]

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The finished store."""
        return (self.store.out,)

    def run(self) -> dict:
        """As `SlabStore.finish`."""
        return self.store.finish(self.unread)


@dataclass(frozen=True)
class RefuseStore(Unit):
    """Fail, so that what is wrong with one slide is recorded and the others go on."""

    reason: str

    @property
    def key(self) -> str:
        """The slide, where a chunk would be named."""
        return f"{self.slide_id}/"

    def run(self) -> dict:
        """Raise RunError."""
        raise RunError(self.reason)


def fill_stores(
    config: Config,
    client: Client,
    stores: Sequence[SlabStore],
    *,
    fill: str,
    finish: str,
    schema_version: int,
    resources: dict[str, float] | None = None,
) -> Outcome:
    """Fill and finish the stores that are not finished.

    Parameters
    ----------
    config : Config
    client : distributed.Client
    stores : sequence of SlabStore
        Each is begun when its first slab has room among the units in flight. A RunError or OSError
        that this raises fails the slide, not the batch.
    fill, finish : str
        What the record calls the work on slabs and on slides.
    schema_version : int
        Of the stores.
    resources : dict, optional
        What a worker must offer to fill a slab.
    """
    record = Record(config.out, finish)
    common: dict[str, Any] = {
        "run_dir": config.out,
        "schema_version": schema_version,
        "retries": config.jobs.retries,
        "window": config.jobs.window,
    }
    expected: Counter[str] = Counter()

    def slab_units() -> Iterator[Unit]:
        for store in stores:
            if not record.is_done(finish_unit(store), schema_version):
                for unit in _slab_units(store):
                    expected[store.slide_id] += 1
                    yield unit

    filled = run_units(client, slab_units(), stage=fill, resources=resources, **common)
    results = defaultdict(list)
    for key, result in filled.results.items():
        results[key.rpartition("/")[0]].append(result)
    finish_units = [
        finish_unit(store, results[store.slide_id])
        for store in stores
        if len(results[store.slide_id]) == expected[store.slide_id]
    ]
    return filled + run_units(client, finish_units, stage=finish, **common)


def finish_unit(store: SlabStore, results: Sequence[dict] = ()) -> FinishStore:
    """The unit that finishes a store whose slabs returned these results."""
    unread = [place for result in results for place in result["unread"]]
    return FinishStore(store.slide_id, store, unread)


def failure_texts(unread: list[list], what: str) -> list[str]:
    """What cannot be decoded (x, y, reason), each in a sentence for the record."""
    return [f"{what} at level-0 px ({x}, {y}): {reason}" for x, y, reason in unread]


def begin_whole(part: Path, make) -> None:
    """Make an empty store at `part` unless it is there: ``make(path)``, then a renaming."""
    if not part.exists():
        empty = part.with_suffix(".empty")  # killed here, it is made anew
        make(empty)
        empty.rename(part)


def _slab_units(store: SlabStore) -> Iterator[Unit]:
    """Give a slide's units, or one that fails; its older stores make room first."""
    try:
        for older in store.older():
            shutil.rmtree(older)
        grid, slabs = store.begin()
        for slab in slabs:
            yield FillSlab(store.slide_id, store, grid, slab)
    except (OSError, RunError) as error:  # an index is damaged; the disk is full
        yield RefuseStore(store.slide_id, str(error))
