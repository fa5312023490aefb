"""Drawn patches as torch batches: read where they are drawn, straight from the slides."""

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from wsi_pipeline.errors import ConfigError, SlideReadError
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.patches.sampling import Draws, PatchPool, draw
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
    """

    pool: PatchPool
    slides: Sequence[tuple[str | Path, float]]
    seed: int
    name: str


def batches(
    dataset: PatchDataset,
    *,
    first_step: int,
    steps: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin: bool = False,
    on_unread: Callable[[str], None] = log.warning,
) -> Iterator[Batch]:
    """Batches `first_step` to ``first_step + steps - 1`` of the dataset's draws.

    Batch ``s`` is draws ``s * batch_size`` to ``(s + 1) * batch_size - 1`` over all ranks; each
    takes a consecutive share. What is drawn depends neither on ranks nor on workers. A patch that
    cannot be decoded is left out of its batch, which is then shorter: another one in its place
    would bend the sampling.

    Parameters
    ----------
    dataset : PatchDataset
    first_step, steps : int
    batch_size : int
        Over all ranks.
    rank, world : int
    workers : int
        Loader processes; 0 reads in this one.
    pin : bool
        Page-locked memory, for copies to a GPU.
    on_unread : callable
        Is told of each patch that cannot be decoded: the slide, the place and the reason.

    Yields
    ------
    images : uint8 tensor, shape (N, 3, patch_px, patch_px)
        N is ``batch_size / world``, less the patches that cannot be decoded.
    labels : float32 tensor, shape (N,)
    numbers : int64 tensor, shape (N,)
        The draws' numbers.

    Raises
    ------
    ConfigError
        If the ranks cannot share a batch evenly.
    SlideError
        While iterating: a slide cannot be opened.
    SlideReadError
        While iterating: no patch of a batch can be decoded.
    """
    if batch_size % world:
        raise ConfigError(
            f"train.batch_size is {batch_size}: {world} processes cannot share it evenly"
        )
    loader = DataLoader(
        _Reader(dataset.slides, dataset.pool.grids),
        batch_sampler=_shares(dataset, first_step, steps, batch_size, rank, world),
        collate_fn=_as_read,
        num_workers=workers,
        pin_memory=pin,
        multiprocessing_context=_clean_processes() if workers else None,
        worker_init_fn=_read_in_one_thread,
        # Its own, or starting to iterate would take a number from the global generator.
        generator=torch.Generator(),
    )
    return _telling(loader, on_unread)


def _telling(
    loader: Iterable[tuple[Batch, list[str]]], on_unread: Callable[[str], None]
) -> Iterator[Batch]:
    for batch, unread in loader:
        for reason in unread:
            on_unread(reason)
        yield batch


def _clean_processes() -> BaseContext:
    """Loader processes forked from a server that has imported torch and opened no slide.

    Forks of this process would share its open slides' positions in their files, its threads'
    locks and its GPU. Spawned ones would each import torch again, in every epoch.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _read_in_one_thread(_worker: int) -> None:
    """Loader processes share the cores: each decodes tiles in its own thread alone."""
    os.environ["OMP_NUM_THREADS"] = "1"


def _shares(
    dataset: PatchDataset, first_step: int, steps: int, batch_size: int, rank: int, world: int
) -> Iterator[tuple[range, Draws]]:
    """Draw each batch here, so that loader processes need not hold the pool."""
    share = batch_size // world
    for step in range(first_step, first_step + steps):
        first = step * batch_size + rank * share
        yield (
            range(first, first + share),
            draw(dataset.pool, seed=dataset.seed, name=dataset.name, first=first, count=share),
        )


class _Reader(Dataset):
    """What travels to a loader process: it opens the slides itself."""

    def __init__(self, slides: Sequence[tuple[str | Path, float]], grids: Sequence[PatchGrid]):
        self.slides = slides
        self.grids = grids

    def __getitems__(self, drawn: tuple[range, Draws]) -> tuple[Batch, list[str]]:
        numbers, draws = drawn
        images, read, unread = [], [], []
        patches = zip(draws.slide.tolist(), draws.x.tolist(), draws.y.tolist(), strict=True)
        for position, patch in enumerate(patches):
            try:
                images.append(self._read(*patch))
                read.append(position)
            except SlideReadError as error:
                unread.append(str(error))
        if not images:
            raise SlideReadError(f"none of the {len(unread)} patches of a batch: {unread[0]}")
        batch = (
            torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
            torch.from_numpy(draws.label[read].astype(np.float32)),
            torch.tensor(numbers)[read],
        )
        return batch, unread

    def _read(self, slide: int, x: int, y: int) -> np.ndarray:
        grid = self.grids[slide]
        return cached_slide(*self.slides[slide]).read(
            x, y, grid.patch_px, grid.patch_px, grid.downsample
        )


def _as_read(batch: tuple[Batch, list[str]]) -> tuple[Batch, list[str]]:
    """Batches come whole from the reader: nothing is left to collate."""
    return batch
