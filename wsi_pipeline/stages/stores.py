"""Heatmap stores filled slab by slab: what the heatmap stage and the fine one share.

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
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.heatmaps.store import (
    SCHEMA,
    chunk_file,
    create_heatmap,
    finish_heatmap,
    open_heatmap,
)
from wsi_pipeline.jobs.cluster import GPU, GPU_THREADS, has_resource
from wsi_pipeline.jobs.record import Record, file_fingerprint, hash_inputs
from wsi_pipeline.jobs.run import Outcome, Unit, run_units
from wsi_pipeline.models.checkpoint import ModelCard
from wsi_pipeline.patches.index import read_index
from wsi_pipeline.patches.slabs import Slab, covered_px
from wsi_pipeline.slides.reader import cached_slide
from wsi_pipeline.stages.run_directory import index_path, model_folder, model_id, of_model

HASH_DIGITS = 12
SAME_MPP = 0.2
"""A slide whose working resolution is further than this share from the model's gets a note."""


@dataclass(frozen=True)
class StorePlan:
    """One slide's store: where it is made, and all that it depends on.

    Parameters
    ----------
    slide_id, slide_path : str
    mpp : float
        Micrometres per level-0 px.
    index, model : Path
        The patch index and the model's folder.
    card : ModelCard
    inputs : dict
        See `Unit`.
    part, out : Path
        The store while it is filled, and when it is finished.
    """

    slide_id: str
    slide_path: str
    mpp: float
    index: Path
    model: Path
    card: ModelCard
    inputs: dict
    part: Path
    out: Path


def plan_store(slide, config: Config, card: ModelCard, folder: Path, **inputs) -> StorePlan:
    """Plan the store ``FOLDER/SLIDE.zarr`` of a row of the catalog.

    `inputs` are those beside the slide, its index and the weights.
    """
    index = index_path(config.out, slide.slide_id)
    inputs = {
        "slide_file": file_fingerprint(slide.path),
        "mpp": slide.mpp,
        "index": file_fingerprint(index, content=True),
        "weights": card.weights_sha256,
        **inputs,
    }
    return StorePlan(
        slide_id=slide.slide_id,
        slide_path=slide.path,
        mpp=slide.mpp,
        index=index,
        model=model_folder(config.out, config.train.name),
        card=card,
        inputs=inputs,
        part=folder / f".{slide.slide_id}-{hash_inputs(inputs)[:HASH_DIGITS]}.zarr",
        out=folder / f"{slide.slide_id}.zarr",
    )


def fill_stores(
    config: Config,
    client: Client,
    plans: Sequence[StorePlan],
    units_of: Callable[[StorePlan], Iterator[Unit]],
    *,
    predict: str,
    finish: str,
    unread: str,
    patch_px: int | None = None,
) -> Outcome:
    """Fill and finish the stores that are not finished.

    Parameters
    ----------
    config : Config
    client : distributed.Client
    plans : sequence of StorePlan
    units_of : callable
        The units of a plan, one for each slab, keyed ``SLIDE/CHUNK``; called when the store that
        it may begin has room (see `begin_store`). Each returns ``read_px`` (see `Slide.read_px`)
        and ``unread``: x, y, reason of what cannot be decoded. A RunError that it raises fails
        the slide, not the batch.
    predict, finish : str
        What the record calls the work on slabs and on slides.
    unread : str
        What one entry of ``unread`` is called: "patch".
    patch_px : int, optional
        Of the model's training, where the stores' pixels are the indexed patches: slides with
        patches of another size get a note.
    """
    name = config.train.name
    predict, finish = of_model(predict, name), of_model(finish, name)
    record = Record(config.out, finish)
    common = {
        "run_dir": config.out,
        "schema_version": SCHEMA,
        "retries": config.jobs.retries,
        "window": config.jobs.window,
    }
    expected = Counter()

    def slab_units() -> Iterator[Unit]:
        for plan in plans:
            if not record.is_done(_finish_unit(plan, patch_px), SCHEMA):
                for unit in _units_or_refusal(plan, units_of):
                    expected[plan.slide_id] += 1
                    yield unit

    resources = {GPU: 1 / GPU_THREADS} if has_resource(client, GPU) else None
    predicted = run_units(client, slab_units(), stage=predict, resources=resources, **common)
    lost, present, read_px = defaultdict(list), Counter(), Counter()
    for key, result in predicted.results.items():
        slide_id = key.rpartition("/")[0]
        present[slide_id] += 1
        read_px[slide_id] += result.get("read_px", 0)  # earlier versions did not count
        lost[slide_id] += [
            f"{unread} at level-0 px ({x}, {y}): {r}" for x, y, r in result["unread"]
        ]
    complete = [plan for plan in plans if present[plan.slide_id] == expected[plan.slide_id]]
    finish_units = [
        _finish_unit(plan, patch_px, lost[plan.slide_id], read_px[plan.slide_id])
        for plan in complete
    ]
    return predicted + run_units(client, finish_units, stage=finish, **common)


def begin_store(plan: StorePlan, config: Config, grid: PatchGrid, chunk: int) -> None:
    """Make an empty store where an earlier run has not begun it."""
    if not plan.part.exists():
        empty = plan.part.with_suffix(".empty")  # killed here, it is made anew
        create_heatmap(
            empty,
            grid=grid,
            slide_id=plan.slide_id,
            model=model_id(config.train.name, plan.card.weights_sha256),
            chunk=chunk,
            ngff=config.heatmap.ngff,
        )
        empty.rename(plan.part)


def slab_unit(
    plan: StorePlan, config: Config, slab: Slab, function: Callable[..., dict], **arguments
) -> Unit:
    """Give the unit that writes a chunk of a store.

    `function` gets the slide, the slab, the store and the model, beside `arguments`.
    """
    own = {
        "slide_path": plan.slide_path,
        "mpp": plan.mpp,
        "slab": slab,
        "store": str(plan.part),
        "model": str(plan.model),
        "weights": plan.card.weights_sha256,
        "mixed_precision": config.heatmap.mixed_precision,
    }
    key = f"{plan.slide_id}/{slab.chunk[0]}.{slab.chunk[1]}"
    output = chunk_file(plan.part, slab.chunk, config.heatmap.ngff)
    return Unit(key, plan.slide_id, plan.inputs, function, own | arguments, output)


def refuse(reason: str) -> dict:
    """Fail, so that what is wrong with one slide is recorded and the others go on."""
    raise RunError(reason)


def finish_slide(plan: StorePlan, patch_px: int | None, failures: list[str], read_px: int) -> dict:
    """Complete a slide's store and give it its name: the work of a unit.

    Parameters
    ----------
    plan : StorePlan
    patch_px : int or None
        See `fill_stores`.
    failures : list of str
        What of the slide could not be read.
    read_px : int
        Level px that its slabs took.

    Returns
    -------
    dict
        ``notes``, ``failures``, ``backend`` (who read the slide, see `Slide.backend`), ``read_px``
        and, with `patch_px`, ``needed_px``: level px under the indexed patches, each counted once.
    """
    if plan.part.exists():  # else a worker died between renaming the store and saying so
        finish_heatmap(plan.part)
        plan.part.rename(plan.out)
    grid = open_heatmap(plan.out).grid
    slide = cached_slide(plan.slide_path, plan.mpp)
    level, scale = slide.level_for(grid.downsample)
    found = {
        "notes": _unlike_training(grid, patch_px, plan.card.mpp),
        "failures": failures,
        "backend": slide.backend(level),
        "read_px": read_px,
    }
    if patch_px is not None:
        table = read_index(plan.index).table
        cells = grid.cells_at(table["x"].to_numpy(), table["y"].to_numpy())
        found["needed_px"] = round(covered_px(grid, *cells, *slide.size) * scale**2)
    return found


def _unlike_training(grid: PatchGrid, patch_px: int | None, mpp: float) -> list[str]:
    notes = []
    working_mpp = grid.mpp * grid.downsample
    if abs(working_mpp / mpp - 1) > SAME_MPP:
        notes.append(
            f"patches have {working_mpp:.4g} um per px, the model was trained at {mpp:.4g}:"
            " its probabilities mean little here"
        )
    if patch_px is not None and grid.patch_px != patch_px:
        notes.append(f"patches have {grid.patch_px} px, the model was trained on {patch_px}")
    return notes


def _units_or_refusal(
    plan: StorePlan, units_of: Callable[[StorePlan], Iterator[Unit]]
) -> Iterator[Unit]:
    """Give a slide's units, or one that fails; stores of other inputs make room first."""
    shutil.rmtree(plan.out, ignore_errors=True)  # nothing may take it for this one
    for store in plan.out.parent.glob(f".{plan.slide_id}-{'?' * HASH_DIGITS}.zarr"):
        if store != plan.part:
            shutil.rmtree(store)
    try:
        yield from units_of(plan)
    except RunError as error:
        arguments = {"reason": str(error)}
        yield Unit(f"{plan.slide_id}/", plan.slide_id, plan.inputs, refuse, arguments)


def _finish_unit(
    plan: StorePlan, patch_px: int | None, failures: Sequence[str] = (), read_px: int = 0
) -> Unit:
    arguments = {
        "plan": plan, "patch_px": patch_px, "failures": list(failures), "read_px": read_px
    }  # fmt: skip
    return Unit(plan.slide_id, plan.slide_id, plan.inputs, finish_slide, arguments, plan.out)
