"""Drawn patches as torch batches: read where they are drawn, from the slides or their caches."""

import logging
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from wsi_pipeline.errors import ConfigError, RunError, SlideReadError, WsiError
from wsi_pipeline.patches.cache import PatchCache
from wsi_pipeline.patches.overlapping_reads import read_patch
from wsi_pipeline.patches.sampling import PatchPool, draw
from wsi_pipeline.slides.open_slides import cached_slide

Item = TypeVar("Item")
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Images uint8 (N, 3, P, P), labels 0 or 1 (N,), numbers of the draws int64 (N,)."""

MOST_UNREAD = 100
"""Patches one after another that cannot be decoded, after which reading ends with an error."""

AHEAD = 2
"""Blocks that are being read while one is in use."""

SHARED_MEMORY = Path("/dev/shm")

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PatchDataset:
    """A sequence of drawn patches and the slides to read them from.

    Parameters
    ----------
    pool : PatchPool
    slides : sequence of (path, mpp)
        In the order of the pool's slides.
    seed : int
    name : str
        Sets apart the sequences of one seed ("train", "validation").
    caches : sequence of PatchCache, optional
        In the order of the slides: read in their place.
    """

    pool: PatchPool
    slides: Sequence[tuple[str | Path, float]]
    seed: int
    name: str
    caches: Sequence[PatchCache] | None = None


class PatchLoader:
    """Reads batches of a dataset's draws, in processes that live as long as it does.

    Batch ``s`` is draws ``s * batch_size`` to ``(s + 1) * batch_size - 1`` over all ranks; each
    takes a consecutive share. What is drawn depends neither on ranks nor on workers. A patch that
    cannot be decoded is left out of its batch, which is then shorter, or even empty: another one in
    its place would bend the sampling.

    As many batches as there are workers, a block, are read together: its draws, sorted by slide,
    are cut into a part for each worker. So a worker comes back to the same slides, and of a cohort
    of up to some 50 slides a worker each stays open (see `cached_slide`): reading from a slide
    that is open takes a fraction of the time. Three blocks lie in memory that all the processes
    share: each patch is decoded where it stays until a thread copies its batch out of there, while
    the batch before is in use.

    Parameters
    ----------
    dataset : PatchDataset
    batch_size : int
        Over all ranks.
    rank, world : int
    workers : int
        Loader processes; 0 reads in this one.
    pin : bool
        Page-locked memory, for copies to a GPU.
    on_unread : callable
        Is told of each patch that cannot be decoded: the slide, the place and the reason.

    Raises
    ------
    ConfigError
        If the ranks cannot share a batch evenly, or there is too little shared memory.
    """

    def __init__(
        self,
        dataset: PatchDataset,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin: bool = False,
        on_unread: Callable[[str], None] = log.warning,
    ):
        if batch_size % world:
            raise ConfigError(
                f"train.batch_size is {batch_size}: {world} processes cannot share it evenly"
            )
        share, parts = batch_size // world, max(1, workers)
        side = dataset.pool.grids[0].patch_px
        pixels = torch.empty(1 + AHEAD, parts * share, side, side, 3, dtype=torch.uint8)
        self._pixels = _shared(pixels, workers) if workers else pixels
        self._draws = _BlockDraws(dataset, batch_size, rank * share, share, parts)
        self._pin = pin
        self._on_unread = on_unread
        self._unread_in_a_row = 0
        self._open = False
        self._ahead = _in_a_thread if workers else iter
        self._loader = DataLoader(
            _Reader(dataset, self._pixels),
            # A part travels whole; torch's types know batches as lists of samples alone.
            batch_sampler=self._draws,  # type: ignore[arg-type]
            collate_fn=_as_read,  # type: ignore[arg-type]
            num_workers=workers,
            in_order=True,  # `_BlockDraws.blocks` relies on it
            prefetch_factor=AHEAD if workers else None,  # of each process: a part of each block
            multiprocessing_context=_clean_processes() if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=_start_loader_process,
            # Its own, or starting to iterate would take a number from the global generator.
            generator=torch.Generator(),
        )

    def batches(self, first_step: int, steps: int) -> Iterator[Batch]:
        """Batches `first_step` to ``first_step + steps - 1``; one such iteration at a time.

        It is open from its first batch until it ends, is closed or dropped.

        Yields
        ------
        images : uint8 tensor, shape (N, 3, patch_px, patch_px)
            N is ``batch_size / world``, less the patches that cannot be decoded.
        labels : float32 tensor, shape (N,)
        numbers : int64 tensor, shape (N,)
            The draws' numbers.

        Raises
        ------
        SlideError
            If a slide cannot be opened.
        SlideReadError
            If `MOST_UNREAD` patches or more, of whole shares one after another, cannot be decoded.
            An iteration from step 0 on starts to count anew.
        RunError
            If a cache lacks a patch or is damaged, or a loader process was killed.
        RuntimeError
            If another iteration is open.
        """
        if not steps:
            return  # without starting processes
        if self._open:  # they would share the processes, and so each other's batches
            raise RuntimeError("another iteration over this PatchLoader's batches is open")
        self._open = True
        if not first_step:  # a validation set starts over: its draws count once
            self._unread_in_a_row = 0
        try:
            self._draws.steps = range(first_step, first_step + steps)
            with closing(self._batches()) as made, closing(self._ahead(made)) as ready:
                for batch, unread in ready:
                    for reason in unread:
                        self._on_unread(reason)
                    self._count(unread)
                    yield batch
        finally:
            self._open = False

    def _count(self, unread: list[str]) -> None:
        """Of a share: how many patches in a row are lost by now, over epochs too."""
        all_lost = len(unread) == self._draws.share
        self._unread_in_a_row = self._unread_in_a_row + len(unread) if all_lost else 0
        if self._unread_in_a_row >= MOST_UNREAD:
            raise SlideReadError(
                f"none of the last {self._unread_in_a_row} patches can be decoded: {unread[-1]}"
            )

    def _batches(self) -> Generator[tuple[Batch, list[str]]]:
        """Each step's batch, and why patches are missing from it."""
        parts, share = _parts_read(self._loader), self._draws.share
        for slot, block in self._draws.blocks():
            labels, unread = _read(slot, islice(parts, self._draws.parts))
            for i, step in enumerate(block):
                places = range(i * share, (i + 1) * share)
                kept = np.array([place for place in places if place not in unread], np.int64)
                images = self._copied(self._pixels[slot], kept).permute(0, 3, 1, 2)
                numbers = torch.from_numpy(kept - places.start + self._draws.numbers(step).start)
                missing = [unread[place] for place in places if place in unread]
                yield (images, self._copied(labels, kept), numbers), missing

    def _copied(self, of_block: torch.Tensor, places: np.ndarray) -> torch.Tensor:
        """What is at some places of a block, copied."""
        copy = of_block.new_empty(len(places), *of_block.shape[1:], pin_memory=self._pin)
        # By numpy: torch would share it out to threads, on cores that loader processes need.
        np.take(of_block.numpy(), places, axis=0, out=copy.numpy(), mode="clip")
        return copy


class _Part(NamedTuple):
    """Draws for one worker to read: arrays, shape (n,).

    Their pixels go to the block's slot, each to the place of its draw among the block's.
    """

    slot: int
    place: np.ndarray
    label: np.ndarray
    slide: np.ndarray
    x: np.ndarray
    y: np.ndarray


class _ReadPart(NamedTuple):
    """Slot, places and labels of a part's draws, and by place why some cannot be decoded.

    Or the error that stopped the worker: raised there, it would come with the worker's traceback
    as text.
    """

    slot: int
    place: np.ndarray
    label: np.ndarray
    unread: dict[int, str]
    error: WsiError | None = None


@dataclass
class _BlockDraws:
    """The draws of some steps: blocks of `parts` batches, of each block as many parts.

    They are drawn here, so that loader processes need not hold the pool.
    """

    dataset: PatchDataset
    batch_size: int
    first: int  # of this rank's draws of a batch
    share: int
    parts: int
    steps: range = range(0)

    def blocks(self) -> Iterator[tuple[int, range]]:
        """The slot of each block, and its steps.

        Of the block that comes to the same slot, no part is given out before the first part of
        the block after this one is asked for.
        """
        for first in range(0, len(self.steps), self.parts):
            slot = first // self.parts % (1 + AHEAD)
            yield slot, self.steps[first : first + self.parts]

    def numbers(self, step: int) -> range:
        """Numbers of a step's draws."""
        first = step * self.batch_size + self.first
        return range(first, first + self.share)

    def __iter__(self) -> Iterator[_Part]:
        return (part for block in self.blocks() for part in self._parts(*block))

    def _parts(self, slot: int, block: range) -> Iterator[_Part]:
        data, drawn = self.dataset, []
        for step in block:
            numbers = self.numbers(step)
            draws = draw(
                data.pool, seed=data.seed, name=data.name, first=numbers[0], count=len(numbers)
            )
            drawn.append((draws.label, draws.slide, draws.x, draws.y))
        label, slide, x, y = map(np.concatenate, zip(*drawn, strict=True))
        by_slide = np.argsort(slide, kind="stable")
        for place in np.array_split(by_slide, self.parts):
            yield _Part(slot, place, label[place], slide[place], x[place], y[place])


class _Reader(Dataset):
    """What travels to a loader process: it opens the slides itself."""

    def __init__(self, dataset: PatchDataset, pixels: torch.Tensor):
        self.slides = dataset.slides
        self.grids = dataset.pool.grids
        self.caches = dataset.caches
        self.pixels = pixels

    def __getitems__(self, part: _Part) -> _ReadPart:
        pixels = self.pixels[part.slot].numpy()
        unread: dict[int, str] = {}
        columns = (part.place, part.slide, part.x, part.y)
        for place, slide, x, y in zip(*(column.tolist() for column in columns), strict=True):
            try:
                self._read(slide, x, y, pixels[place])
            except SlideReadError as error:
                unread[place] = str(error)
            except WsiError as error:
                return _ReadPart(part.slot, part.place, part.label, unread, error)
        return _ReadPart(part.slot, part.place, part.label, unread)

    def _read(self, slide: int, x: int, y: int, out: np.ndarray) -> None:
        if self.caches is None:
            read_patch(cached_slide(*self.slides[slide]), self.grids[slide], x, y, out)
        else:
            self.caches[slide].read(x, y, out)


def _parts_read(loader: DataLoader) -> Iterator[_ReadPart]:
    """The parts in the order of the draws."""
    try:
        yield from loader
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise RunError(
            "a loader process ended while it was needed, most often killed for lack of memory:"
            f" train.loader_workers is {loader.num_workers}, set fewer ({error})"
        ) from error


def _read(slot: int, parts: Iterable[_ReadPart]) -> tuple[torch.Tensor, dict[int, str]]:
    """Of a block's draws, by place: labels (float32), and why some cannot be decoded."""
    places, labels = [], []
    unread: dict[int, str] = {}
    for part in parts:
        if part.error is not None:
            raise part.error
        if part.slot != slot:  # its pixels lie where another block's are looked for
            raise RuntimeError(f"a part of slot {part.slot} came with the block of slot {slot}")
        places.append(part.place)
        labels.append(part.label)
        unread |= part.unread
    in_order = np.concatenate(labels)[np.argsort(np.concatenate(places))]
    return torch.from_numpy(in_order.astype(np.float32)), unread


def _in_a_thread(items: Iterator[Item]) -> Generator[Item]:
    """The same items, each made in another thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        try:
            while (item := coming.result()) is not None:
                coming = thread.submit(next, items, None)
                yield item
        finally:
            del coming  # else an error and its frames, which hold the loader, would keep each other


def _as_read(part: _ReadPart) -> _ReadPart:
    """Parts come whole from the reader: nothing is left to collate."""
    return part


def _shared(pixels: torch.Tensor, workers: int) -> torch.Tensor:
    """Pixels moved to shared memory, or refused: beyond its end the system kills processes.

    torch reserves all of it here, so what is free is what the other ranks have left. Older versions
    can overlook that this failed (pytorch issue 176069), hence the look before.
    """
    taken = (
        f"train.loader_workers is {workers}: the blocks they read into take"
        f" {pixels.nbytes / 1e6:,.0f} MB of shared memory"
    )
    remedy = "set fewer, or give it more (a container's --shm-size)"
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else pixels.nbytes
    if pixels.nbytes > free:
        raise ConfigError(
            f"{taken}, and {free / 1e6:,.0f} MB are free in {SHARED_MEMORY}; {remedy}"
        )
    try:
        return pixels.share_memory_()
    except RuntimeError as error:
        raise ConfigError(f"{taken}, which it refuses ({error}); {remedy}") from error


def _clean_processes() -> BaseContext:
    """Loader processes forked from a server that has imported torch and opened no slide.

    Forks of this process would share its open slides' positions in their files, its threads'
    locks and its GPU. Spawned ones would each import torch again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _start_loader_process(_worker: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # of decoding: loader processes share the cores
    threading.Thread(target=_end_with_owner, daemon=True).start()


def _end_with_owner() -> None:
    """End this loader process when the one that started it has ended, killed or not.

    torch sees to that by the parent, which here is the fork server: and that lives as long as any
    process it forked.
    """
    if owner := multiprocessing.parent_process():  # not the server: the one that asked it to fork
        owner.join()
        os._exit(1)
