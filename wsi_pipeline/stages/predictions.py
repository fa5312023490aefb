"""What a model says of each slide of a run, without labels: a table, pictures and a page."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from distributed import Client

from wsi_pipeline.config import Config, DetectionConfig
from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.detections import write_detections
from wsi_pipeline.files import write_whole
from wsi_pipeline.heatmaps.detect import find_detections
from wsi_pipeline.heatmaps.regions import heatmap_regions
from wsi_pipeline.heatmaps.store import open_heatmap
from wsi_pipeline.jobs.record import read_done
from wsi_pipeline.jobs.run import Outcome, run_units
from wsi_pipeline.jobs.unit import LargeFile, Output, Unit
from wsi_pipeline.models.card import ModelCard, read_card
from wsi_pipeline.report.prediction_page import PredictedSlide, write_prediction_page
from wsi_pipeline.report.slide_pictures import HeatmapPanel, heatmap_figure
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages.leakage import of_patients, seen_patients, seen_slides
from wsi_pipeline.stages.run_directory import (
    PREDICTIONS_PAGE,
    catalog_notes,
    heatmap_folder,
    model_folder,
    model_id,
    of_model,
    prediction_folder,
    read_slides,
    slides_path,
)
from wsi_pipeline.stages.status import failures_on_the_way, notes_by_slide

SCHEMA_VERSION = 1


def run(config: Config, client: Client) -> Outcome:
    """Write ``RUN/predictions/NAME/``: ``slides.csv``, ``index.html``, pictures and detections.

    Raises
    ------
    RunError
        If no slide has a heatmap.
    ModelError
        If the model is missing or its card is damaged.
    """
    name, folder = config.train.name, prediction_folder(config.out, config.train.name)
    card = read_card(model_folder(config.out, name))
    for part in ("slides", "detections"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    slides = read_slides(config.out)
    heatmaps = heatmap_folder(config.out, name)
    slides = slides[[(heatmaps / f"{of}.zarr").is_dir() for of in slides["slide_id"]]]
    if slides.empty:
        raise RunError(
            f"{config.out}: no slide has a heatmap of {name}. See {config.out / 'failures.csv'}"
        )
    outcome = run_units(
        client,
        [_unit(slide, config, card, folder) for slide in slides.itertuples(index=False)],
        run_dir=config.out,
        stage=of_model("predictions", name),
        schema_version=SCHEMA_VERSION,
        retries=config.jobs.retries,
        window=config.jobs.window,
    )
    table = _table(config, card, slides, outcome.results)
    write_whole(folder / "slides.csv", table.to_csv(index=False, float_format="%.6g").encode())
    _write_page(config, card, folder, table)
    return outcome


@dataclass(frozen=True)
class PredictSlide(Unit):
    """Find detections and areas in a slide's heatmap, and draw both.

    Writes, in `folder`: ``detections/SLIDE.csv``, and ``slides/SLIDE.jpg``: the slide, with the
    areas at or above the patch threshold outlined, beside its heatmap.
    """

    slide: LargeFile
    mpp: float
    heatmap: LargeFile
    model: str
    detections: DetectionConfig
    patch_threshold: float
    thumbnail_px: int
    folder: Output

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The slide's picture, which is written last."""
        return (Path(self.folder) / "slides" / f"{self.slide_id}.jpg",)

    def run(self) -> dict:
        """Look at the heatmap.

        Returns
        -------
        dict
            ``score``: highest probability, None without tissue; numbers of ``patches``,
            ``detections`` and ``regions``; ``area_mm2`` of the regions; ``working_mpp``.
        """
        heatmap = open_heatmap(self.heatmap.path)
        if heatmap.model != self.model:
            raise RunError(
                f"{self.heatmap.path}: made by {heatmap.model}, not by {self.model}. Run the"
                " heatmap stage again"
            )
        values, grid = heatmap.values(), heatmap.grid
        found = find_detections(values, grid, **self.detections.model_dump())
        write_detections(Path(self.folder) / "detections" / f"{self.slide_id}.csv", found)
        regions = heatmap_regions(values, grid, self.patch_threshold)
        with Slide(self.slide.path, self.mpp) as slide:
            thumbnail, _ = slide.thumbnail(self.thumbnail_px)
        picture = heatmap_figure(
            thumbnail,
            grid.bounds,
            [region.polygon for region in regions],
            [HeatmapPanel("heatmap", values, grid)],
            outlined=f"areas with probability >= {self.patch_threshold:g}",
        )
        write_whole(self.outputs[0], picture)
        known = values[np.isfinite(values)]
        return {
            "score": float(known.max()) if known.size else None,
            "patches": int(known.size),
            "detections": len(found),
            "regions": len(regions),
            "area_mm2": sum(region.area_mm2 for region in regions),
            "working_mpp": grid.working_mpp,
        }


def patch_threshold(config: Config, card: ModelCard) -> float:
    """The probability from which on a patch is called tumour: the card's, else the settings'."""
    chosen = card.thresholds.patch
    return config.evaluate.patch_threshold if chosen is None else chosen


def _unit(slide, config: Config, card: ModelCard, folder: Path) -> PredictSlide:
    name = config.train.name
    return PredictSlide(
        slide_id=slide.slide_id,
        slide=LargeFile.at(slide.path),
        mpp=float(slide.mpp),
        heatmap=LargeFile.at(heatmap_folder(config.out, name) / f"{slide.slide_id}.zarr"),
        model=model_id(name, card.weights_sha256),
        detections=config.evaluate.detections,
        patch_threshold=patch_threshold(config, card),
        thumbnail_px=config.evaluate.thumbnail_px,
        folder=Output(folder),
    )


def _table(
    config: Config, card: ModelCard, slides: pd.DataFrame, results: dict[str, dict]
) -> pd.DataFrame:
    """A row for each slide of the catalog, highest score first, those without a score last."""
    listed = pd.read_parquet(slides_path(config.out), columns=["slide_id", "path"])
    tissue = {
        key: of["result"].get("tissue_mm2") for key, of in read_done(config.out, "tile").items()
    }
    rows = [
        {
            "slide_id": row.slide_id,
            "path": row.path,
            "status": "ok" if row.slide_id in results else "failed",
            **_figures(results.get(row.slide_id), card, patch_threshold(config, card)),
            "tissue_mm2": tissue.get(row.slide_id),
        }
        for row in listed.itertuples(index=False)
    ]
    table = pd.DataFrame(rows)
    return table.sort_values(
        ["score", "slide_id"], ascending=[False, True], na_position="last", ignore_index=True
    )


def _figures(result: dict | None, card: ModelCard, threshold: float) -> dict:
    """Cells of a slide's row, from what its unit returned."""
    of = result or dict.fromkeys(("score", "patches", "detections", "regions", "area_mm2"))
    slide_threshold, score = card.thresholds.slide, of["score"]
    called = None if score is None or slide_threshold is None else score >= slide_threshold
    return {
        "score": score,
        "slide_threshold": slide_threshold,
        "called": {None: "", True: "tumour", False: "no tumour"}[called],
        "patches": of["patches"],
        "detections": of["detections"],
        "patch_threshold": threshold,
        "regions_above": of["regions"],
        "area_above_mm2": of["area_mm2"],
        "mpp": of.get("working_mpp"),
    }


def _write_page(config: Config, card: ModelCard, folder: Path, table: pd.DataFrame) -> None:
    name = config.train.name
    notes = notes_by_slide(config.out, name)
    seen = _seen(config, card)
    slides = [
        PredictedSlide(
            slide_id=row["slide_id"],
            called=row["called"],
            figures=row,
            notes=(*seen.get(row["slide_id"], ()), *notes.get(row["slide_id"], ())),
        )
        for row in table[table["status"] == "ok"].to_dict("records")
    ]
    write_prediction_page(
        folder / PREDICTIONS_PAGE,
        title=f"{name} on {config.out.name}",
        model=model_id(name, card.weights_sha256),
        card=asdict(card),
        patch_threshold=patch_threshold(config, card),
        slides=slides,
        failures=pd.DataFrame(failures_on_the_way(config.out, name)),
        notes=catalog_notes(config.out),
    )


def _seen(config: Config, card: ModelCard) -> dict[str, Sequence[str]]:
    """A note for each slide that the model was trained or validated on."""
    slides, training = read_slides(config.out), asdict(card)
    of_slide = slides["slide_id"].isin(seen_slides(training))
    seen = of_slide | of_patients(slides, seen_patients(training))
    note = "the model was trained or validated on this slide or on its patient"
    return dict.fromkeys(slides["slide_id"][seen], (note,))
