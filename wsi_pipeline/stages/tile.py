"""The tile stage: tissue mask, patch grid and inner-square labels of each slide."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from distributed import Client

from wsi_pipeline.config import Config
from wsi_pipeline.files import write_whole
from wsi_pipeline.geometry import level0_area_to_mm2
from wsi_pipeline.jobs.record import read_done, read_failures
from wsi_pipeline.jobs.run import Outcome, run_units
from wsi_pipeline.jobs.unit import Output, Unit
from wsi_pipeline.patches.index import SCHEMA_VERSION as INDEX_VERSION
from wsi_pipeline.patches.index import build_index, uncovered_lesions, write_index
from wsi_pipeline.report.slide_pictures import tissue_figure
from wsi_pipeline.report.tissue_page import TiledSlide, write_tissue_page
from wsi_pipeline.stages import catalog
from wsi_pipeline.stages.run_directory import (
    TISSUE_PAGE,
    catalog_notes,
    index_path,
    read_slides,
    tissue_folder,
)
from wsi_pipeline.stages.tile_inputs import TileInputs


def run(config: Config, client: Client) -> Outcome:
    """Write ``RUN/slides.parquet`` and, for each slide, ``RUN/patches/SLIDE.parquet``.

    ``RUN/tissue/SLIDE.jpg`` shows what was taken for tissue, and a page there all of them.

    Raises
    ------
    CatalogError
        If the list of slides contradicts itself.
    """
    opened = catalog.run(config, client)
    slides = read_slides(config.out)
    for folder in (config.out / "patches", tissue_folder(config.out)):
        folder.mkdir(exist_ok=True)
    tiled = run_units(
        client,
        (_unit(slide, config) for slide in slides.itertuples(index=False)),
        total=len(slides),
        run_dir=config.out,
        stage="tile",
        schema_version=INDEX_VERSION,
        retries=config.jobs.retries,
        window=config.jobs.window,
    )
    _write_page(config, slides, opened, tiled)
    return opened + tiled


@dataclass(frozen=True)
class TileSlide(Unit):
    """Index the patches of one slide and draw its tissue mask."""

    inputs: TileInputs
    label: int
    out: Output
    picture: Output

    def run(self) -> dict:
        """Write the index and the picture.

        Returns
        -------
        dict
            Numbers of ``patches``, ``positive`` patches and ``lesions``; ``tissue_mm2``, the area
            of the tissue; ``backend`` and ``backend_reason``: what reads the working level, see
            `Slide.backend`; ``notes``: lesions that no indexed patch reaches, since the tissue mask
            misses them, and what to check of the mask; and ``failures``: why parts of the slide, of
            which nothing is indexed, cannot be decoded.
        """
        seen = self.inputs.look()
        lesions, tissue = seen.annotation.lesions, seen.tissue
        least = self.inputs.settings.min_tissue
        index = build_index(self.slide_id, seen.grid, tissue, lesions, self.label, least)
        write_whole(self.picture, tissue_figure(tissue, lesions, seen.grid.mpp))
        write_index(index, self.out)
        return {
            "patches": index.table.num_rows,
            "positive": int((index.table["label"].to_numpy() == 1).sum()),
            "lesions": len(lesions),
            "tissue_mm2": level0_area_to_mm2(tissue.area_level0, seen.grid.mpp),
            "backend": seen.backend.name,
            "backend_reason": seen.backend.reason,
            "notes": [
                *seen.misplaced,
                *tissue.notes,
                *(
                    f"lesion {lesion} {why}: no patch can find it"
                    for lesion, why in uncovered_lesions(index, lesions, tissue).items()
                ),
            ],
            "failures": [f"taken for no tissue: {reason}" for reason in tissue.unread],
        }


def stale_slides(config: Config, slides: pd.DataFrame) -> list[str]:
    """Slides whose patches were made of another annotation, or by other settings, than today's.

    Patch indices that no tile stage of this run made are taken as they are.
    """
    done = read_done(config.out, "tile")
    units = (_unit(slide, config) for slide in slides.itertuples(index=False))
    return [
        unit.slide_id
        for unit in units
        if unit.key in done and done[unit.key]["hash"] != unit.hash(INDEX_VERSION)
    ]


def _unit(slide, config: Config) -> TileSlide:
    return TileSlide(
        slide_id=slide.slide_id,
        inputs=TileInputs.of_slide(slide, config),
        label=int(slide.label),
        out=Output(index_path(config.out, slide.slide_id)),
        picture=Output(_picture(config, slide.slide_id)),
    )


def _picture(config: Config, slide_id: str) -> Path:
    return tissue_folder(config.out) / f"{slide_id}.jpg"


def _write_page(config: Config, slides: pd.DataFrame, opened: Outcome, tiled: Outcome):
    """Show what was taken for tissue in the slides that are tiled, and what failed."""
    found = []
    for slide_id in slides["slide_id"]:
        if result := tiled.results.get(slide_id):
            lost = ("parts of it cannot be decoded",) if result.get("failures") else ()
            notes = (*lost, *opened.results[slide_id]["notes"], *result["notes"])
            counts = result["patches"], result["positive"]
            drawn = _picture(config, slide_id).is_file()
            found.append(TiledSlide(slide_id, *counts, notes, drawn))
    failures = [row for row in read_failures(config.out) if row.stage in ("catalog", "tile")]
    write_tissue_page(
        tissue_folder(config.out) / TISSUE_PAGE,
        title=f"Tissue of {config.out.name}",
        slides=found,
        failures=pd.DataFrame(failures),
        notes=catalog_notes(config.out),
    )
