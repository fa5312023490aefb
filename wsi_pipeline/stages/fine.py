"""The fine stage: PatchNet around every few pixels, everywhere or where another model points to."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from distributed import Client

from wsi_pipeline.config import AnnotationConfig, Config
from wsi_pipeline.errors import ModelError, RunError
from wsi_pipeline.files import write_whole
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.fine import DensePredict, coarse_slabs, predict_pixels, wanted_pixels
from wsi_pipeline.heatmaps.store import SCHEMA, Heatmap, open_heatmap, write_chunk
from wsi_pipeline.jobs.run import Outcome, run_units
from wsi_pipeline.jobs.unit import LargeFile, Output, SmallFile, Unit
from wsi_pipeline.models.card import ModelCard, read_card
from wsi_pipeline.models.inference import dense_predictor
from wsi_pipeline.models.patchnet import subnet_of
from wsi_pipeline.models.precision import Precision
from wsi_pipeline.patches.index import PatchIndex, read_index
from wsi_pipeline.patches.slabs import Slab
from wsi_pipeline.report.slide_pictures import HeatmapPanel, heatmap_figure
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages.heatmap import HeatmapStore, share_of_gpu
from wsi_pipeline.stages.precision import compare_precisions, decide_precision
from wsi_pipeline.stages.run_directory import (
    FINE_STAGES,
    PRECISION_STAGES,
    fine_folder,
    heatmap_folder,
    index_path,
    of_model,
    tiled_slides,
)
from wsi_pipeline.stages.slide_annotation import slide_annotation
from wsi_pipeline.stages.stores import fill_stores
from wsi_pipeline.stages.worker_model import TrainedModel, worker_device, worker_model

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
    model = TrainedModel.of_run(config)
    patch_px = _subnet_patch_px(read_card(model.folder), model.folder)
    _check_coarse(config)
    config = decide_precision(config, client, "heatmap")
    folder = fine_folder(config.out, name)
    folder.mkdir(parents=True, exist_ok=True)
    slides = tiled_slides(config.out, config.heatmap.splits)
    stores = [
        FineStore.of_slide(slide, config, folder, model=model, **_inputs(config, slide, patch_px))
        for slide in slides.itertuples(index=False)
    ]
    slabs, finish, pictures = FINE_STAGES
    filled = fill_stores(
        config,
        client,
        stores,
        fill=of_model(slabs, name),
        finish=of_model(finish, name),
        schema_version=SCHEMA,
        resources=share_of_gpu(client),
    )
    if config.heatmap.precision == "bfloat16":
        filled += compare_precisions(
            config, client, model, stores,
            stage=PRECISION_STAGES[1], fine_stride_px=config.fine.stride_px,
        )  # fmt: skip
    finished = slides[[store.out.exists() for store in stores]]
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


@dataclass(frozen=True)
class FineStore(HeatmapStore):
    """A slide's fine heatmap: Q of the small patch centred at every few pixels.

    Parameters
    ----------
    patch_px, stride_px : int
        Of the subnet's patches.
    chunk : int
        Side of a chunk, heatmap px.
    coarse : LargeFile or None
        The heatmap that says where to look. It is finished, so never written to.
    min_probability : float or None
        Its pixels that are suspicious; None without one.
    """

    patch_px: int
    stride_px: int
    chunk: int
    coarse: LargeFile | None
    min_probability: float | None

    unread = "block"

    def begin(self) -> tuple[PatchGrid, Iterable[Slab]]:
        """A slab is the suspicious coarse cells that touch a chunk."""
        picture_path(Path(self.folder), self.slide_id).unlink(missing_ok=True)  # of other inputs
        index = read_index(self.index.path)
        grid = index.grid.finer(self.patch_px, self.stride_px)
        cells = _suspicious_cells(index, self.coarse, self.min_probability)
        self.create(grid, self.chunk)
        return index.grid, coarse_slabs(grid, index.grid, *cells, self.chunk)

    def fill(self, slide: Slide, grid: PatchGrid, slab: Slab) -> dict:
        """Predict the wanted pixels of a chunk; ``pixels`` is their number."""
        predict = _predictor(self.model, self.stride_px, self.settings.precision)
        finer = grid.finer(self.patch_px, self.stride_px)
        wanted = wanted_pixels(finer, grid, slab, self.chunk)
        values, unread = predict_pixels(slide, finer, wanted, predict)
        write_chunk(self.part, wanted, values)
        return {"pixels": len(values), "unread": [list(block) for block in unread]}

    def size_notes(self, grid: PatchGrid, trained_px: int) -> list[str]:
        """None: its patches are the subnet's."""
        return []


def _inputs(config: Config, slide, patch_px: int) -> dict:
    """The fine heatmap's own inputs."""
    coarse = _coarse_store(config, slide.slide_id)
    return {
        "settings": config.heatmap.model_copy(update={"chunk": None}),  # it has its own
        "patch_px": patch_px,
        "stride_px": config.fine.stride_px,
        "chunk": config.fine.chunk,
        "coarse": coarse and LargeFile.at(coarse),
        "min_probability": config.fine.min_probability if coarse else None,
    }


@dataclass(frozen=True)
class DrawFinePlace(Unit):
    """Draw a slide's most suspicious place, its heatmaps side by side.

    The place is around the highest value of the coarse heatmap, or in the middle of the indexed
    patches. Of the slide and of the fine heatmap no more is read than is shown.
    """

    slide: LargeFile
    mpp: float
    annotation: SmallFile | None
    annotation_rules: AnnotationConfig
    index: SmallFile
    coarse: LargeFile | None
    fine: LargeFile
    titles: tuple[str, ...]
    out: Output

    def run(self) -> dict:
        """``lesions``: their number."""
        patches = read_index(self.index.path)
        stores = [open_heatmap(store.path) for store in (self.coarse, self.fine) if store]
        shown = _picture_window(
            patches.grid, *_most_suspicious(patches, stores[0] if self.coarse else None)
        )
        panels = [_panel(*titled, shown) for titled in zip(self.titles, stores, strict=True)]
        with Slide(self.slide.path, self.mpp) as slide:
            lesions = slide_annotation(slide, self.annotation, self.annotation_rules).lesions
            downsample = shown.width / PICTURE_PX
            image = slide.read(shown.x, shown.y, PICTURE_PX, PICTURE_PX, downsample)
        figure = heatmap_figure(image, shown, lesions, panels, width_inches=WIDTH_INCHES)
        write_whole(self.out, figure)
        return {"lesions": len(lesions)}


def _subnet_patch_px(card: ModelCard, folder: str) -> int:
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


def picture_path(folder: Path, slide_id: str) -> Path:
    """Where the picture of a slide's most suspicious place lies."""
    return folder / f"{slide_id}.jpg"


def _coarse_store(config: Config, slide_id: str) -> Path | None:
    name = config.fine.coarse
    return heatmap_folder(config.out, name) / f"{slide_id}.zarr" if name else None


def _suspicious_cells(
    index: PatchIndex, coarse: LargeFile | None, min_probability: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the coarse heatmap's suspicious pixels, or of all indexed patches."""
    if coarse is None:
        return index.cells()
    rows, cols = np.nonzero(
        _same_grid(open_heatmap(coarse.path), index).values() >= min_probability
    )
    return rows, cols


def _same_grid(coarse: Heatmap, index: PatchIndex) -> Heatmap:
    if coarse.grid != index.grid:
        raise RunError(
            f"{coarse.path}: its grid, {coarse.grid}, is not that of the patch index,"
            f" {index.grid}: run the heatmap stage of that model again"
        )
    return coarse


@lru_cache(maxsize=1)
def _predictor(model: TrainedModel, stride_px: int, precision: Precision) -> DensePredict:
    """The subnet, loaded once in each worker."""
    module, card = worker_model(model)
    device = worker_device()
    return dense_predictor(
        subnet_of(module),
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
    return DrawFinePlace(
        slide_id=slide.slide_id,
        slide=LargeFile.at(slide.path),
        mpp=float(slide.mpp),
        annotation=slide.annotation and SmallFile.at(slide.annotation),
        annotation_rules=config.catalog.annotation,
        index=SmallFile.at(index),
        coarse=LargeFile.at(coarse) if coarse else None,
        fine=LargeFile.at(fine),
        titles=tuple(titles),
        out=Output(picture_path(folder, slide.slide_id)),
    )


def _most_suspicious(patches: PatchIndex, coarse: Heatmap | None) -> tuple[int, int]:
    """Row and column of the highest coarse value, else of the most central indexed patch."""
    if coarse is not None:
        values = coarse.values()
        if np.isfinite(values).any():
            row, col = np.unravel_index(np.nanargmax(values), values.shape)
            return int(row), int(col)
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
