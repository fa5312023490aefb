"""The export stage: heatmaps, regions and detections in the formats of other people's viewers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from distributed import Client

from wsi_pipeline.config import Config, DetectionConfig, ExportConfig
from wsi_pipeline.errors import ConfigError, RunError
from wsi_pipeline.export.asap import write_asap_annotations, write_asap_heatmap
from wsi_pipeline.export.dicom import (
    read_slide_header,
    write_annotations,
    write_parametric_map,
    write_segmentation,
)
from wsi_pipeline.export.geojson import write_geojson
from wsi_pipeline.export.ome_tiff import write_ome_tiff
from wsi_pipeline.export.picture import (
    picture_frame,
    read_picture,
    write_bare_overlay,
    write_overlay,
)
from wsi_pipeline.export.qupath import write_qupath_script
from wsi_pipeline.export.table import write_patches
from wsi_pipeline.geometry import level0_to_um
from wsi_pipeline.heatmaps.detect import find_detections
from wsi_pipeline.heatmaps.regions import Region, heatmap_regions
from wsi_pipeline.heatmaps.store import Heatmap, open_heatmap
from wsi_pipeline.jobs.run import Outcome, run_units
from wsi_pipeline.jobs.unit import LargeFile, Unit
from wsi_pipeline.models.card import read_card
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages.predictions import patch_threshold
from wsi_pipeline.stages.run_directory import (
    export_folder,
    heatmap_folder,
    model_folder,
    model_id,
    of_model,
    read_slides,
)

SCHEMA_VERSION = 1
PICTURE_PX = 2000
"""Longer side of a picture, unless its resolution is set."""
FILES = {
    "geojson": ("{}.geojson",),
    "ome-tiff": ("{}.ome.tif",),
    "asap": ("{}_likelihood_map.tif", "{}_prediction.xml"),
    "dicom": ("{}/heatmap.dcm", "{}/regions.dcm"),
    "png": ("{}.png", "{}_overlay.png"),
    "csv": ("{}.csv",),
    "parquet": ("{}.parquet",),
}
"""Files of each format, by slide id; DICOM's detections.dcm is there if there are detections."""


@dataclass(frozen=True)
class ExportPlan:
    """What is exported, and where to.

    Parameters
    ----------
    formats : tuple of str
        Keys of `FILES`.
    slide_ids : tuple of str
        Empty: all slides that have a heatmap.
    folder : Path
        Of a folder for each format.
    """

    formats: tuple[str, ...]
    slide_ids: tuple[str, ...]
    folder: Path


def plan_export(
    config: Config,
    formats: Sequence[str],
    slide_ids: Sequence[str] = (),
    folder: Path | None = None,
) -> ExportPlan:
    """Check what is asked for, before any worker is there.

    Raises
    ------
    ConfigError
        If a format is unknown.
    RunError
        If the folder holds anything but exports.
    """
    for name in formats:
        if name not in FILES:
            raise ConfigError(f"format {name!r} is not one of {', '.join(FILES)}")
    if not formats:
        raise ConfigError(f"no format is given. There are {', '.join(FILES)}")
    folder = folder or export_folder(config.out, config.train.name)
    strange = [path.name for path in sorted(folder.glob("*")) if path.name not in FILES]
    if strange:
        raise RunError(
            f"{folder} holds {', '.join(strange[:3])}, which is not an export. Give --out another"
            " folder"
        )
    return ExportPlan(tuple(dict.fromkeys(formats)), tuple(slide_ids), folder)


def run(config: Config, client: Client, plan: ExportPlan) -> Outcome:
    """Write ``RUN/export/NAME/FORMAT/``, or a folder of the plan.

    Raises
    ------
    RunError
        If no slide has a heatmap of the model, or a slide that is named has none.
    ModelError
        If the model's card is missing or damaged.
    """
    name = config.train.name
    card = read_card(model_folder(config.out, name))
    slides = _with_heatmap(config, plan.slide_ids)
    thresholds = config.export.thresholds or (patch_threshold(config, card),)
    units = [
        ExportSlide(
            slide_id=slide.slide_id,
            format=of_format,
            slide=LargeFile.at(slide.path),
            mpp=float(slide.mpp),
            size=(int(slide.width), int(slide.height)),
            heatmap=LargeFile.at(heatmap_folder(config.out, name) / f"{slide.slide_id}.zarr"),
            model=model_id(name, card.weights_sha256),
            settings=config.export,
            thresholds=tuple(sorted(thresholds)),
            detection=config.evaluate.detections,
            folder=plan.folder / of_format,
        )
        for of_format in plan.formats
        for slide in slides.itertuples(index=False)
    ]
    for of_format in plan.formats:
        (plan.folder / of_format).mkdir(parents=True, exist_ok=True)
    if "ome-tiff" in plan.formats:
        write_qupath_script(plan.folder / "ome-tiff")
    return run_units(
        client,
        units,
        run_dir=config.out,
        stage=of_model("export", name),
        schema_version=SCHEMA_VERSION,
        retries=config.jobs.retries,
        window=config.jobs.window,
    )


def _with_heatmap(config: Config, slide_ids: Sequence[str]) -> pd.DataFrame:
    """Rows of the catalog's slides that have a heatmap of the model; of those named, if any are."""
    name, slides = config.train.name, read_slides(config.out)
    folder = heatmap_folder(config.out, name)
    slides = slides[[(folder / f"{of}.zarr").is_dir() for of in slides["slide_id"]]]
    if slides.empty:
        raise RunError(f"{config.out}: no slide has a heatmap of {name}. Run `wsi heatmap` first")
    if missing := sorted(set(slide_ids) - set(slides["slide_id"])):
        raise RunError(f"{config.out}: slide {missing[0]} has no heatmap of {name}")
    return slides[slides["slide_id"].isin(slide_ids)] if slide_ids else slides


@dataclass(frozen=True)
class ExportSlide(Unit):
    """Write a slide's files of one format.

    Parameters
    ----------
    format : str
        A key of `FILES`.
    slide : LargeFile
    mpp : float
        Micrometres per level-0 px.
    size : (int, int)
        Width and height, level-0 px.
    heatmap : LargeFile
    model : str
        What the heatmap must call its model.
    settings : ExportConfig
    thresholds : tuple of float
        Regions are outlined at each.
    detection : DetectionConfig
    folder : Path
        Of the format. It counts: the record does not know which of two folders has which export.
    """

    format: str
    slide: LargeFile
    mpp: float
    size: tuple[int, int]
    heatmap: LargeFile
    model: str
    settings: ExportConfig
    thresholds: tuple[float, ...]
    detection: DetectionConfig
    folder: Path

    @property
    def key(self) -> str:
        """Format and slide."""
        return f"{self.format}/{self.slide_id}"

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The files."""
        return tuple(self.folder / name.format(self.slide_id) for name in FILES[self.format])

    def run(self) -> dict:
        """Write them.

        Returns
        -------
        dict
            Empty.
        """
        heatmap = open_heatmap(self.heatmap.path)
        if heatmap.model != self.model:
            raise RunError(
                f"{self.heatmap.path}: made by {heatmap.model}, not by {self.model}. Run the"
                " heatmap stage again"
            )
        self._write(_Findings(heatmap, self.thresholds, self.detection))
        return {}

    def _write(self, found: "_Findings") -> None:
        grid, paths = found.heatmap.grid, self.outputs
        about: dict[str, Any] = {"slide_id": self.slide_id, "model": self.model}
        match self.format:
            case "geojson":
                least = self.settings.min_tile_probability
                write_geojson(paths[0], **found.for_people, tiles_from=least, **about)
            case "ome-tiff":
                write_ome_tiff(paths[0], found.levels, grid=grid, **about)
            case "dicom":
                self._write_dicom(found)
            case "png":
                with Slide(self.slide.path, self.mpp) as slide:
                    frame = picture_frame(slide, self.settings.picture_mpp or _picture_mpp(slide))
                    image = read_picture(slide, frame)
                write_overlay(paths[0], image=image, frame=frame, **found.for_people, **about)
                write_bare_overlay(paths[1], frame=frame, values=found.values, grid=grid)
            case "csv" | "parquet":
                write_patches(paths[0], values=found.values, grid=grid, slide_id=self.slide_id)
            case "asap":
                write_asap_heatmap(paths[0], found.values, grid=grid, slide_size=self.size)
                write_asap_annotations(paths[1], regions=found.regions, detections=found.detections)

    def _write_dicom(self, found: "_Findings") -> None:
        grid, (heatmap, regions) = found.heatmap.grid, self.outputs
        heatmap.parent.mkdir(exist_ok=True)
        slide = read_slide_header(
            self.slide.path, slide_id=self.slide_id, slide_size=self.size, mpp=self.mpp
        )
        about: dict[str, Any] = {
            "slide": slide, "model": self.model, "created": found.heatmap.modified,
        }  # fmt: skip
        write_parametric_map(heatmap, values=found.values, grid=grid, **about)
        thresholds = self.thresholds
        write_segmentation(regions, values=found.values, grid=grid, thresholds=thresholds, **about)
        detections = regions.with_name("detections.dcm")
        write_annotations(detections, detections=found.detections, **about)


def _picture_mpp(slide: Slide) -> float:
    """A resolution at which the scanned part of a slide fills about a screen."""
    longest = max(slide.bounds.width, slide.bounds.height)
    return level0_to_um(max(1.0, longest / PICTURE_PX), slide.mpp)


@dataclass(frozen=True, eq=False)
class _Findings:
    """What a heatmap holds; each is worked out where a format asks for it."""

    heatmap: Heatmap
    thresholds: tuple[float, ...]
    detection: DetectionConfig

    @cached_property
    def levels(self) -> list[np.ndarray]:
        return [self.heatmap.values(level) for level in range(len(self.heatmap.levels))]

    @property
    def values(self) -> np.ndarray:
        return self.levels[0]

    @cached_property
    def regions(self) -> list[Region]:
        """Of every threshold, the lowest first."""
        grid = self.heatmap.grid
        return [
            region
            for threshold in self.thresholds
            for region in heatmap_regions(self.values, grid, threshold)
        ]

    @property
    def for_people(self) -> dict[str, Any]:
        """All that pictures and QuPath's file show, as keyword arguments."""
        return {
            "values": self.values,
            "grid": self.heatmap.grid,
            "regions": self.regions,
            "detections": self.detections,
        }

    @cached_property
    def detections(self) -> pd.DataFrame:
        return find_detections(self.values, self.heatmap.grid, **self.detection.model_dump())
