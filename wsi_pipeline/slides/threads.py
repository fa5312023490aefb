"""The threads that reading uses: decoding and copying pixels leave the interpreter free."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TypeVar

from dask.system import CPU_COUNT

Item = TypeVar("Item")

_chosen: ContextVar[int] = ContextVar("threads that reads decode with", default=0)


def decoding_threads() -> int:
    """Threads that one read decodes with: as many as this process may use for arithmetic.

    That is OMP_NUM_THREADS where it is set, as it is, most often to 1, in every Dask worker: there
    each core has a task of its own; under `decoding_in`, what that says. It is never more than the
    CPUs of this process.
    """
    if chosen := _chosen.get():
        return min(chosen, CPU_COUNT)
    stated = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(int(stated), CPU_COUNT) if stated.isdecimal() and int(stated) else CPU_COUNT


@contextmanager
def decoding_in(threads: int) -> Iterator[None]:
    """Let reads of this thread decode with so many threads; 0 changes nothing."""
    token = _chosen.set(threads or _chosen.get())
    try:
        yield
    finally:
        _chosen.reset(token)


def in_threads(work: Callable[[Item], None], items: list[Item]) -> None:
    """Do the work on all items, in as many threads as `decoding_threads` says.

    Each thread takes the next item when it is done with one, so that none waits for a slower one.
    This thread is one of them, and none works on any more when this returns or raises. After an
    error none takes another item.

    Raises
    ------
    Exception
        An error that the work raised.
    """
    left = iter(items)  # of a list: threads may share it
    job = [work, left]
    others = min(decoding_threads(), len(items)) - 1
    futures = [_pool(os.getpid()).submit(_do_all, job) for _ in range(others)]
    try:
        _do_all(job)
    finally:
        wait([future for future in futures if not future.cancel()])
        job.clear()  # the pool keeps what was cancelled until it has a thread for it
    future = None
    try:
        for future in futures:
            if not future.cancelled():
                future.result()
    finally:
        futures.clear()
        future = None  # else an error and its frames would keep each other, and the pixels


def _do_all(job: list) -> None:
    work, left = job
    try:
        for item in left:
            work(item)
    except BaseException:
        for _ in left:
            pass
        raise


@cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """The threads of this process: a fork has none of its parent's."""
    return ThreadPoolExecutor(CPU_COUNT, thread_name_prefix="tiles")
