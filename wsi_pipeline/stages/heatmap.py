"""The heatmap stage: the model over every indexed patch, one OME-Zarr for each slide."""

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from distributed import Client

from wsi_pipeline.config import Config
from wsi_pipeline.errors import RunError
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.heatmaps.predict import Predict, Slab, predict_slab, slabs
from wsi_pipeline.heatmaps.store import (
    SCHEMA,
    chunk_file,
    create_heatmap,
    finish_heatmap,
    open_heatmap,
    write_chunk,
)
from wsi_pipeline.jobs.cluster import GPU, has_resource
from wsi_pipeline.jobs.record import Record, file_fingerprint, hash_inputs
from wsi_pipeline.jobs.run import Outcome, Unit, run_units
from wsi_pipeline.models.checkpoint import ModelCard, read_card
from wsi_pipeline.models.inference import predictor, use_mixed_precision
from wsi_pipeline.patches.index import read_index
from wsi_pipeline.slides.reader import cached_slide
from wsi_pipeline.stages.run_directory import (
    heatmap_folder,
    index_path,
    model_folder,
    model_id,
    of_model,
    tiled_slides,
)
from wsi_pipeline.stages.worker_model import worker_model

HASH_DIGITS = 12
SAME_MPP = 0.2
"""A slide whose working resolution is further than this share from the model's gets a note."""


def run(config: Config, client: Client) -> Outcome:
    """Write ``RUN/heatmaps/NAME/SLIDE.zarr`` for each tiled slide of the chosen splits.

    The slabs of all slides are the units of one batch, so that no worker waits for the last slab
    of a slide. A slide's store is filled under a temporary name and gets its own when all of its
    slabs are there.

    Raises
    ------
    RunError
        If no slide of the chosen splits is tiled.
    ModelError
        If the model is missing or damaged.
    """
    card = read_card(model_folder(config.out, config.train.name))
    folder = heatmap_folder(config.out, config.train.name)
    folder.mkdir(parents=True, exist_ok=True)
    slides = tiled_slides(config.out, config.heatmap.splits)
    plans = [_plan(slide, config, card, folder) for slide in slides.itertuples(index=False)]
    predict, finish = (of_model(stage, config.train.name) for stage in ("predict", "heatmap"))
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
            if not record.is_done(_finish_unit(plan, []), SCHEMA):
                for unit in _slab_units(plan, config):
                    expected[plan.slide_id] += 1
                    yield unit

    resources = {GPU: 1} if has_resource(client, GPU) else None
    predicted = run_units(client, slab_units(), stage=predict, resources=resources, **common)
    unread, present = defaultdict(list), Counter()
    for key, result in predicted.results.items():
        slide_id = key.rpartition("/")[0]
        present[slide_id] += 1
        unread[slide_id] += result["unread"]
    complete = [plan for plan in plans if present[plan.slide_id] == expected[plan.slide_id]]
    finish_units = [_finish_unit(plan, unread[plan.slide_id]) for plan in complete]
    return predicted + run_units(client, finish_units, stage=finish, **common)


def predict_chunk(
    slide_path: str, mpp: float, grid: PatchGrid, slab: Slab, store: str, model: str,
    weights: str, mixed_precision: bool | None, batch_size: int,
) -> dict:  # fmt: skip
    """Predict a slab and write its chunk: the work of a unit.

    Returns
    -------
    dict
        ``patches`` (their number) and ``unread``: x, y, reason of those that cannot be decoded.
    """
    predict = _predictor(model, weights, mixed_precision)
    slide = cached_slide(slide_path, mpp)
    values, unread = predict_slab(slide, grid, slab, predict, batch_size=batch_size)
    write_chunk(store, slab, values)
    return {"patches": len(values), "unread": [list(patch) for patch in unread]}


def refuse(reason: str) -> dict:
    """Fail, so that what is wrong with one slide is recorded and the others go on."""
    raise RunError(reason)


def finish_slide(part: str, out: str, unread: list, patch_px: int, mpp: float) -> dict:
    """Complete a slide's store and give it its name: the work of a unit.

    `patch_px` and `mpp` are those that the model was trained on.
    """
    if Path(part).exists():  # else a worker died between renaming the store and saying so
        finish_heatmap(part)
        Path(part).rename(out)
    return {
        "notes": _unlike_training(open_heatmap(out).grid, patch_px, mpp),
        "failures": [f"patch at level-0 px ({x}, {y}): {reason}" for x, y, reason in unread],
    }


def _unlike_training(grid: PatchGrid, patch_px: int, mpp: float) -> list[str]:
    notes = []
    working_mpp = grid.mpp * grid.downsample
    if abs(working_mpp / mpp - 1) > SAME_MPP:
        notes.append(
            f"patches have {working_mpp:.4g} um per px, the model was trained at {mpp:.4g}:"
            " its probabilities mean little here"
        )
    if grid.patch_px != patch_px:
        notes.append(f"patches have {grid.patch_px} px, the model was trained on {patch_px}")
    return notes


@lru_cache(maxsize=1)
def _predictor(model: str, weights: str, mixed_precision: bool | None) -> Predict:
    """The worker's model as a function of patches."""
    module, card = worker_model(model, weights)
    device = next(module.parameters()).device
    return predictor(
        module,
        **card.normalisation,
        device=device,
        mixed_precision=use_mixed_precision(device, mixed_precision),
    )


@dataclass(frozen=True)
class _Plan:
    """One slide's heatmap: where it is made, and all that it depends on."""

    slide_id: str
    slide_path: str
    mpp: float
    index: Path
    model: Path
    card: ModelCard
    inputs: dict
    part: Path
    out: Path


def _plan(slide, config: Config, card: ModelCard, folder: Path) -> _Plan:
    index = index_path(config.out, slide.slide_id)
    inputs = {
        "slide_file": file_fingerprint(slide.path),
        "mpp": slide.mpp,
        "index": file_fingerprint(index, content=True),
        "weights": card.weights_sha256,
        "settings": config.heatmap.model_dump(include={"mixed_precision", "chunk", "ngff"}),
    }
    return _Plan(
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


def _slab_units(plan: _Plan, config: Config) -> Iterator[Unit]:
    """A unit for each slab of a slide; its store is made first, and those of old plans go."""
    settings = config.heatmap
    shutil.rmtree(plan.out, ignore_errors=True)  # of other inputs: nothing may take it for this
    for store in plan.out.parent.glob(f".{plan.slide_id}-{'?' * HASH_DIGITS}.zarr"):
        if store != plan.part:
            shutil.rmtree(store)
    try:
        index = read_index(plan.index)
    except RunError as error:
        yield Unit(f"{plan.slide_id}/", plan.slide_id, plan.inputs, refuse, {"reason": str(error)})
        return
    if not plan.part.exists():
        create_heatmap(
            plan.part,
            grid=index.grid,
            slide_id=plan.slide_id,
            model=model_id(config.train.name, plan.card.weights_sha256),
            chunk=settings.chunk,
            ngff=settings.ngff,
        )
    rows, cols = index.grid.cells_at(index.table["x"].to_numpy(), index.table["y"].to_numpy())
    for slab in slabs(index.grid, rows, cols, settings.chunk):
        arguments = {
            "slide_path": plan.slide_path,
            "mpp": plan.mpp,
            "grid": index.grid,
            "slab": slab,
            "store": str(plan.part),
            "model": str(plan.model),
            "weights": plan.card.weights_sha256,
            "mixed_precision": settings.mixed_precision,
            "batch_size": settings.batch_size,
        }
        yield Unit(
            f"{plan.slide_id}/{slab.chunk[0]}.{slab.chunk[1]}",
            plan.slide_id,
            plan.inputs,
            predict_chunk,
            arguments,
            output=chunk_file(plan.part, slab.chunk, settings.ngff),
        )


def _finish_unit(plan: _Plan, unread: list) -> Unit:
    arguments = {
        "part": str(plan.part),
        "out": str(plan.out),
        "unread": unread,
        "patch_px": plan.card.patch_px,
        "mpp": plan.card.mpp,
    }
    return Unit(plan.slide_id, plan.slide_id, plan.inputs, finish_slide, arguments, plan.out)
