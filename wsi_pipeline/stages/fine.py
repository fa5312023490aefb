"""The fine stage: PatchNet around every few pixels, everywhere or where another model points to."""

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from distributed import Client

from wsi_pipeline.config import Config
from wsi_pipeline.errors import ModelError, RunError
from wsi_pipeline.files import write_whole
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.fine import DensePredict, coarse_slabs, predict_pixels, wanted_pixels
from wsi_pipeline.heatmaps.render import HeatmapPanel, heatmap_figure
from wsi_pipeline.heatmaps.store import Heatmap, open_heatmap, write_chunk
from wsi_pipeline.jobs.record import file_fingerprint
from wsi_pipeline.jobs.run import Outcome, Unit, run_units
from wsi_pipeline.models.checkpoint import ModelCard, read_card
from wsi_pipeline.models.inference import dense_predictor
from wsi_pipeline.models.precision import Precision
from wsi_pipeline.patches.index import PatchIndex, read_index
from wsi_pipeline.patches.slabs import Slab
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages import catalog
from wsi_pipeline.stages.precision import compare_precisions, decide_precision
from wsi_pipeline.stages.run_directory import (
    FINE_STAGES,
    PRECISION_STAGES,
    fine_folder,
    heatmap_folder,
    index_path,
    model_folder,
    of_model,
    tiled_slides,
)
from wsi_pipeline.stages.slab_stores import StorePlan
from wsi_pipeline.stages.stores import begin_store, fill_heatmaps, plan_heatmap, slab_unit
from wsi_pipeline.stages.worker_model import worker_model

PICTURE_SCHEMA = 1
SHOWN_LEVEL0_PX = 2000
"""Side of the place that a slide's picture shows, at least."""
INNER_SQUARES = 7
"""The same in inner squares of the coarse grid, at least."""
PICTURE_PX = 640
"""Side of what is read of the slide for its picture."""
WIDTH_INCHES = 14.0


def run(config: Config, client: Client) -> Outcome:
    """Write ``RUN/fine/NAME/SLIDE.zarr`` and ``.jpg`` for each tiled slide of the chosen splits.

    A pixel is Q of the patch centred there, of those pixels that lie in the inner square of an
    indexed patch or, with `fine.coarse`, of a suspicious one.

    Raises
    ------
    RunError
        If no slide of the chosen splits is tiled, or the model `fine.coarse` has no heatmaps.
    ModelError
        If the model is missing, damaged, no PatchNet, or was trained with colour constancy.
    """
    name = config.train.name
    card = read_card(model_folder(config.out, name))
    patch_px = _subnet_patch_px(card, model_folder(config.out, name))
    _check_coarse(config)
    config = decide_precision(config, client, "heatmap")
    folder = fine_folder(config.out, name)
    folder.mkdir(parents=True, exist_ok=True)
    slides = tiled_slides(config.out, config.heatmap.splits)
    plans = [_plan(slide, config, card, folder) for slide in slides.itertuples(index=False)]
    slabs, finish, pictures = FINE_STAGES
    units_of = partial(_slab_units, config=config, card=card, patch_px=patch_px)
    filled = fill_heatmaps(
        config, client, card, plans, units_of,
        predict=slabs, finish=finish, unread="block",
    )  # fmt: skip
    if config.heatmap.precision == "bfloat16":
        filled += compare_precisions(
            config, client, card, plans,
            stage=PRECISION_STAGES[1], fine_stride_px=config.fine.stride_px,
        )  # fmt: skip
    finished = slides[[plan.out.exists() for plan in plans]]
    drawn = run_units(
        client,
        [_picture_unit(slide, config, folder) for slide in finished.itertuples(index=False)],
        run_dir=config.out,
        stage=of_model(pictures, name),
        schema_version=PICTURE_SCHEMA,
        retries=config.jobs.retries,
        window=config.jobs.window,
    )
    return filled + drawn


def predict_fine_chunk(
    slide: Slide, grid: PatchGrid, coarse: PatchGrid, slab: Slab, chunk: int, store: str,
    model: str, weights: str, precision: Precision,
) -> dict:  # fmt: skip
    """Predict the wanted pixels of a chunk and write it: the work of a unit, see `fill_chunk`.

    Parameters
    ----------
    grid, coarse : PatchGrid
        Of the fine heatmap and of the patch index.
    slab : Slab
        The coarse cells that touch the chunk.
    chunk : int
        Its side, fine heatmap px.

    Returns
    -------
    dict
        ``pixels`` (their number) and ``unread``: x, y, reason of blocks that cannot be decoded.
    """
    predict = _predictor(model, weights, grid.stride_px, precision)
    wanted = wanted_pixels(grid, coarse, slab, chunk)
    values, unread = predict_pixels(slide, grid, wanted, predict)
    write_chunk(store, wanted, values)
    return {"pixels": len(values), "unread": [list(block) for block in unread]}


def draw_place(
    path: str, mpp: float, annotation: str | None, annotation_rules: dict, index: str,
    coarse: str | None, fine: str, titles: list[str], out: str,
) -> dict:  # fmt: skip
    """Draw a slide's most suspicious place, its heatmaps side by side: the work of a unit.

    The place is around the highest value of the coarse heatmap, or in the middle of the indexed
    patches. Of the slide and of the fine heatmap no more is read than is shown.
    """
    patches = read_index(index)
    stores = [open_heatmap(store) for store in (coarse, fine) if store is not None]
    shown = _picture_window(patches.grid, *_most_suspicious(patches, stores[0] if coarse else None))
    panels = [_panel(*titled, shown) for titled in zip(titles, stores, strict=True)]
    with Slide(path, mpp) as slide:
        lesions = catalog.slide_annotation(slide, annotation, **annotation_rules).lesions
        downsample = shown.width / PICTURE_PX
        image = slide.read(shown.x, shown.y, PICTURE_PX, PICTURE_PX, downsample)
    write_whole(out, heatmap_figure(image, shown, lesions, panels, width_inches=WIDTH_INCHES))
    return {"lesions": len(lesions)}


def _subnet_patch_px(card: ModelCard, folder: Path) -> int:
    """Side of the patches of PatchNet's subnet, px."""
    if card.architecture != "patchnet":
        raise ModelError(
            f"{folder}: the model is of architecture {card.architecture!r}: fine heatmaps need one"
            " that is trained with train.model patchnet"
        )
    if card.shades_of_gray is not None:
        raise ModelError(
            f"{folder}: the model was trained with shades_of_gray {card.shades_of_gray:g}: colour"
            " constancy is of a whole patch, and a fine heatmap has none; train one without it"
        )
    if "patch_px" not in card.arguments:
        raise ModelError(f"{folder}: model.json lacks the argument patch_px: PatchNet needs it")
    return card.arguments["patch_px"]


def _check_coarse(config: Config):
    name = config.fine.coarse
    if name is not None and not heatmap_folder(config.out, name).is_dir():
        raise RunError(
            f"{heatmap_folder(config.out, name)} does not exist, and fine.coarse is {name}: run the"
            " heatmap stage of that model first"
        )


def _picture(folder: Path, slide_id: str) -> Path:
    return folder / f"{slide_id}.jpg"


def _coarse_store(config: Config, slide_id: str) -> Path | None:
    name = config.fine.coarse
    return name and heatmap_folder(config.out, name) / f"{slide_id}.zarr"


def _plan(slide, config: Config, card: ModelCard, folder: Path) -> StorePlan:
    coarse = _coarse_store(config, slide.slide_id)
    settings = config.heatmap.model_dump(include={"precision", "ngff"})
    settings |= config.fine.model_dump(include={"stride_px", "chunk"})
    if coarse is not None:
        settings["min_probability"] = config.fine.min_probability
    return plan_heatmap(
        slide, config, card, folder, settings=settings,
        coarse=coarse and file_fingerprint(coarse),  # a finished store is never written to
    )  # fmt: skip


def _slab_units(plan: StorePlan, config: Config, card: ModelCard, patch_px: int) -> Iterator[Unit]:
    """A unit for each chunk with something to look at; the store is made first."""
    _picture(plan.out.parent, plan.slide_id).unlink(missing_ok=True)  # of other inputs
    index = read_index(plan.index)
    rows, cols = _suspicious_cells(
        index, _coarse_store(config, plan.slide_id), config.fine.min_probability
    )
    grid = index.grid.finer(patch_px, config.fine.stride_px)
    chunk = config.fine.chunk
    begin_store(plan, config, card, grid, chunk)
    for slab in coarse_slabs(grid, index.grid, rows, cols, chunk):
        yield slab_unit(
            plan, config, card, slab, predict_fine_chunk, grid=grid, coarse=index.grid,
            chunk=chunk,
        )  # fmt: skip


def _suspicious_cells(
    index: PatchIndex, coarse: Path | None, min_probability: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the coarse heatmap's suspicious pixels, or of all indexed patches."""
    if coarse is None:
        return index.cells()
    return np.nonzero(_same_grid(open_heatmap(coarse), index).values() >= min_probability)


def _same_grid(coarse: Heatmap, index: PatchIndex) -> Heatmap:
    if coarse.grid != index.grid:
        raise RunError(
            f"{coarse.path}: its grid, {coarse.grid}, is not that of the patch index,"
            f" {index.grid}: run the heatmap stage of that model again"
        )
    return coarse


@lru_cache(maxsize=1)
def _predictor(model: str, weights: str, stride_px: int, precision: Precision) -> DensePredict:
    """The subnet, loaded once in each worker; `weights` is the hash that tells models apart."""
    module, card = worker_model(model, weights)
    device = next(module.parameters()).device
    return dense_predictor(
        module.subnet,
        stride_px=stride_px,
        mean=card.mean,
        std=card.std,
        gamma=card.gamma,
        device=device,
        precision=precision,
    )


def _picture_unit(slide, config: Config, folder: Path) -> Unit:
    coarse = _coarse_store(config, slide.slide_id)
    fine = folder / f"{slide.slide_id}.zarr"
    index = index_path(config.out, slide.slide_id)
    titles = [f"fine heatmap ({config.train.name})\nat every indexed patch"]
    if coarse is not None:
        where = f"where the coarse one is {config.fine.min_probability:g} or more"
        titles = [
            f"coarse heatmap ({config.fine.coarse})",
            f"fine heatmap ({config.train.name})\n{where}",
        ]
    settings = {
        "mpp": slide.mpp,
        "annotation_rules": config.catalog.annotation.model_dump(),
        "titles": titles,
    }
    inputs = {
        **settings,
        "slide_file": file_fingerprint(slide.path),
        "annotation_file": slide.annotation and file_fingerprint(slide.annotation, content=True),
        "index": file_fingerprint(index, content=True),
        "coarse": coarse and file_fingerprint(coarse),
        "fine": file_fingerprint(fine),
    }
    out = _picture(folder, slide.slide_id)
    arguments = {
        **settings,
        "path": slide.path,
        "annotation": slide.annotation,
        "index": str(index),
        "coarse": coarse and str(coarse),
        "fine": str(fine),
        "out": str(out),
    }
    return Unit(slide.slide_id, slide.slide_id, inputs, draw_place, arguments, out)


def _most_suspicious(patches: PatchIndex, coarse: Heatmap | None) -> tuple[int, int]:
    """Row and column of the highest coarse value, else of the most central indexed patch."""
    if coarse is not None:
        values = coarse.values()
        if np.isfinite(values).any():
            return np.unravel_index(np.nanargmax(values), values.shape)
    rows, cols = patches.cells()
    if not len(rows):
        return patches.grid.shape[0] // 2, patches.grid.shape[1] // 2
    central = np.argmin((rows - rows.mean()) ** 2 + (cols - cols.mean()) ** 2)
    return rows[central], cols[central]


def _picture_window(grid: PatchGrid, row: int, col: int) -> Bounds:
    """A square around a cell's centre, level-0 px; within the slide's bounds where it fits."""
    bounds = grid.bounds
    side = round(max(SHOWN_LEVEL0_PX, grid.level0_length(INNER_SQUARES * grid.inner_px)))
    x, y = (int(centre) - side // 2 for centre in grid.centre_pixels(row, col))
    return Bounds(
        max(bounds.x, min(x, bounds.x + bounds.width - side)),
        max(bounds.y, min(y, bounds.y + bounds.height - side)),
        side,
        side,
    )


def _panel(title: str, heatmap: Heatmap, shown: Bounds) -> HeatmapPanel:
    rows, cols = heatmap.grid.cells_over(shown)
    values = heatmap.values(0, rows, cols)
    if np.isnan(values).all():
        title += ": nowhere here"
    return HeatmapPanel(title, values, heatmap.grid, (rows.start, cols.start))
