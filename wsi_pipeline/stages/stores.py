"""Heatmap stores filled slab by slab: what the heatmap stage and the fine one share."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from distributed import Client

from wsi_pipeline.config import Config
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.heatmaps.store import (
    SCHEMA,
    chunk_file,
    create_heatmap,
    finish_heatmap,
    open_heatmap,
)
from wsi_pipeline.jobs.cluster import GPU, GPU_CORES, GPU_THREADS, has_resource
from wsi_pipeline.jobs.run import Outcome, Unit
from wsi_pipeline.models.checkpoint import ModelCard
from wsi_pipeline.patches.slabs import Slab
from wsi_pipeline.slides.open_slides import cached_slide
from wsi_pipeline.slides.threads import decoding_in
from wsi_pipeline.stages.run_directory import model_folder, model_id, of_model
from wsi_pipeline.stages.slab_stores import (
    StorePlan,
    all_unread,
    failure_texts,
    fill_stores,
    plan_store,
)

SAME_MPP = 0.2
"""A slide whose working resolution is further than this share from the model's gets a note."""


def plan_heatmap(slide, config: Config, card: ModelCard, folder: Path, **inputs) -> StorePlan:
    """Plan the store ``FOLDER/SLIDE.zarr`` of a row of the catalog.

    `inputs` are those beside the slide, its index and the weights.
    """
    return plan_store(slide, config, folder, schema=SCHEMA, weights=card.weights_sha256, **inputs)


def fill_heatmaps(
    config: Config,
    client: Client,
    card: ModelCard,
    plans: Sequence[StorePlan],
    units_of: Callable[[StorePlan], Iterator[Unit]],
    *,
    predict: str,
    finish: str,
    unread: str,
    patch_px: int | None = None,
) -> Outcome:
    """Fill and finish the stores that are not finished, on GPUs if any worker has one.

    Parameters
    ----------
    config, client, plans, units_of
        As for `fill_stores`; each is a `slab_unit`.
    card : ModelCard
    predict, finish : str
        What the record calls the work on slabs and on slides, before the model's name.
    unread : str
        What the record calls one thing that cannot be decoded.
    patch_px : int, optional
        Of the model's training, where the stores' pixels are the indexed patches: slides with
        patches of another size get a note.
    """
    return fill_stores(
        config,
        client,
        plans,
        units_of,
        partial(_finish_unit, what=unread, mpp=card.mpp, patch_px=patch_px),
        fill=of_model(predict, config.train.name),
        finish=of_model(finish, config.train.name),
        schema_version=SCHEMA,
        resources={GPU: 1 / GPU_THREADS} if has_resource(client, GPU) else None,
    )


def begin_store(
    plan: StorePlan, config: Config, card: ModelCard, grid: PatchGrid, chunk: int
) -> None:
    """Make an empty store where an earlier run has not begun it."""
    if not plan.part.exists():
        empty = plan.part.with_suffix(".empty")  # killed here, it is made anew
        create_heatmap(
            empty,
            grid=grid,
            slide_id=plan.slide_id,
            model=model_id(config.train.name, card.weights_sha256),
            chunk=chunk,
            precision=config.heatmap.precision,
            ngff=config.heatmap.ngff,
        )
        empty.rename(plan.part)


def slab_unit(
    plan: StorePlan,
    config: Config,
    card: ModelCard,
    slab: Slab,
    function: Callable[..., dict],
    **arguments,
) -> Unit:
    """Give the unit that writes a chunk of a store.

    `function` gets the open slide, the slab, the store and the model, beside `arguments`; see
    `fill_chunk`.
    """
    own = {
        "function": function,
        "slide_path": plan.slide_path,
        "mpp": plan.mpp,
        "slab": slab,
        "store": str(plan.part),
        "model": str(model_folder(config.out, config.train.name)),
        "weights": card.weights_sha256,
        "precision": config.heatmap.precision,
    }
    key = f"{plan.slide_id}/{slab.chunk[0]}.{slab.chunk[1]}"
    output = chunk_file(plan.part, slab.chunk, config.heatmap.ngff)
    return Unit(key, plan.slide_id, plan.inputs, fill_chunk, own | arguments, output)


def fill_chunk(function: Callable[..., dict], slide_path: str, mpp: float, **arguments) -> dict:
    """Do the work on a slab: a unit. A local worker's GPU is fed by its share of all cores.

    Returns
    -------
    dict
        What `function` returns of the open slide and `arguments`.
    """
    slide = cached_slide(slide_path, mpp)
    with decoding_in(int(os.environ.get(GPU_CORES, 0))):
        return function(slide, **arguments)


def finish_slide(plan: StorePlan, failures: list[str], patch_px: int | None, mpp: float) -> dict:
    """Complete a slide's store and give it its name: the work of a unit.

    Parameters
    ----------
    plan : StorePlan
    failures : list of str
        What of the slide could not be read.
    patch_px : int or None
        See `fill_heatmaps`.
    mpp : float
        Of the model's training, um per working px.

    Returns
    -------
    dict
        ``notes``, ``failures``, ``backend`` and ``backend_reason`` (what reads such a level, see
        `Slide.backend`) and ``model`` (by name and weights, see `model_id`).
    """
    # Without one under the temporary name, a worker died between renaming it and saying so.
    store = plan.part if plan.part.exists() else plan.out
    heatmap = open_heatmap(store)
    grid = heatmap.grid
    slide = cached_slide(plan.slide_path, plan.mpp)
    level, _ = slide.level_for(grid.downsample)
    backend = slide.backend(level)
    found = {
        "notes": _unlike_training(grid, patch_px, mpp),
        "failures": failures,
        "backend": backend.name,
        "backend_reason": backend.reason,
        "model": heatmap.model,
    }
    if store == plan.part:  # last: a store under its name that is not on record is made anew
        finish_heatmap(store)
        store.rename(plan.out)
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


def _finish_unit(
    plan: StorePlan, results: list[dict], *, what: str, mpp: float, patch_px: int | None
) -> Unit:
    arguments = {
        "plan": plan,
        "failures": failure_texts(all_unread(results), what),
        "patch_px": patch_px,
        "mpp": mpp,
    }
    return Unit(plan.slide_id, plan.slide_id, plan.inputs, finish_slide, arguments, plan.out)
