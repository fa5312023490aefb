"""Three-step draws of training patches."""

from itertools import pairwise

import numpy as np
import pyarrow as pa

from benchmarks.measure import Row, compare
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.patches.index import PatchIndex
from wsi_pipeline.patches.sampling import PatchPool, draw


def rows(quick: bool) -> list[Row]:
    """Draws from the lecture's cohort; quick: from a hundredth of it."""
    return [sampling(78_787 if quick else 7_878_675)]


def sampling(patches: int) -> Row:
    """Three-step draws from the lecture's cohort against pandas."""
    rng = np.random.default_rng(0)
    grid = PatchGrid(Bounds(0, 0, 100_000, 200_000), 0.25, 1.0)
    counts = rng.multinomial(patches, rng.dirichlet(np.ones(698)))

    def index(number: int, count: int) -> PatchIndex:
        columns = {
            "x": rng.integers(0, 100_000, count, np.int32),
            "y": rng.integers(0, 200_000, count, np.int32),
            "label": ((rng.random(count) < 0.1) & (number % 2 == 0)).astype(np.int8),
        }
        return PatchIndex(f"slide_{number}", grid, pa.table(columns))

    pool = PatchPool.from_indexes(index(i, count) for i, count in enumerate(counts))
    groups = {
        label: [np.arange(pool.group_start[g], pool.group_start[g + 1]) for g in range(*span)]
        for label, span in zip(pool.labels.tolist(), pairwise(pool.label_start), strict=True)
    }

    def pipeline() -> int:
        draw(pool, seed=0, name="bench", first=0, count=1_000_000)
        return 1_000_000

    def plain() -> int:
        for _ in range(20_000):
            of_label = groups[rng.choice(pool.labels)]
            rng.choice(of_label[rng.integers(len(of_label))])
        return 20_000

    return compare(
        f"three-step draws, {patches:,} patches of 698 slides", "numpy, a draw at a time", "draws",
        pipeline, plain,
    )  # fmt: skip
