"""Drawn patches as torch batches: read where they are drawn, straight from the slides."""

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.patches.sampling import Draws, PatchPool, draw
from wsi_pipeline.slides.reader import cached_slide

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
) -> Iterator[Batch]:
    """Batches `first_step` to ``first_step + steps - 1`` of the dataset's draws.

    Batch ``s`` is draws ``s * batch_size`` to ``(s + 1) * batch_size - 1`` over all ranks; each
    takes a consecutive share. What is drawn depends neither on ranks nor on workers.

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

    Yields
    ------
    images : uint8 tensor, shape (batch_size / world, 3, patch_px, patch_px)
    labels : float32 tensor, shape (batch_size / world,)
    numbers : int64 tensor, shape (batch_size / world,)
        The draws' numbers.

    Raises
    ------
    ConfigError
        If the ranks cannot share a batch evenly.
    SlideError, SlideReadError
        While iterating: a slide cannot be opened or a patch not be decoded. To replace the patch
        in silence would bend the sampling.
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
        # Its own, or starting to iterate would take a number from the global generator.
        generator=torch.Generator(),
    )
    return iter(loader)


def _clean_processes() -> BaseContext:
    """Loader processes forked from a server that has imported torch and opened no slide.

    Forks of this process would share its open slides' positions in their files, its threads'
    locks and its GPU. Spawned ones would each import torch again, in every epoch.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


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

    def __getitems__(self, drawn: tuple[range, Draws]) -> Batch:
        numbers, draws = drawn
        patches = zip(draws.slide.tolist(), draws.x.tolist(), draws.y.tolist(), strict=True)
        images = np.stack([self._read(*patch) for patch in patches])
        return (
            torch.from_numpy(images).permute(0, 3, 1, 2),
            torch.from_numpy(draws.label.astype(np.float32)),
            torch.tensor(numbers),
        )

    def _read(self, slide: int, x: int, y: int) -> np.ndarray:
        grid = self.grids[slide]
        return cached_slide(*self.slides[slide]).read(
            x, y, grid.patch_px, grid.patch_px, grid.downsample
        )


def _as_read(batch: Batch) -> Batch:
    """Batches come whole from the reader: nothing is left to collate."""
    return batch
