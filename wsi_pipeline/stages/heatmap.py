"""The heatmap stage: the model over every indexed patch, one OME-Zarr for each slide."""

from collections.abc import Iterator
from functools import lru_cache, partial

from distributed import Client

from wsi_pipeline.config import Config
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.heatmaps.predict import Predict, predict_slab
from wsi_pipeline.heatmaps.store import write_chunk
from wsi_pipeline.jobs.run import Outcome, Unit
from wsi_pipeline.models.checkpoint import ModelCard, read_card
from wsi_pipeline.models.inference import predictor, use_batch_size
from wsi_pipeline.models.precision import Precision
from wsi_pipeline.patches.index import read_index
from wsi_pipeline.patches.slabs import Slab, slabs
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages.precision import compare_precisions, decide_precision
from wsi_pipeline.stages.run_directory import (
    PRECISION_STAGES,
    heatmap_folder,
    model_folder,
    tiled_slides,
)
from wsi_pipeline.stages.slab_stores import StorePlan
from wsi_pipeline.stages.stores import (
    begin_store,
    fill_heatmaps,
    plan_heatmap,
    slab_unit,
)
from wsi_pipeline.stages.worker_model import worker_model


def run(config: Config, client: Client) -> Outcome:
    """Write ``RUN/heatmaps/NAME/SLIDE.zarr`` for each tiled slide of the chosen splits.

    Raises
    ------
    RunError
        If no slide of the chosen splits is tiled.
    ModelError
        If the model is missing or damaged.
    """
    card = read_card(model_folder(config.out, config.train.name))
    config = decide_precision(config, client, "heatmap")
    folder = heatmap_folder(config.out, config.train.name)
    folder.mkdir(parents=True, exist_ok=True)
    slides = tiled_slides(config.out, config.heatmap.splits)
    settings = config.heatmap.model_dump(include={"precision", "chunk", "ngff"})
    plans = [
        plan_heatmap(slide, config, card, folder, settings=settings)
        for slide in slides.itertuples(index=False)
    ]
    outcome = fill_heatmaps(
        config, client, card, plans, partial(_slab_units, config=config, card=card),
        predict="predict", finish="heatmap", unread="patch", patch_px=card.patch_px,
    )  # fmt: skip
    if config.heatmap.precision == "bfloat16":
        outcome += compare_precisions(config, client, card, plans, stage=PRECISION_STAGES[0])
    return outcome


def predict_chunk(
    slide: Slide, grid: PatchGrid, slab: Slab, store: str, model: str, weights: str,
    precision: Precision, batch_size: int | None,
) -> dict:  # fmt: skip
    """Predict a slab and write its chunk: the work of a unit, see `fill_chunk`.

    Returns
    -------
    dict
        ``patches`` (their number) and ``unread``: x, y, reason of those that cannot be decoded.
    """
    predict, batch_size = _predictor(model, weights, precision, batch_size)
    values, unread = predict_slab(slide, grid, slab, predict, batch_size=batch_size)
    write_chunk(store, slab, values)
    return {"patches": len(values), "unread": [list(patch) for patch in unread]}


@lru_cache(maxsize=1)
def _predictor(
    model: str, weights: str, precision: Precision, batch_size: int | None
) -> tuple[Predict, int]:
    """The worker's model as a function of patches, and how many it is given at once."""
    module, card = worker_model(model, weights)
    device = next(module.parameters()).device
    predict = predictor(module, **card.normalisation, device=device, precision=precision)
    return predict, use_batch_size(device, batch_size)


def _slab_units(plan: StorePlan, config: Config, card: ModelCard) -> Iterator[Unit]:
    """A unit for each slab of a slide; its store is made first."""
    settings = config.heatmap
    index = read_index(plan.index)
    begin_store(plan, config, card, index.grid, settings.chunk)
    for slab in slabs(index.grid, *index.cells(), settings.chunk):
        yield slab_unit(
            plan, config, card, slab, predict_chunk, grid=index.grid,
            batch_size=settings.batch_size,
        )  # fmt: skip
