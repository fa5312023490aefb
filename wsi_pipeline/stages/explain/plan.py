"""What the explain stage is going to do; what it cannot do is refused here, before any work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from wsi_pipeline.config import Config
from wsi_pipeline.errors import ConfigError, ModelError, RunError
from wsi_pipeline.explain.explained_model import find_layer
from wsi_pipeline.jobs.unit import Unit
from wsi_pipeline.models.architectures import build_network
from wsi_pipeline.models.card import OURS, ModelCard, read_card
from wsi_pipeline.models.checkpoint import load_model
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages.explain.checks import rank_units, trust_units
from wsi_pipeline.stages.explain.maps_and_panels import MapPlace, map_units
from wsi_pipeline.stages.explain.methods import choose_methods, unfit_by_name, unfit_by_trial
from wsi_pipeline.stages.explain.places import (
    Place,
    annotated_patches,
    asked_place,
    evaluated_places,
    slide_of,
)
from wsi_pipeline.stages.run_directory import model_folder, read_slides


@dataclass(frozen=True, eq=False)
class CheckPlan:
    """How methods are to be checked.

    Parameters
    ----------
    drawn : int
        Annotated test patches that are drawn.
    units : dict
        Those of the stages ``rank`` and ``trust``.
    """

    drawn: int
    units: Mapping[str, Sequence[Unit]]


@dataclass(frozen=True, eq=False)
class Plan:
    """What a run of the explain stage does.

    Parameters
    ----------
    card : ModelCard
    methods : tuple of str
        Names, all of which the model can have.
    unfit : mapping
        Why the model cannot have other methods, by name.
    slides : DataFrame
        The catalog's readable slides, by slide id.
    evaluated : list of Place
        What the evaluation says is worth a look; empty where a place is asked for and there is no
        evaluation.
    asked : Place or None
        The place asked for, in place of these.
    maps : list of MapPlace
        A method's map of a place each.
    checks : CheckPlan or None
        None where a place is asked for.
    narrowed : bool
        Whether it is less, or other, than what the settings ask for.
    """

    card: ModelCard
    methods: tuple[str, ...]
    unfit: Mapping[str, str]
    slides: pd.DataFrame
    evaluated: list[Place]
    asked: Place | None
    maps: list[MapPlace]
    checks: CheckPlan | None
    narrowed: bool

    @property
    def places(self) -> list[Place]:
        """The places to explain."""
        return [self.asked] if self.asked else self.evaluated


def plan_explanations(
    config: Config,
    *,
    slide: str | None = None,
    at: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    methods: Sequence[str] | None = None,
    top: int | None = None,
) -> Plan:
    """Plan a run of the explain stage: it reads, and writes nothing.

    Without a place: the places that the evaluation says are worth a look (`evaluated_places`), the
    ranking of the methods and the trust checks on annotated test patches. With a place: that one
    alone.

    Parameters
    ----------
    config : Config
    slide : str, optional
        Slide id of a place.
    at : (int, int), optional
        Its upper left corner, level-0 px.
    size : (int, int), optional
        Its width and height, working px; one patch unless given. A larger region is cut into
        adjacent patches, each explained by itself, whose maps are put side by side.
    methods : sequence of str, optional
        In place of ``explain.methods``.
    top : int, optional
        In place of ``explain.top``.

    Raises
    ------
    ConfigError
        If a method is unknown, the place is incomplete, smaller than a patch or off the slide.
    ModelError
        If the model is missing or damaged, lacks the layer, or cannot have a method.
    RunError
        If the slide is not in the catalog; without a place, if there is no evaluation, or it is
        older than the catalog and names a slide that is not there any more.
    SlideError
        If the slide asked for cannot be opened.
    """
    _refuse_half_a_place(slide, at, size)
    card, names, unfit = _model_and_methods(config, methods)
    slides = read_slides(config.out).set_index("slide_id", drop=False)
    asked = None if slide is None else _asked(config, slide, at, size)
    evaluated = _evaluated(config, top or config.explain.top, needed=asked is None)
    places = [asked] if asked else evaluated
    return Plan(
        card=card,
        methods=names,
        unfit=unfit,
        slides=slides,
        evaluated=evaluated,
        asked=asked,
        maps=map_units(places, names, slides, config, card),
        checks=None if asked else plan_checks(config, names, slides, card),
        narrowed=bool(asked or methods or top),
    )


def plan_checks(
    config: Config, methods: Sequence[str], slides: pd.DataFrame, card: ModelCard
) -> CheckPlan:
    """Draw the patches that methods are checked on.

    Raises
    ------
    RunError
        If there is no evaluation, or it names a slide that is not in the catalog.
    """
    settings = config.explain
    patches = annotated_patches(config.out, config.train.name, settings.patches, config.seed)
    units: dict[str, Sequence[Unit]] = {
        "rank": rank_units(patches, methods, slides, config, card),
        "trust": trust_units(patches[: settings.trust_patches], methods, slides, config, card),
    }
    return CheckPlan(len(patches), units)


def _refuse_half_a_place(slide: str | None, at: tuple | None, size: tuple | None) -> None:
    if (slide is None) != (at is None):
        given, lacking = ("at", "slide") if slide is None else ("slide", "at")
        raise ConfigError(f"--{given} is given without --{lacking}: a place needs both")
    if size is not None and at is None:
        raise ConfigError("--size is given without --slide and --at: it is the size of a place")


def _model_and_methods(
    config: Config, methods: Sequence[str] | None
) -> tuple[ModelCard, tuple[str, ...], dict[str, str]]:
    folder = model_folder(config.out, config.train.name)
    card = read_card(folder)
    try:
        module, unfit = _look_at(folder, card)
        names = choose_methods(methods or config.explain.methods, card.architecture, unfit)
        if config.explain.layer is not None:
            find_layer(module, config.explain.layer)
    except ModelError as error:
        raise ModelError(f"{folder / 'model.json'}: {error}") from error
    return card, names, unfit


def _look_at(folder: Path, card: ModelCard) -> tuple[nn.Module, dict[str, str]]:
    """A model's layers, and why it cannot have some methods; networks not of ours are tried."""
    if card.architecture in OURS:
        with torch.device("meta"):  # its names alone
            return build_network(card.architecture, card.arguments), unfit_by_name(
                card.architecture
            )
    module, _ = load_model(folder)
    return module, unfit_by_trial(module, card.patch_px)


def _asked(config: Config, slide_id: str, at, size) -> Place:
    row = slide_of(config.out, slide_id)
    with Slide(row.path, row.mpp) as slide:
        return asked_place(slide, slide_id, at, size, config.tile)


def _evaluated(config: Config, top: int, needed: bool) -> list[Place]:
    """The evaluation's places; none where there is no evaluation and none is needed."""
    try:
        return evaluated_places(config.out, config.train.name, top)
    except RunError:
        if needed:
            raise
        return []
