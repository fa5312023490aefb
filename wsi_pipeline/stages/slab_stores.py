"""Stores filled slab by slab: what the cache, the heatmap and the fine stage share.

The slabs of all slides are the units of one batch, so that no worker waits for the last slab of a
slide. A slide's store is filled under a temporary name and gets its own when all of its slabs are
there.
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed import Client

from wsi_pipeline.config import Config
from wsi_pipeline.errors import RunError
from wsi_pipeline.jobs.record import Record, file_fingerprint, hash_inputs
from wsi_pipeline.jobs.run import Outcome, Unit, run_units
from wsi_pipeline.stages.run_directory import index_path

HASH_DIGITS = 12


@dataclass(frozen=True)
class StorePlan:
    """One slide's store: where it is made, and all that it depends on.

    Parameters
    ----------
    slide_id, slide_path : str
    mpp : float
        Micrometres per level-0 px.
    index : Path
        The patch index.
    inputs : dict
        See `Unit`.
    part, out : Path
        The store while it is filled, and when it is finished.
    """

    slide_id: str
    slide_path: str
    mpp: float
    index: Path
    inputs: dict
    part: Path
    out: Path


def plan_store(slide, config: Config, folder: Path, **inputs) -> StorePlan:
    """Plan the store ``FOLDER/SLIDE.zarr`` of a row of the catalog.

    `inputs` are those beside the slide and its index.
    """
    index = index_path(config.out, slide.slide_id)
    inputs = slide_inputs(slide.path, slide.mpp, index) | inputs
    return StorePlan(
        slide_id=slide.slide_id,
        slide_path=slide.path,
        mpp=slide.mpp,
        index=index,
        inputs=inputs,
        part=folder / f".{slide.slide_id}-{hash_inputs(inputs)[:HASH_DIGITS]}.zarr",
        out=folder / f"{slide.slide_id}.zarr",
    )


def slide_inputs(path, mpp: float, index) -> dict:
    """What a slide's patches depend on: its file, its resolution and its patch index."""
    return {
        "slide_file": file_fingerprint(path),
        "mpp": mpp,
        "index": file_fingerprint(index, content=True),
    }


def fill_stores(
    config: Config,
    client: Client,
    plans: Sequence[StorePlan],
    units_of: Callable[[StorePlan], Iterator[Unit]],
    finish_unit: Callable[[StorePlan, list[dict]], Unit],
    *,
    fill: str,
    finish: str,
    schema_version: int,
    resources: dict[str, float] | None = None,
) -> Outcome:
    """Fill and finish the stores that are not finished.

    Parameters
    ----------
    config : Config
    client : distributed.Client
    plans : sequence of StorePlan
    units_of : callable
        The units of a plan, one for each slab, keyed ``SLIDE/CHUNK``; called when the store that
        it may begin has room. Each returns ``unread``: x, y, reason of what cannot be decoded. A
        RunError or OSError that it raises fails the slide, not the batch.
    finish_unit : callable
        ``(plan, results)`` to the unit that gives a filled store its name; ``results`` is what the
        plan's slabs returned.
    fill, finish : str
        What the record calls the work on slabs and on slides.
    schema_version : int
        Of the stores.
    resources : dict, optional
        What a worker must offer to fill a slab.
    """
    record = Record(config.out, finish)
    common = {
        "run_dir": config.out,
        "schema_version": schema_version,
        "retries": config.jobs.retries,
        "window": config.jobs.window,
    }
    expected = Counter()

    def slab_units() -> Iterator[Unit]:
        for plan in plans:
            if not record.is_done(finish_unit(plan, []), schema_version):
                for unit in _units_or_refusal(plan, units_of):
                    expected[plan.slide_id] += 1
                    yield unit

    filled = run_units(client, slab_units(), stage=fill, resources=resources, **common)
    results = defaultdict(list)
    for key, result in filled.results.items():
        results[key.rpartition("/")[0]].append(result)
    finish_units = [
        finish_unit(plan, results[plan.slide_id])
        for plan in plans
        if len(results[plan.slide_id]) == expected[plan.slide_id]
    ]
    return filled + run_units(client, finish_units, stage=finish, **common)


def old_stores(plan: StorePlan) -> list[Path]:
    """The slide's stores that give way to a planned one: `fill_stores` deletes them first.

    One that is finished is among them: nothing may take it for the new one.
    """
    begun = plan.out.parent.glob(f".{plan.slide_id}-{'?' * HASH_DIGITS}.zarr")
    return [store for store in (plan.out, *begun) if store != plan.part and store.exists()]


def all_unread(results: list[dict]) -> list[list]:
    """What the slabs of a store could not decode: x, y, reason of each."""
    return [place for result in results for place in result["unread"]]


def failure_texts(unread: list[list], what: str = "patch") -> list[str]:
    """What cannot be decoded (x, y, reason), each in a sentence for the record."""
    return [f"{what} at level-0 px ({x}, {y}): {reason}" for x, y, reason in unread]


def refuse(reason: str) -> dict:
    """Fail, so that what is wrong with one slide is recorded and the others go on."""
    raise RunError(reason)


def _units_or_refusal(
    plan: StorePlan, units_of: Callable[[StorePlan], Iterator[Unit]]
) -> Iterator[Unit]:
    """Give a slide's units, or one that fails; its old stores make room first."""
    try:
        for store in old_stores(plan):
            shutil.rmtree(store)
        yield from units_of(plan)
    except (OSError, RunError) as error:  # an index is damaged; the disk is full
        arguments = {"reason": str(error)}
        yield Unit(f"{plan.slide_id}/", plan.slide_id, plan.inputs, refuse, arguments)
