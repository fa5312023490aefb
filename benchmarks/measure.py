"""What benchmarks report: the rates of two pieces of work run in turn, or how a large job went."""

import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from wsi_pipeline.jobs.cluster import visible_gpus

SAMPLE_SECONDS = 0.2
"""Between looks at a GPU; its driver's own figure is of the last 1/6 to 1 second."""


@dataclass(frozen=True)
class Row:
    """One measurement: how much is done a second, and how many times the baseline that is."""

    what: str
    baseline: str
    unit: str
    per_second: float
    baseline_per_second: float
    ratio: float


@dataclass(frozen=True)
class Scale:
    """How one large job went.

    Parameters
    ----------
    what, did : str
    seconds : float
        Wall time.
    own_mib : float
        Most memory of its process; where it has workers, of client and scheduler.
    worker_mib : float or None
        Most memory of any of its workers.
    tasks : int or None
        Units of work sent to workers.
    """

    what: str
    did: str
    seconds: float
    own_mib: float
    worker_mib: float | None = None
    tasks: int | None = None


@dataclass(frozen=True)
class Table:
    """Figures that have a table of their own: its header and its lines, in Markdown."""

    header: str
    lines: list[str]


def compare(
    what: str, baseline: str, unit: str, pipeline: Callable[[], float],
    plain: Callable[[], float], repeats: int = 3,
) -> Row:  # fmt: skip
    """Run the two in turn; each returns how many units it did."""
    return compare_rates(what, baseline, unit, lambda: rate(pipeline), lambda: rate(plain), repeats)


def compare_rates(
    what: str, baseline: str, unit: str, pipeline: Callable[[], float],
    plain: Callable[[], float], repeats: int = 3,
) -> Row:  # fmt: skip
    """Run the two in turn; each returns how many units a second it did."""
    theirs, ours = zip(*((plain(), pipeline()) for _ in range(repeats)), strict=True)
    return row_of(what, baseline, unit, ours, theirs)


def row_of(
    what: str, baseline: str, unit: str, ours: Sequence[float], theirs: Sequence[float]
) -> Row:
    """Units a second of runs in turn: the first of ours with the first of theirs, and so on."""
    ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
    return Row(what, baseline, unit, statistics.median(ours), statistics.median(theirs), ratio)


def rate(work: Callable[[], float]) -> float:
    """Units a second of one run."""
    started = time.perf_counter()
    done = work()
    return done / (time.perf_counter() - started)


@contextmanager
def watched_gpu() -> Iterator[list[tuple[float, float]]]:
    """Sample the first visible GPU while the context is open; without a GPU, no samples.

    Yields
    ------
    list of (seconds, share)
        When (`time.perf_counter`), and the share of the time before in which a kernel of any
        process ran (`nvidia-smi`'s ``utilization.gpu``: Dask's workers count, which a profiler of
        one process would not see). Grows; empty for good where the driver gives no figure.
    """
    samples: list[tuple[float, float]] = []
    ended = threading.Event()

    def look(gpu: str) -> None:
        try:
            while not ended.wait(SAMPLE_SECONDS):
                told = subprocess.run(
                    ["nvidia-smi", "-i", gpu, "--query-gpu=utilization.gpu",
                     "--format=csv,noheader,nounits"],
                    capture_output=True, text=True, check=True, timeout=10,
                ).stdout  # fmt: skip
                samples.append((time.perf_counter(), float(told) / 100))
        except (OSError, subprocess.SubprocessError, ValueError):  # "[N/A]": of a part of a GPU
            samples.clear()

    watchers = [threading.Thread(target=look, args=(gpu,)) for gpu in visible_gpus()[:1]]
    for watcher in watchers:
        watcher.start()
    try:
        yield samples
    finally:
        ended.set()
        for watcher in watchers:
            watcher.join()


def busy_share(samples: Iterable[tuple[float, float]], started: float, ended: float) -> float:
    """Mean of samples in a span of time, each weighted by the time since the one before.

    Parameters
    ----------
    samples : iterable of (seconds, share)
        In order of time, see `watched_gpu`.
    started, ended : float
        Seconds of the same clock.

    Returns
    -------
    float
        0 to 1; NaN if no sample lies in the span.
    """
    within = [(seconds, share) for seconds, share in samples if started < seconds <= ended]
    if not within:
        return np.nan
    times, shares = zip(*within, strict=True)
    return float(np.average(shares, weights=np.diff([started, *times])))


def busy_text(shares: Sequence[float]) -> str:
    """The median of runs' shares, in words; nothing where there is no GPU."""
    known = [share for share in shares if not np.isnan(share)]
    return f"; kernels ran {statistics.median(known):.0%} of the time" if known else ""
