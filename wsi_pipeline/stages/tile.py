"""The tile stage: tissue mask, patch grid and inner-square labels of each slide."""

from pathlib import Path

import pandas as pd
from distributed import Client

from wsi_pipeline.config import Config
from wsi_pipeline.evaluation.tissue_page import TiledSlide, write_tissue_page
from wsi_pipeline.files import write_whole
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.heatmaps.render import tissue_figure
from wsi_pipeline.jobs.record import file_fingerprint, read_done, read_failures
from wsi_pipeline.jobs.run import Outcome, Unit, run_units
from wsi_pipeline.patches.index import SCHEMA_VERSION as INDEX_VERSION
from wsi_pipeline.patches.index import build_index, uncovered_lesions, write_index
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.tissue import tissue_mask
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


def tile_slide(
    slide_id: str, path: str, mpp: float, annotation: str | None, label: int, out: str,
    picture: str, annotation_rules: dict, tissue: dict, level: int | None, target_mpp: float | None,
    patch_px: int, stride_px: int, inner_px: int, min_tissue: float,
) -> dict:  # fmt: skip
    """Index the patches of one slide and draw its tissue mask: the work of a unit.

    Returns
    -------
    dict
        Numbers of ``patches``, ``positive`` patches and ``lesions``; ``backend`` and
        ``backend_reason``: what reads the working level, see `Slide.backend`; ``notes``: lesions
        that no indexed patch reaches, since the tissue mask misses them; and ``failures``: why
        parts of the slide, of which nothing is indexed, cannot be decoded.
    """
    Path(picture).unlink(missing_ok=True)  # of other inputs
    with Slide(path, mpp) as slide:
        grid = PatchGrid(
            slide.bounds,
            slide.mpp,
            slide.downsample(level, target_mpp),
            patch_px,
            stride_px,
            inner_px,
        )
        lesions = catalog.slide_annotation(slide, annotation, **annotation_rules).lesions
        mask = tissue_mask(slide, **tissue)
        backend = slide.backend(slide.level_for(grid.downsample)[0])
    index = build_index(slide_id, grid, mask, lesions, label, min_tissue)
    write_whole(picture, tissue_figure(mask, lesions, grid.mpp))
    write_index(index, out)
    return {
        "patches": index.table.num_rows,
        "positive": int((index.table["label"].to_numpy() == 1).sum()),
        "lesions": len(lesions),
        "backend": backend.name,
        "backend_reason": backend.reason,
        "notes": [
            f"lesion {lesion} has no tissue in the mask: no patch can find it"
            for lesion in uncovered_lesions(index, lesions)
        ],
        "failures": [f"taken for no tissue: {reason}" for reason in mask.unread],
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


def _unit(slide, config: Config) -> Unit:
    tile = config.tile
    arguments = {
        "path": slide.path,
        "mpp": slide.mpp,
        "annotation": slide.annotation,
        "label": int(slide.label),
        "annotation_rules": config.catalog.annotation.model_dump(),
        "tissue": tile.tissue.model_dump(),
        "level": tile.level,
        "target_mpp": tile.mpp,
        "patch_px": tile.patch_px,
        "stride_px": tile.stride_px,
        "inner_px": tile.inner_px,
        "min_tissue": tile.min_tissue,
    }
    inputs = {
        **arguments,
        "slide_file": file_fingerprint(slide.path),
        "annotation_file": slide.annotation and file_fingerprint(slide.annotation, content=True),
    }
    out = index_path(config.out, slide.slide_id)
    picture = _picture(config, slide.slide_id)
    arguments |= {"slide_id": slide.slide_id, "out": str(out), "picture": str(picture)}
    return Unit(slide.slide_id, slide.slide_id, inputs, tile_slide, arguments, output=out)


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
