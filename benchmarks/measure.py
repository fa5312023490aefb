"""What benchmarks report: the rates of two pieces of work run in turn, or how a large job went."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


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
    rates = [(plain(), pipeline()) for _ in range(repeats)]
    return Row(
        what,
        baseline,
        unit,
        statistics.median(ours for _, ours in rates),
        statistics.median(theirs for theirs, _ in rates),
        statistics.median(ours / theirs for theirs, ours in rates),
    )


def rate(work: Callable[[], float]) -> float:
    """Units a second of one run."""
    started = time.perf_counter()
    done = work()
    return done / (time.perf_counter() - started)
