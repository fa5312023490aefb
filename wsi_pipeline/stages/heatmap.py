"""The heatmap stage: the model over every indexed patch, one OME-Zarr for each slide."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from distributed import Client

from wsi_pipeline.config import Config, HeatmapConfig
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.heatmaps.predict import Predict, predict_slab
from wsi_pipeline.heatmaps.store import (
    SCHEMA,
    chunk_file,
    create_heatmap,
    finish_heatmap,
    open_heatmap,
    write_chunk,
)
from wsi_pipeline.jobs.cluster import GPU, GPU_THREADS, has_resource
from wsi_pipeline.jobs.run import Outcome
from wsi_pipeline.models.card import read_card
from wsi_pipeline.models.inference import predictor, use_batch_size
from wsi_pipeline.models.precision import Precision
from wsi_pipeline.patches.index import read_index
from wsi_pipeline.patches.slabs import Slab, slabs
from wsi_pipeline.slides.open_slides import cached_slide
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages.precision import compare_precisions, decide_precision
from wsi_pipeline.stages.run_directory import (
    PRECISION_STAGES,
    heatmap_folder,
    of_model,
    tiled_slides,
)
from wsi_pipeline.stages.stores import SlabStore, begin_whole, failure_texts, fill_stores
from wsi_pipeline.stages.worker_model import TrainedModel, worker_device, worker_model

MPP_TOLERANCE = 0.2
"""A slide whose working resolution is further than this share from the model's gets a note."""


def run(config: Config, client: Client) -> Outcome:
    """Write ``RUN/heatmaps/NAME/SLIDE.zarr`` for each tiled slide of the chosen splits.

    Raises
    ------
    RunError
        If no slide of the chosen splits is tiled.
    ModelError
        If the model is missing or damaged.
    """
    name = config.train.name
    model = TrainedModel.of_run(config)
    config = decide_precision(config, client, "heatmap", read_card(model.folder))
    folder = heatmap_folder(config.out, name)
    folder.mkdir(parents=True, exist_ok=True)
    stores = [
        HeatmapStore.of_slide(slide, config, folder, model=model, settings=config.heatmap)
        for slide in tiled_slides(config.out, config.heatmap.splits).itertuples(index=False)
    ]
    outcome = fill_stores(
        config,
        client,
        stores,
        fill=of_model("predict", name),
        finish=of_model("heatmap", name),
        schema_version=SCHEMA,
        resources=share_of_gpu(client),
    )
    if config.heatmap.precision == "bfloat16":
        outcome += compare_precisions(config, client, model, stores, stage=PRECISION_STAGES[0])
    return outcome


def share_of_gpu(client: Client) -> dict[str, float] | None:
    """What a unit that predicts asks a worker for: its share of a GPU if any worker has one."""
    return {GPU: 1 / GPU_THREADS} if has_resource(client, GPU) else None


@dataclass(frozen=True)
class HeatmapStore(SlabStore):
    """A slide's heatmap: a model's probability of each indexed patch.

    Parameters
    ----------
    model : TrainedModel
    settings : HeatmapConfig
    """

    model: TrainedModel
    settings: HeatmapConfig

    unread = "patch"
    """What the record calls one thing that cannot be decoded."""

    def begin(self) -> tuple[PatchGrid, Iterable[Slab]]:
        """A slab is the indexed patches of a chunk."""
        index = read_index(self.index.path)
        self.create(index.grid, self.settings.chunk)
        return index.grid, slabs(index.grid, *index.cells(), self.settings.chunk)

    def create(self, grid: PatchGrid, chunk: int) -> None:
        """Make the empty OME-Zarr unless it is there."""
        begin_whole(
            self.part,
            lambda path: create_heatmap(
                path,
                grid=grid,
                slide_id=self.slide_id,
                model=self.model.id,
                precision=self.settings.precision,
                chunk=chunk,
                ngff=self.settings.ngff,
            ),
        )

    def chunk_file(self, slab: Slab) -> Path:
        """The chunk's file in the store."""
        return chunk_file(self.part, slab.chunk, self.settings.ngff)

    def fill(self, slide: Slide, grid: PatchGrid, slab: Slab) -> dict:
        """Predict the slab's patches; ``patches`` is their number."""
        predict, batch_size = _predictor(
            self.model, self.settings.precision, self.settings.batch_size, grid.patch_px
        )
        values, unread = predict_slab(slide, grid, slab, predict, batch_size=batch_size)
        write_chunk(self.part, slab, values)
        return {"patches": len(values), "unread": [list(patch) for patch in unread]}

    def finish(self, unread: list[list]) -> dict:
        """Fill the pyramid; returns ``notes``, ``failures``, ``backend``, its reason, ``model``."""
        # Without one under the temporary name, a worker died between renaming it and saying so.
        store = self.part if self.part.exists() else self.out
        heatmap = open_heatmap(store)
        slide = cached_slide(self.slide.path, self.mpp)
        backend = slide.backend(slide.level_for(heatmap.grid.downsample)[0])
        found = {
            "notes": self.notes(heatmap.grid),
            "failures": failure_texts(unread, self.unread),
            "backend": backend.name,
            "backend_reason": backend.reason,
            "model": heatmap.model,
        }
        if store == self.part:  # last: a store under its name that is not on record is made anew
            finish_heatmap(store)
            store.rename(self.out)
        return found

    def notes(self, grid: PatchGrid) -> list[str]:
        """How the heatmap's patches differ from those that the model was trained on."""
        card = read_card(self.model.folder)
        notes = []
        if abs(grid.working_mpp / card.mpp - 1) > MPP_TOLERANCE:
            notes.append(
                f"patches have {grid.working_mpp:.4g} um per px, the model was trained at"
                f" {card.mpp:.4g}: its probabilities mean little here"
            )
        return notes + self.size_notes(grid, card.patch_px)

    def size_notes(self, grid: PatchGrid, trained_px: int) -> list[str]:
        """The same of the patches' size."""
        if grid.patch_px == trained_px:
            return []
        return [f"patches have {grid.patch_px} px, the model was trained on {trained_px}"]


@lru_cache(maxsize=1)
def _predictor(
    model: TrainedModel, precision: Precision, batch_size: int | None, patch_px: int
) -> tuple[Predict, int]:
    """The worker's model as a function of patches, and how many it is given at once."""
    module, card = worker_model(model)
    device = worker_device()
    predict = predictor(module, **card.normalisation, device=device, precision=precision)
    return predict, use_batch_size(device, batch_size, patch_px)
