"""Units of the explain stage: a method's map of a place, and the picture of all of them."""

import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import shapely
import torch

from wsi_pipeline.config import AnnotationConfig, Config
from wsi_pipeline.files import write_whole
from wsi_pipeline.geometry import Bounds, PatchGrid, level0_to_um
from wsi_pipeline.heatmaps.ngff import Channel
from wsi_pipeline.heatmaps.store import open_heatmap, write_heatmap
from wsi_pipeline.jobs.unit import (
    LargeFile,
    Output,
    SmallFile,
    Unhashed,
    Unit,
    hash_inputs,
    state_of,
)
from wsi_pipeline.models.card import ModelCard
from wsi_pipeline.models.inference import normalise
from wsi_pipeline.report.explanation_panels import MethodPanel, colour_limits, panels_figure
from wsi_pipeline.seeds import derived_seed
from wsi_pipeline.slides.open_slides import cached_slide
from wsi_pipeline.stages.explain.methods import ALL_METHODS
from wsi_pipeline.stages.explain.places import Place, PlacedPixels, catalogued
from wsi_pipeline.stages.run_directory import explanation_folder, model_folder
from wsi_pipeline.stages.slide_annotation import slide_annotation
from wsi_pipeline.stages.worker_model import TrainedModel, held_model, worker_device

SCHEMA_VERSION = 2
"""Of the maps, pictures and checks, and of what is on record of them."""
CHUNK_PX = 256
"""Side of a chunk of a map's OME-Zarr."""
SURROUNDINGS = 4
"""Side of the picture around a place, in the place's."""
SURROUNDINGS_PX = 400
"""Longer side of what is read for it."""
PANEL_PX = 400
"""Longer side of what is read for a method's panel, at least: a panel has some 300 px."""
UNLIKE = 0.05
"""A probability that is this far from the evaluation's is told: another model, or another slide."""


def read_patches(
    path: str, mpp: float, place: PlacedPixels, card: ModelCard, device: torch.device
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The adjacent patches that a place is cut into, one by one, as the model takes them.

    Patches lie side by side from the upper left corner on; those of the last row and column may
    reach over the place's edge, and over the slide's, where reading gives white.

    Yields
    ------
    row, col : int
        The patch's upper left corner in the place, working px; row by row.
    patch : float32 tensor, shape (1, 3, patch_px, patch_px)
        Normalised.

    Raises
    ------
    SlideError
        If the slide cannot be opened or read.
    """
    side, slide, grid = place.patch_px, cached_slide(path, mpp), map_grid(place, mpp)
    for row in range(0, place.height_px, side):
        for col in range(0, place.width_px, side):
            x, y = grid.level0_points((col, row)).tolist()
            pixels = torch.from_numpy(slide.read(x, y, side, side, place.downsample))
            image = pixels.permute(2, 0, 1)[None].to(device)
            yield row, col, normalise(image, **card.normalisation)


def map_grid(place: PlacedPixels, mpp: float) -> PatchGrid:
    """The grid whose cells are the place's pixels: what lays a map over the slide."""
    return PatchGrid.of_pixels(
        place.x, place.y, place.width_px, place.height_px, mpp, place.downsample
    )


@dataclass(frozen=True)
class MapPlace(Unit):
    """Explain a place by one method and write its map.

    Patches are read and explained one by one; of the whole place there is the map alone, 4 bytes a
    pixel.
    """

    slide: LargeFile
    mpp: float
    place: PlacedPixels
    name: Unhashed[str]
    method: str
    settings: dict
    model: TrainedModel
    ngff: str
    out: Output

    @property
    def key(self) -> str:
        """Place and method."""
        return f"{self.name}/{self.method}"

    def run(self) -> dict:
        """Write the map.

        Returns
        -------
        dict
            ``probabilities`` (F(I) of each patch) and ``seconds`` (of the method, for each patch).
        """
        place, path = self.place, self.slide.path
        explain, grid = (
            ALL_METHODS[self.method].with_settings(**self.settings),
            map_grid(place, self.mpp),
        )
        values = np.full(grid.shape, np.nan, np.float32)
        probabilities, seconds = [], []
        with held_model(self.model) as (module, card):
            device = worker_device()
            for row, col, patch in read_patches(path, self.mpp, place, card, device):
                with torch.no_grad():
                    probabilities.append(torch.sigmoid(module(patch)).item())
                started = time.perf_counter()
                found = explain(module, patch)[0].cpu().numpy()
                seconds.append(time.perf_counter() - started)
                inside = values[row : place.height_px, col : place.width_px]
                inside = inside[: len(found), : len(found)]
                inside[:] = found[: inside.shape[0], : inside.shape[1]]
        of = ALL_METHODS[self.method]
        every = 2 ** panel_level(place)  # as many pixels as are drawn: a copy of all might not fit
        shown = colour_limits(values[::every, ::every], signed=of.signed)
        part = Path(self.out).with_name(f".{Path(self.out).name}")
        write_heatmap(
            part,
            values,
            grid=grid,
            slide_id=self.slide_id,
            model=self.model.id,
            precision="float32",
            chunk=CHUNK_PX,
            ngff=self.ngff,
            channel=Channel(f"{of.title}, {self.model.id}", *shown),
        )
        shutil.rmtree(self.out, ignore_errors=True)  # of a worker that died before it could say so
        part.rename(self.out)
        return {"probabilities": probabilities, "seconds": float(np.mean(seconds))}


@dataclass(frozen=True)
class DrawPanel(Unit):
    """Draw a place beside its maps, ``panel.png``.

    Image and maps are read at the level of the maps' pyramid that a panel needs: memory does not
    grow with the place.

    Parameters
    ----------
    maps : dict
        Hash of each method's map.
    of : str
        What the picture is true of, see `subject_hash`.
    made : str
        With what settings the maps were made, in words.
    """

    slide: LargeFile
    mpp: float
    place: Place
    maps: dict[str, str]
    probabilities: list[float]
    annotation: SmallFile | None
    annotation_rules: AnnotationConfig
    of: str
    made: str
    out: Output

    @property
    def key(self) -> str:
        """The place's name."""
        return self.place.name

    def run(self) -> dict:
        """Draw.

        Returns
        -------
        dict
            What the page says of the place: ``place``, ``title``, ``where``, ``probability`` (the
            highest of its patches), ``x_um``, ``y_um`` (of its upper left corner), ``methods``,
            ``made``, ``of``.
        """
        place, mpp, folder = self.place, self.mpp, Path(self.out).parent
        slide = cached_slide(self.slide.path, mpp)
        shown = map_grid(place, mpp).bounds
        level = panel_level(place)
        rows, cols = (-(-side_px // 2**level) for side_px in (place.height_px, place.width_px))
        image = slide.read(place.x, place.y, cols, rows, place.downsample * 2**level)
        around = _surroundings(shown)
        reduction = max(1.0, max(around.width, around.height) / SURROUNDINGS_PX)
        width, height = (max(1, round(side / reduction)) for side in (around.width, around.height))
        lesions = slide_annotation(slide, self.annotation, self.annotation_rules).lesions
        window = (level, slice(rows), slice(cols))
        panels = [
            _panel(name, open_heatmap(folder / f"{name}.zarr").values(*window))
            for name in self.maps
        ]
        title, where = _title(place, lesions), _where(place, mpp, self.probabilities)
        picture = panels_figure(
            image, shown, slide.read(around.x, around.y, width, height, reduction), around, lesions,
            panels,
            mpp=mpp, title=title, subtitle=where,
        )  # fmt: skip
        write_whole(self.out, picture)
        return {
            "place": asdict(place),
            "title": title,
            "where": where,
            "probability": max(self.probabilities),
            "x_um": level0_to_um(place.x, mpp),
            "y_um": level0_to_um(place.y, mpp),
            "methods": list(self.maps),
            "made": self.made,
            "of": self.of,
        }


def panel_level(place: PlacedPixels) -> int:
    """The level of a map's pyramid to draw: the coarsest with `PANEL_PX` or more, else level 0.

    The last row and column of pixels may reach over the place's edge, by less than a pixel.
    """
    return max(0, int(np.log2(max(place.width_px, place.height_px) / PANEL_PX)))


def map_units(
    places: Sequence[Place], methods: Sequence[str], slides: pd.DataFrame, config: Config,
    card: ModelCard,
) -> list[MapPlace]:  # fmt: skip
    """A unit for each place and method, all places by the first method first.

    `slides` are the catalog's rows, by slide id.
    """
    folder = explanation_folder(config.out, config.train.name)
    rows = {place.slide_id: catalogued(slides, place.slide_id) for place in places}
    return [
        MapPlace(
            slide_id=place.slide_id,
            slide=LargeFile.at(rows[place.slide_id].path),
            mpp=float(rows[place.slide_id].mpp),
            place=place.pixels,
            name=place.name,
            method=method,
            settings=method_settings(method, config),
            model=trained_model(config, card),
            ngff=config.heatmap.ngff,
            out=Output(folder / place.name / f"{method}.zarr"),
        )
        for method in methods
        for place in places
    ]


def panel_units(
    places: Sequence[Place], maps: Sequence[MapPlace], results: Mapping[str, dict],
    slides: pd.DataFrame, config: Config, card: ModelCard,
) -> list[DrawPanel]:  # fmt: skip
    """A unit for each place that has a map, with the methods that did not fail there."""
    units = []
    for place in places:
        of_place = [unit for unit in maps if unit.name == place.name and unit.key in results]
        if not of_place:
            continue
        slide = catalogued(slides, place.slide_id)
        folder = explanation_folder(config.out, config.train.name) / place.name
        units.append(
            DrawPanel(
                slide_id=place.slide_id,
                slide=LargeFile.at(slide.path),
                mpp=float(slide.mpp),
                place=place,
                maps={unit.method: unit.hash(SCHEMA_VERSION) for unit in of_place},
                probabilities=results[of_place[0].key]["probabilities"],
                annotation=slide.annotation and SmallFile.at(slide.annotation),
                annotation_rules=config.catalog.annotation,
                of=subject_hash(slide, config, card),
                made=made_with({unit.method for unit in of_place}, config),
                out=Output(folder / "panel.png"),
            )
        )
    return units


def made_with(methods: Collection[str], config: Config) -> str:
    """The settings that matter to the maps of some methods, in words; empty where none does."""
    words = []
    if any(ALL_METHODS[name].takes_layer for name in methods):
        words.append(f"layer: {config.explain.layer or 'the last convolution'}")
    if any(ALL_METHODS[name].takes_seed for name in methods):
        words.append(f"seed: {config.seed}")
    return ", ".join(words)


def subject_hash(slide, config: Config, card: ModelCard) -> str:
    """Hash of what a picture shows: the model, the slide, its annotation, and this code."""
    return hash_inputs(
        {
            "schema_version": SCHEMA_VERSION,
            "weights": card.weights_sha256,
            "slide": state_of(LargeFile.at(slide.path)),
            "annotation": slide.annotation and state_of(SmallFile.at(slide.annotation)),
            "annotation_rules": state_of(config.catalog.annotation),
        }
    )


def method_settings(method: str, config: Config) -> dict:
    """Seed and layer for a method; 0 and None where it ignores them: no map depends on those."""
    takes = ALL_METHODS[method]
    seed = derived_seed(config.seed, "explain") if takes.takes_seed else 0
    return {"seed": seed, "layer": config.explain.layer if takes.takes_layer else None}


def trained_model(config: Config, card: ModelCard) -> TrainedModel:
    """The model as an input of units."""
    name = config.train.name
    return TrainedModel(card.weights_sha256, name, str(model_folder(config.out, name)))


def _panel(method: str, values: np.ndarray) -> MethodPanel:
    of = ALL_METHODS[method]
    return MethodPanel(values, of.title, of.shows, of.unit, of.signed, of.coarse)


def _surroundings(shown: Bounds) -> Bounds:
    """The place's surroundings, level-0 px; white beyond the slide's edge."""
    width, height = SURROUNDINGS * shown.width, SURROUNDINGS * shown.height
    x, y = shown.x - (width - shown.width) // 2, shown.y - (height - shown.height) // 2
    return Bounds(x, y, width, height)


def _title(place: Place, lesions: Sequence) -> str:
    bounds = map_grid(place, 1.0).bounds
    shown = shapely.box(bounds.x, bounds.y, bounds.x + bounds.width, bounds.y + bounds.height)
    here = any(lesion.intersects(shown) for lesion in lesions)
    tumour = "tumour is annotated here" if here else "no tumour is annotated here"
    return {
        "false-positive": "False positive: "
        + ("off the annotated tumour that reaches into the place" if here else tumour),
        "missed": f"Missed: lesion {place.lesion_id}, annotated here, was not found",
        "lowest": f"Hardly found: lesion {place.lesion_id}, annotated here, has a low probability",
        "hit": f"Best hit: lesion {place.lesion_id}, annotated here, was found",
        "asked": f"Place asked for: {tumour}",
    }[place.kind]


def _where(place: Place, mpp: float, probabilities: Sequence[float]) -> str:
    spacing_um = map_grid(place, mpp).working_mpp
    x_um, y_um = level0_to_um(place.x, mpp), level0_to_um(place.y, mpp)
    size = f"{place.width_px * spacing_um:.0f} x {place.height_px * spacing_um:.0f} µm"
    if len(probabilities) == 1:
        found = f"probability of tumour F(I) = {probabilities[0]:.3f}"
        evaluated = place.evaluated
        if evaluated is not None and abs(evaluated - probabilities[0]) > UNLIKE:
            found += f" (in the evaluation {evaluated:.3f}: evaluate again)"
    else:
        low, high = min(probabilities), max(probabilities)
        found = f"F(I) = {low:.3f} to {high:.3f} in {len(probabilities)} patches side by side"
    return (
        f"slide {place.slide_id}, upper left corner at level-0 px {place.x},{place.y}"
        f" (x {x_um:.0f} µm, y {y_um:.0f} µm), {size}; {found}"
    )
