import gc
import multiprocessing
import os
import re
import signal
import time
import weakref
from collections import namedtuple
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tifffile
import torch
from slide_files import write_pyramid_tiff

from wsi_pipeline.errors import ConfigError, RunError, SlideError, SlideReadError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.patches.cache import (
    SHARD,
    create_cache,
    finish_cache,
    open_cache,
    write_shard,
)
from wsi_pipeline.patches.index import PatchIndex
from wsi_pipeline.patches.overlapping_reads import read_patch
from wsi_pipeline.patches.sampling import PatchPool, draw
from wsi_pipeline.patches.slabs import slabs
from wsi_pipeline.slides import open_slides, reader
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.training.dataset import PatchDataset, PatchLoader, _in_a_thread

PATCH_PX = 32
WIDTH, HEIGHT = 200, 150
DOWNSAMPLES = (1, 2, 1)  # of the working resolution of each slide


def an_index(slide):
    """Patches at every cell, those over the slide's edge too; labels by chance."""
    grid = PatchGrid(Bounds(0, 0, WIDTH, HEIGHT), 0.5, DOWNSAMPLES[slide], PATCH_PX, 16, 16)
    rows, cols = np.indices(grid.shape).reshape(2, -1)
    x, y = grid.patch_origins(rows, cols)
    label = np.random.default_rng(slide).integers(-1, 2, len(x)).astype(np.int8)
    return PatchIndex(f"slide_{slide}", grid, pa.table({"x": x, "y": y, "label": label}))


@pytest.fixture(scope="module")
def levels():
    """Noise: pixels of each slide's level 0 and of level 1, half as wide and high."""
    rng = np.random.default_rng(0)
    return [
        [rng.integers(0, 256, (HEIGHT // d, WIDTH // d, 3), np.uint8) for d in (1, 2)]
        for _ in DOWNSAMPLES
    ]


@pytest.fixture(scope="module")
def dataset(levels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    paths = [
        write_pyramid_tiff(folder / f"slide_{s}.tiff", arrays, tile=64, compression="zlib")
        for s, arrays in enumerate(levels)
    ]
    pool = PatchPool.from_indexes(map(an_index, range(len(paths))))
    return PatchDataset(pool, [(path, 0.5) for path in paths], seed=5, name="train")


def batches(dataset, *, first_step, steps, **settings):
    return PatchLoader(dataset, **settings).batches(first_step, steps)


def joined(parts):
    """Batches one behind the other: images, labels, numbers."""
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_batches_hold_the_pixels_labels_and_numbers_of_the_draws(dataset, levels):
    images, labels, numbers = joined(batches(dataset, first_step=3, steps=5, batch_size=20))
    assert (images.dtype, images.shape) == (torch.uint8, (100, 3, PATCH_PX, PATCH_PX))
    assert (labels.dtype, numbers.dtype) == (torch.float32, torch.int64)
    assert numbers.tolist() == list(range(60, 160))

    draws = draw(dataset.pool, seed=5, name="train", first=60, count=100)
    assert labels.tolist() == draws.label.tolist()
    assert set(draws.slide) == {0, 1, 2}
    for image, slide, x, y in zip(images, draws.slide, draws.x, draws.y, strict=True):
        stored = levels[slide][DOWNSAMPLES[slide] - 1]
        framed = np.pad(stored, ((64, 64), (64, 64), (0, 0)), constant_values=255)
        left, top = np.array([x, y]) // DOWNSAMPLES[slide] + 64
        expected = framed[top : top + PATCH_PX, left : left + PATCH_PX]
        np.testing.assert_array_equal(image.permute(1, 2, 0), expected)


def test_too_little_shared_memory_is_refused_before_anything_starts(dataset, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # other ranks on the machine take their own
    needed = 3 * (2 * 8) * 32 * 32 * 3  # blocks of two batches of 8; bytes of a patch of 32 px
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(needed))
    PatchLoader(dataset, batch_size=8, workers=2)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(needed - 1))
    with pytest.raises(ConfigError, match="loader_workers is 2: the blocks they read into"):
        PatchLoader(dataset, batch_size=8, workers=2)
    PatchLoader(dataset, batch_size=8)  # takes none


def test_shared_memory_that_another_process_took_meanwhile_is_refused_alike(dataset, monkeypatch):
    def refuse(_):
        raise RuntimeError("No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    expected = r"loader_workers is 2: .* refuses \(No space left on device \(28\)\); set fewer"
    with pytest.raises(ConfigError, match=expected):
        PatchLoader(dataset, batch_size=8, workers=2)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
@pytest.mark.parametrize("workers", [1, 4])
def test_loader_workers_change_nothing(dataset, workers):
    """Also to batches that are kept, while their block's memory is used for others."""
    settings = {"first_step": 0, "steps": 18, "batch_size": 8}
    alone = list(batches(dataset, **settings))
    shared = list(batches(dataset, **settings, workers=workers))
    assert len(shared) == 18
    for one, other in zip(alone, shared, strict=True):
        assert_same(one, other)


def test_a_loader_goes_through_epochs_of_any_length_with_the_same_processes(dataset):
    loader = PatchLoader(dataset, batch_size=4, workers=2)
    whole = list(batches(dataset, first_step=0, steps=8, batch_size=4))
    epochs = [list(loader.batches(first, steps)) for first, steps in ((0, 3), (3, 0), (3, 5))]
    assert [len(epoch) for epoch in epochs] == [3, 0, 5]
    assert_same(joined([*epochs[0], *epochs[2]]), joined(whole))


def test_an_epoch_that_was_left_early_does_not_leak_into_the_next(dataset):
    loader = PatchLoader(dataset, batch_size=4, workers=2)
    next(loader.batches(0, 8))
    [found] = loader.batches(5, 1)
    [expected] = batches(dataset, first_step=5, steps=1, batch_size=4)
    assert_same(found, expected)


def test_one_batch_is_made_ahead_and_errors_come_in_their_place():
    made = []

    def items():
        for number in range(3):
            made.append(number)
            yield number
        raise RunError("after three")

    ahead = _in_a_thread(items())
    assert next(ahead) == 0
    ahead.close()  # waits for the thread
    assert made == [0, 1]
    found = []
    with pytest.raises(RunError, match="after three"):
        found.extend(_in_a_thread(items()))
    assert found == [0, 1, 2]


def test_an_error_leaves_nothing_to_the_garbage_collector(dataset):
    """Loader processes end with their loader: were it in a cycle, they would at some later time."""

    def items(held):
        yield held
        raise RunError("after one")

    held = replace(dataset)
    freed = weakref.ref(held)
    gc.disable()
    try:
        with pytest.raises(RunError):
            next(islice(_in_a_thread(items(held)), 1, None))
        del held
        assert freed() is None
    finally:
        gc.enable()


def test_a_second_iteration_is_refused_while_one_is_open(dataset):
    loader = PatchLoader(dataset, batch_size=4)
    opened = loader.batches(0, 8)
    next(opened)
    with pytest.raises(RuntimeError, match="another iteration"):
        next(loader.batches(5, 1))
    expected = list(batches(dataset, first_step=0, steps=8, batch_size=4))
    assert_same(joined(opened), joined(expected[1:]))  # it ends
    assert len(list(loader.batches(5, 1))) == 1
    opened = loader.batches(0, 8)
    next(opened)
    opened.close()
    assert len(list(loader.batches(5, 1))) == 1


def test_workers_share_out_the_slides_of_a_block(dataset):
    """96 draws over three slides, sorted by slide and cut into two parts of 48 draws."""
    loader = PatchLoader(dataset, batch_size=48, workers=2)
    loader._draws.steps = range(2)
    first, second = loader._draws
    assert len(first.slide) == len(second.slide) == 48
    drawn = draw(dataset.pool, seed=5, name="train", first=0, count=96)
    np.testing.assert_array_equal([*first.slide, *second.slide], np.sort(drawn.slide))
    assert sorted([*first.place, *second.place]) == list(range(96))


@pytest.fixture(scope="module")
def cached(dataset, tmp_path_factory):
    """The dataset with a cache of each slide."""
    caches = []
    for number, (path, mpp) in enumerate(dataset.slides):
        index = an_index(number)
        store = tmp_path_factory.mktemp("cache") / f"{number}.zarr"
        create_cache(store, grid=index.grid, made_of={})
        rows, cols = index.grid.cells_at(index.table["x"], index.table["y"])
        with Slide(path, mpp) as slide:
            for slab in slabs(index.grid, rows, cols, SHARD):
                cells = list(zip(slab.rows.tolist(), slab.cols.tolist(), strict=True))
                corners = zip(*index.grid.patch_origins(slab.rows, slab.cols), strict=True)
                pixels = [read_patch(slide, index.grid, int(x), int(y)) for x, y in corners]
                patches = [(*cell, patch) for cell, patch in zip(cells, pixels, strict=True)]
                write_shard(store, slab.chunk, patches)
        finish_cache(store, [])
        caches.append(open_cache(store))
    return replace(dataset, caches=caches)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_the_cache_are_those_from_the_slides(dataset, cached, tmp_path, workers):
    settings = {"first_step": 1, "steps": 5, "batch_size": 8}
    expected = list(batches(dataset, **settings))
    nowhere = [(tmp_path / "gone.tiff", 0.5)] * len(dataset.slides)  # slides are not opened
    found = list(batches(replace(cached, slides=nowhere), **settings, workers=workers))
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_cache_lacks_is_left_out_and_told_as_from_the_slide(cached, torn, workers):
    told = {"slide": [], "cache": []}
    settings = {"first_step": 0, "steps": 2, "batch_size": 50}
    expected = list(batches(torn, **settings, on_unread=told["slide"].append))
    corners = zip(*(an_index(0).table[axis].to_pylist() for axis in "xy"), strict=True)
    unread = {}
    with Slide(*torn.slides[0]) as slide:
        for corner in corners:
            with pytest.raises(SlideReadError) as error:
                read_patch(slide, an_index(0).grid, *corner)
            unread[corner] = str(error.value)
    first = replace(cached.caches[0], unread=unread)
    lacking = replace(cached, caches=[first, *cached.caches[1:]])
    found = list(batches(lacking, **settings, workers=workers, on_unread=told["cache"].append))
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)
    assert told["cache"] == told["slide"] != []


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_loader_process_arrives_as_it_was(cached, workers):
    empty = replace(cached.caches[0], path=Path("nowhere.zarr"))
    damaged = replace(cached, caches=[empty] * 3)
    with pytest.raises(RunError, match=r"^nowhere\.zarr/c/\d/\d/0/0/0: the patch in row \d"):
        list(batches(damaged, first_step=0, steps=1, batch_size=4, workers=workers))


@pytest.mark.slow
def test_a_killed_loader_process_is_told_with_the_setting(dataset):
    before = set(multiprocessing.active_children())
    opened = batches(dataset, first_step=0, steps=40, batch_size=4, workers=1)
    next(opened)
    [process] = set(multiprocessing.active_children()) - before
    process.kill()
    with pytest.raises(RunError, match=r"loader_workers is 1, set fewer .*exited unexpectedly"):
        list(opened)


def own_a_loader(dataset, pids):
    """Read a batch, send the loader processes' ids, wait to be killed."""
    opened = batches(dataset, first_step=0, steps=40, batch_size=4, workers=2)
    next(opened)
    pids.send([process.pid for process in multiprocessing.active_children()])
    time.sleep(600)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="watches other processes' children")
def test_loader_processes_end_with_a_killed_owner(dataset):
    context = multiprocessing.get_context("forkserver")
    found, pids = context.Pipe(duplex=False)
    owner = context.Process(target=own_a_loader, args=(dataset, pids))
    owner.start()
    try:
        assert found.poll(60)
        loaders = [os.pidfd_open(pid) for pid in found.recv()]
    finally:
        owner.kill()
    try:
        assert len(loaders) == 2
        for loader in loaders:
            assert wait([loader], timeout=20)  # readable when the process has ended
    finally:
        for loader in loaders:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(loader, signal.SIGKILL)
            os.close(loader)


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_open_files_are_bounded_however_many_slides_are_drawn_from(levels, tmp_path, monkeypatch):
    """Twice as many slides as may be open; of each, OpenSlide may hold a file and its tiles do."""
    monkeypatch.setattr(reader, "WORTH_TILES_PX", 0)
    count = 2 * open_slides.OPEN_SLIDES
    paths = [
        write_pyramid_tiff(tmp_path / f"{number}.tiff", levels[0], tile=64)
        for number in range(count)
    ]
    pool = PatchPool.from_indexes(
        replace(an_index(0), slide_id=f"slide_{number}") for number in range(count)
    )
    dataset = PatchDataset(pool, [(path, 0.5) for path in paths], seed=5, name="train")
    open_slides._cached.cache_clear()
    gc.collect()  # else what other tests left open may be closed meanwhile
    before = open_files()
    held = []
    for _ in batches(dataset, first_step=0, steps=16, batch_size=32):
        held.append(open_files() - before)
    drawn = draw(pool, seed=5, name="train", first=0, count=16 * 32)
    assert len(np.unique(drawn.slide)) > 1.5 * open_slides.OPEN_SLIDES
    assert open_slides.OPEN_SLIDES <= max(held) <= 2 * open_slides.OPEN_SLIDES
    assert len(set(held[8:])) == 1  # full, and no more for what is drawn later


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_read_each_batch_of_one_rank(dataset, world):
    settings = {"first_step": 2, "steps": 3, "batch_size": 8}
    ranks = [batches(dataset, **settings, rank=rank, world=world) for rank in range(world)]
    for whole, *shares in zip(batches(dataset, **settings), *ranks, strict=True):
        assert {len(labels) for _, labels, _ in shares} == {8 // world}
        assert_same(whole, joined(shares))


def test_resuming_in_mid_epoch_gives_the_tail_of_the_uninterrupted_sequence(dataset):
    whole = list(batches(dataset, first_step=0, steps=6, batch_size=4))
    tail = list(batches(dataset, first_step=4, steps=2, batch_size=4))
    assert_same(joined(whole[4:]), joined(tail))


def test_reading_leaves_the_global_generator_alone(dataset):
    before = torch.get_rng_state()
    list(batches(dataset, first_step=0, steps=1, batch_size=4))
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_that_ranks_cannot_share_is_refused(dataset):
    with pytest.raises(ConfigError, match="batch_size is 9: 2 processes"):
        batches(dataset, first_step=0, steps=1, batch_size=9, world=2)


def test_missing_slide_is_named(dataset, tmp_path):
    lost = replace(dataset, slides=[*dataset.slides[:2], (tmp_path / "lost.tiff", 0.5)])
    with pytest.raises(SlideError, match=r"lost\.tiff"):
        list(batches(lost, first_step=0, steps=1, batch_size=100))


@pytest.fixture
def torn(dataset, levels, tmp_path):
    """The dataset with a first slide that opens, but none of its regions can be decoded."""
    path = write_pyramid_tiff(tmp_path / "torn.tiff", levels[0], tile=64)
    with tifffile.TiffFile(path) as file:
        pages = [(page.dataoffsets, page.databytecounts) for page in file.pages]
    with path.open("r+b") as file:
        for offsets, sizes in pages:
            for offset, size in zip(offsets, sizes, strict=True):
                file.seek(offset)
                file.write(bytes(size))
    return replace(dataset, slides=[(path, 0.5), *dataset.slides[1:]])


@pytest.mark.parametrize("workers", [0, 1])
def test_patches_that_cannot_be_decoded_are_left_out_and_told(dataset, torn, workers):
    told = []
    settings = {"first_step": 0, "steps": 1, "batch_size": 100}
    [found] = batches(torn, **settings, workers=workers, on_unread=told.append)
    [whole] = batches(dataset, **settings)
    readable = draw(dataset.pool, seed=5, name="train", first=0, count=100).slide != 0
    assert 0 < readable.sum() < 100
    assert_same(found, [part[readable] for part in whole])
    assert len(told) == 100 - readable.sum()
    assert re.search(r"torn\.tiff: the region at level-0 px \(\d+, \d+\)", told[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_which_nothing_can_be_decoded_is_empty(dataset, torn, workers):
    settings = {"first_step": 0, "steps": 20, "batch_size": 1}
    found = list(batches(torn, **settings, workers=workers))
    readable = draw(dataset.pool, seed=5, name="train", first=0, count=20).slide != 0
    assert [len(labels) for _, labels, _ in found] == readable.astype(int).tolist()
    assert 0 < readable.sum() < 20
    assert {images.shape[1:] for images, *_ in found} == {(3, PATCH_PX, PATCH_PX)}
    whole = list(batches(dataset, **settings))
    assert_same(joined(found), [part[readable] for part in joined(whole)])


def test_the_lost_patches_of_a_validation_set_count_once(torn):
    lost = replace(torn, slides=[torn.slides[0]] * 3)
    loader = PatchLoader(lost, batch_size=9)
    for _ in range(3):  # 72 each time
        assert len(list(loader.batches(0, 8))) == 8


def test_reading_stops_when_a_hundred_patches_in_a_row_cannot_be_decoded(torn):
    lost = replace(torn, slides=[torn.slides[0]] * 3)
    loader = PatchLoader(lost, batch_size=9)
    assert len(list(loader.batches(0, 8))) == 8
    later = loader.batches(8, 8)  # of the next epoch
    for _ in range(3):  # 11 batches of 9
        assert not len(next(later)[1])
    expected = r"none of the last 108 patches can be decoded: .*torn\.tiff"
    with pytest.raises(SlideReadError, match=expected):
        next(later)
