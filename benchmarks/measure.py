"""What every benchmark is made of: two pieces of work run in turn, and the ratio of their rates."""

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
