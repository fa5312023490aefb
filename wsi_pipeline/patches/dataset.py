"""Drawn patches as torch batches: read where they are drawn, from the slides or their caches."""

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from wsi_pipeline.errors import ConfigError, SlideReadError, WsiError
from wsi_pipeline.patches.bands import read_patch
from wsi_pipeline.patches.cache import PatchCache
from wsi_pipeline.patches.sampling import PatchPool, draw
from wsi_pipeline.slides.reader import cached_slide

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Images uint8 (N, 3, P, P), labels 0 or 1 (N,), numbers of the draws int64 (N,)."""

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
    cannot be decoded is left out of its batch, which is then shorter: another one in its place
    would bend the sampling.

    As many batches as there are workers, a block, are read together: its draws, sorted by slide,
    are cut into a part for each worker. So a worker comes back to the same slides, and of a cohort
    of up to some 50 slides a worker each stays open (see `cached_slide`): reading from a slide
    that is open takes a fraction of the time. Up to three blocks are in memory.

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
        If the ranks cannot share a batch evenly.
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
        share = batch_size // world
        self._draws = _BlockDraws(dataset, batch_size, rank * share, share, max(1, workers))
        self._pin = pin
        self._on_unread = on_unread
        self._open = False
        self._loader = DataLoader(
            _Reader(dataset),
            batch_sampler=self._draws,
            collate_fn=_as_read,
            num_workers=workers,
            multiprocessing_context=_clean_processes() if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=_read_in_one_thread,
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
            If no patch of a batch can be decoded.
        RunError
            If a cache lacks a patch or is damaged.
        RuntimeError
            If another iteration is open.
        """
        if not steps:
            return  # without starting processes
        if self._open:  # they would share the processes, and so each other's batches
            raise RuntimeError("another iteration over this PatchLoader's batches is open")
        self._open = True
        try:
            self._draws.steps = range(first_step, first_step + steps)
            parts = iter(self._loader)
            for block in self._draws.blocks():
                patches, unread = _read(islice(parts, self._draws.parts))
                for step in block:
                    yield self._batch(self._draws.numbers(step), patches, unread)
        finally:
            self._open = False

    def _batch(self, drawn: range, patches: dict[int, tuple], unread: dict[int, str]) -> Batch:
        """The batch of the draws with these numbers, in their order."""
        for number in drawn:
            if number in unread:
                self._on_unread(unread[number])
        numbers = [number for number in drawn if number in patches]
        if not numbers:
            reason = unread[drawn[0]]
            raise SlideReadError(f"none of the {len(drawn)} patches of a batch: {reason}")
        images, labels = zip(*(patches[number] for number in numbers), strict=True)
        whole = torch.empty(len(images), *images[0].shape, dtype=torch.uint8, pin_memory=self._pin)
        torch.stack(images, out=whole)
        return whole.permute(0, 3, 1, 2), torch.tensor(labels), torch.tensor(numbers)


class _Part(NamedTuple):
    """Draws for one worker to read: arrays, shape (n,)."""

    number: np.ndarray
    label: np.ndarray
    slide: np.ndarray
    x: np.ndarray
    y: np.ndarray


class _ReadPart(NamedTuple):
    """What a worker has read: uint8 (n, P, P, 3), and of each patch its draw's number and label.

    Or the error that stopped it: raised there, it would come with the worker's traceback as text.
    """

    images: torch.Tensor
    number: list[int]
    label: list[float]
    unread: list[tuple[int, str]]
    error: WsiError | None = None

    def patches(self) -> Iterator[tuple[int, tuple[torch.Tensor, float]]]:
        """Number of each draw, and its pixels and label."""
        images = self.images[: len(self.number)]
        return zip(self.number, zip(images, self.label, strict=True), strict=True)


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

    def blocks(self) -> Iterator[range]:
        """The steps of each block."""
        return (self.steps[i : i + self.parts] for i in range(0, len(self.steps), self.parts))

    def numbers(self, step: int) -> range:
        """Numbers of a step's draws."""
        first = step * self.batch_size + self.first
        return range(first, first + self.share)

    def __iter__(self) -> Iterator[_Part]:
        return (part for block in self.blocks() for part in self._parts(block))

    def _parts(self, block: range) -> Iterator[_Part]:
        data, drawn = self.dataset, []
        for step in block:
            numbers = self.numbers(step)
            draws = draw(
                data.pool, seed=data.seed, name=data.name, first=numbers[0], count=len(numbers)
            )
            drawn.append((np.array(numbers), draws.label, draws.slide, draws.x, draws.y))
        columns = _Part(*map(np.concatenate, zip(*drawn, strict=True)))
        by_slide = np.argsort(columns.slide, kind="stable")
        for chosen in np.array_split(by_slide, self.parts):
            yield _Part(*(column[chosen] for column in columns))


class _Reader(Dataset):
    """What travels to a loader process: it opens the slides itself."""

    def __init__(self, dataset: PatchDataset):
        self.slides = dataset.slides
        self.grids = dataset.pool.grids
        self.caches = dataset.caches

    def __getitems__(self, part: _Part) -> _ReadPart:
        side = self.grids[0].patch_px
        images = torch.empty(len(part.number), side, side, 3, dtype=torch.uint8)
        read, unread = [], []
        for number, label, *place in zip(*(column.tolist() for column in part), strict=True):
            try:
                self._read(*place, out=images[len(read)].numpy())
                read.append((number, float(label)))
            except SlideReadError as error:
                unread.append((number, str(error)))
            except WsiError as error:
                return _ReadPart(torch.empty(0), [], [], [], error)
        numbers, labels = zip(*read, strict=True) if read else ((), ())
        return _ReadPart(images, list(numbers), list(labels), unread)

    def _read(self, slide: int, x: int, y: int, out: np.ndarray) -> None:
        if self.caches is None:
            read_patch(cached_slide(*self.slides[slide]), self.grids[slide], x, y, out)
        else:
            self.caches[slide].read(x, y, out)


def _read(parts: Iterable[_ReadPart]) -> tuple[dict[int, tuple], dict[int, str]]:
    """Of a block's draws, by number: pixels and label, or why they cannot be decoded."""
    patches, unread = {}, {}
    for part in parts:
        if part.error is not None:
            raise part.error
        patches.update(part.patches())
        unread.update(part.unread)
    return patches, unread


def _as_read(part: _ReadPart) -> _ReadPart:
    """Parts come whole from the reader: nothing is left to collate."""
    return part


def _clean_processes() -> BaseContext:
    """Loader processes forked from a server that has imported torch and opened no slide.

    Forks of this process would share its open slides' positions in their files, its threads'
    locks and its GPU. Spawned ones would each import torch again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _read_in_one_thread(_worker: int) -> None:
    """Loader processes share the cores: each decodes tiles in its own thread alone."""
    os.environ["OMP_NUM_THREADS"] = "1"
