"""The tile stage: tissue mask, patch grid and inner-square labels of each slide."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from distributed import Client

from wsi_pipeline.config import AnnotationConfig, Config, TileConfig
from wsi_pipeline.files import write_whole
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.jobs.record import read_done, read_failures
from wsi_pipeline.jobs.run import Outcome, run_units
from wsi_pipeline.jobs.unit import LargeFile, Output, SmallFile, Unit
from wsi_pipeline.patches.index import SCHEMA_VERSION as INDEX_VERSION
from wsi_pipeline.patches.index import build_index, uncovered_lesions, write_index
from wsi_pipeline.report.slide_pictures import tissue_figure
from wsi_pipeline.report.tissue_page import TiledSlide, write_tissue_page
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.tissue import GivenMasks, tissue_mask
from wsi_pipeline.stages import catalog
from wsi_pipeline.stages.run_directory import (
    TISSUE_PAGE,
    index_path,
    read_slides,
    tissue_folder,
)


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
    _write_page(config, slides, tiled)
    return opened + tiled


@dataclass(frozen=True)
class TileSlide(Unit):
    """Index the patches of one slide and draw its tissue mask."""

    slide: LargeFile
    mpp: float
    annotation: SmallFile | None
    label: int
    annotation_rules: AnnotationConfig
    tissue: SmallFile | None
    exclude: SmallFile | None
    tissue_values: tuple[int, ...] | None
    exclude_values: tuple[int, ...] | None
    settings: TileConfig
    out: Output
    picture: Output

    def run(self) -> dict:
        """Write the index and the picture.

        Returns
        -------
        dict
            Numbers of ``patches``, ``positive`` patches and ``lesions``; ``backend`` and
            ``backend_reason``: what reads the working level, see `Slide.backend`; ``notes``:
            lesions that no indexed patch reaches, since the tissue mask misses them, and what to
            check of the mask; and ``failures``: why parts of the slide, of which nothing is
            indexed, cannot be decoded.
        """
        tile = self.settings
        with Slide(self.slide.path, self.mpp) as slide:
            downsample = slide.downsample(tile.level, tile.mpp)
            sizes = tile.patch_px, tile.stride_px, tile.inner_px
            grid = PatchGrid(slide.bounds, slide.mpp, downsample, *sizes)
            lesions = catalog.slide_annotation(
                slide, self.annotation, self.annotation_rules
            ).lesions
            mask = tissue_mask(slide, **tile.tissue.model_dump(), given=self._given())
            backend = slide.backend(slide.level_for(grid.downsample)[0])
        index = build_index(self.slide_id, grid, mask, lesions, self.label, tile.min_tissue)
        write_whole(self.picture, tissue_figure(mask, lesions, grid.mpp))
        write_index(index, self.out)
        return {
            "patches": index.table.num_rows,
            "positive": int((index.table["label"].to_numpy() == 1).sum()),
            "lesions": len(lesions),
            "backend": backend.name,
            "backend_reason": backend.reason,
            "notes": [
                *mask.notes,
                *(
                    f"lesion {lesion} has no tissue in the mask: no patch can find it"
                    for lesion in uncovered_lesions(index, lesions)
                ),
            ],
            "failures": [f"taken for no tissue: {reason}" for reason in mask.unread],
        }

    def _given(self) -> GivenMasks:
        """The slide's masks that were made elsewhere."""
        return GivenMasks(
            tissue=self.tissue and self.tissue.path,
            exclude=self.exclude and self.exclude.path,
            tissue_values=self.tissue_values,
            exclude_values=self.exclude_values,
            origin=self.annotation_rules.origin,
        )


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
        slide=LargeFile.at(slide.path),
        mpp=float(slide.mpp),
        annotation=slide.annotation and SmallFile.at(slide.annotation),
        label=int(slide.label),
        annotation_rules=config.catalog.annotation,
        tissue=slide.tissue and SmallFile.at(slide.tissue),
        exclude=slide.exclude and SmallFile.at(slide.exclude),
        tissue_values=config.catalog.tissue_values if slide.tissue else None,
        exclude_values=config.catalog.exclude_values if slide.exclude else None,
        settings=config.tile,
        out=Output(index_path(config.out, slide.slide_id)),
        picture=Output(_picture(config, slide.slide_id)),
    )


def _picture(config: Config, slide_id: str) -> Path:
    return tissue_folder(config.out) / f"{slide_id}.jpg"


def _write_page(config: Config, slides: pd.DataFrame, tiled: Outcome):
    """Show what was taken for tissue in the slides that are tiled, and what failed."""
    found = []
    for slide_id in slides["slide_id"]:
        if result := tiled.results.get(slide_id):
            lost = ("parts of it cannot be decoded",) if result.get("failures") else ()
            notes = (*lost, *result["notes"])
            counts = result["patches"], result["positive"]
            drawn = _picture(config, slide_id).is_file()
            found.append(TiledSlide(slide_id, *counts, notes, drawn))
    failures = [row for row in read_failures(config.out) if row.stage in ("catalog", "tile")]
    write_tissue_page(
        tissue_folder(config.out) / TISSUE_PAGE,
        title=f"Tissue of {config.out.name}",
        slides=found,
        failures=pd.DataFrame(failures),
    )
