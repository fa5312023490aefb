import gc
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier, Event, get_ident
from time import sleep
from weakref import ref

import pytest

from wsi_pipeline.slides import threads


class Done(list):
    """A list that may be referred to weakly."""


@pytest.fixture(autouse=True)
def own_pool():
    """Of as many threads as a test says there are cores."""
    threads._pool.cache_clear()
    yield
    threads._pool(os.getpid()).shutdown()
    threads._pool.cache_clear()


@pytest.mark.parametrize(
    ("stated", "count"), [("1", 1), ("3", 3), ("64", 4), ("2,1", 2), ("", 4), ("no", 4), ("0", 4)]
)
def test_decoding_threads_are_those_for_arithmetic(monkeypatch, stated, count):
    monkeypatch.setattr(threads, "CPU_COUNT", 4)
    monkeypatch.setenv("OMP_NUM_THREADS", stated)
    assert threads.decoding_threads() == count


def test_a_thread_may_choose_with_how_many_it_decodes(monkeypatch):
    monkeypatch.setattr(threads, "CPU_COUNT", 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with threads.decoding_in(3), ThreadPoolExecutor(1) as other:
        assert threads.decoding_threads() == 3
        assert other.submit(threads.decoding_threads).result() == 1
        with threads.decoding_in(0):
            assert threads.decoding_threads() == 3
        with threads.decoding_in(64):
            assert threads.decoding_threads() == 4
    assert threads.decoding_threads() == 1


@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_item_is_worked_on_once_by_any_of_the_threads(monkeypatch, count):
    monkeypatch.setattr(threads, "CPU_COUNT", 4)
    done, workers = [], set()
    together = Barrier(count)  # as many threads must be at work at once for the first to go on

    def work(item):
        if item < count:
            together.wait(timeout=10)
        workers.add(get_ident())
        done.append(item)

    with threads.decoding_in(count):
        threads.in_threads(work, list(range(50)))
    assert sorted(done) == list(range(50))
    assert len(workers) == count and get_ident() in workers


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_is_raised_once_no_thread_works_any_more(monkeypatch, count):
    monkeypatch.setattr(threads, "CPU_COUNT", 4)
    at_work, begun = set(), []

    def work(item):
        begun.append(item)
        at_work.add(item)
        sleep(0.001)
        at_work.discard(item)
        if item == 5:
            raise ValueError("item 5")

    with threads.decoding_in(count), pytest.raises(ValueError, match="item 5"):
        threads.in_threads(work, list(range(500)))
    assert not at_work
    assert len(begun) < 100  # those at work then, and none after them


def test_a_pool_that_is_busy_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(threads, "CPU_COUNT", 2)
    release, done = Event(), Done()
    pool = threads._pool(os.getpid())
    busy = [pool.submit(release.wait, 10) for _ in range(pool._max_workers)]
    with threads.decoding_in(2):
        threads.in_threads(done.append, [1, 2, 3])
    assert done == [1, 2, 3] and not any(future.done() for future in busy)
    left = ref(done)
    del done
    kept = left()
    release.set()
    assert kept is None  # what the work holds, pixels and files, does not wait in the pool


def test_an_error_keeps_nothing_of_the_work_once_it_is_handled(monkeypatch):
    monkeypatch.setattr(threads, "CPU_COUNT", 2)
    together, pixels = Barrier(2), Done()

    def work(item, held):
        held.append(item)
        together.wait(timeout=10)
        if get_ident() != caller:
            raise ValueError("in the other thread")

    caller = get_ident()
    gc.disable()
    try:
        with threads.decoding_in(2), pytest.raises(ValueError, match="in the other thread"):
            threads.in_threads(partial(work, held=pixels), [1, 2])
        left = ref(pixels)
        del pixels
        assert left() is None
    finally:
        gc.enable()
