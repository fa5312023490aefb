"""The run of the explain stage: what is done, in which order, and the page."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from distributed import Client

from wsi_pipeline.config import Config
from wsi_pipeline.errors import ConfigError, RunError
from wsi_pipeline.evaluation.explanations import ExplainedPlace, MethodChecks, write_explanations
from wsi_pipeline.evaluation.report import show_explanations
from wsi_pipeline.explain.core import find_layer
from wsi_pipeline.jobs.cluster import GPU, has_resource
from wsi_pipeline.jobs.record import Record, read_done, read_failures
from wsi_pipeline.jobs.run import Outcome, Unit, run_units
from wsi_pipeline.models.checkpoint import ARCHITECTURES, ModelCard, read_card
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages.explain.checks import (
    rank_units,
    ranking_table,
    trust_tables,
    trust_units,
)
from wsi_pipeline.stages.explain.methods import WORDS, choose_methods
from wsi_pipeline.stages.explain.places import (
    KINDS,
    Place,
    annotated_patches,
    asked_place,
    evaluated_places,
    slide_of,
)
from wsi_pipeline.stages.explain.units import (
    SCHEMA_VERSION,
    made_with,
    map_units,
    panel_units,
    shown_of,
)
from wsi_pipeline.stages.run_directory import (
    EXPLAIN_STAGES,
    evaluation_folder,
    explanation_folder,
    model_folder,
    model_id,
    of_model,
    read_slides,
)

PLACE_COLUMNS = (
    "place", "kind", "slide_id", "lesion_id", "x", "y", "width_px", "height_px", "x_um", "y_um",
    "probability", "evaluated", "methods",
)  # fmt: skip


def run(
    config: Config,
    client: Client,
    *,
    slide: str | None = None,
    at: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    methods: Sequence[str] | None = None,
    top: int | None = None,
) -> Outcome:
    """Write ``RUN/explanations/NAME/``: maps, pictures, the page, the ranking, the trust checks.

    Without a place: the places that the evaluation says are worth a look (`evaluated_places`),
    then the ranking of the methods and the trust checks on annotated test patches. With a place:
    that one alone; the page keeps all others that are still true of today's model, slides and
    annotations, and gets the checks that are on record.

    Parameters
    ----------
    config : Config
    client : distributed.Client
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
    """
    card = read_card(model_folder(config.out, config.train.name))
    names = choose_methods(methods or config.explain.methods, card.architecture)
    _check_layer(card, config.explain.layer)
    slides = read_slides(config.out).set_index("slide_id", drop=False)
    evaluated = _evaluated(config, top or config.explain.top, needed=slide is None)
    asked = _asked(config, slide, at, size)
    places = [asked] if asked else evaluated
    narrowed = bool(asked or methods or top)
    maps = map_units(places, names, slides, config, card)
    outcome = _run_units(config, client, "explain", maps, narrowed, gpu=True)
    panels = panel_units(places, maps, outcome.results, slides, config, card)
    outcome += _run_units(config, client, "panels", panels, narrowed)
    if asked is None:
        checks, checked = _check_methods(config, client, names, slides, card, narrowed)
        outcome += checked
        _remove_others(config, evaluated)
    else:
        checks = _checks_on_record(config, slides, card)
    _write_page(config, card, slides, evaluated, names, checks)
    return outcome


def check_place(slide: str | None, at: tuple | None, size: tuple | None) -> None:
    """Refuse half a place, by a ConfigError: a slide needs a corner and a corner a slide."""
    if (slide is None) != (at is None):
        given, lacking = ("at", "slide") if slide is None else ("slide", "at")
        raise ConfigError(f"--{given} is given without --{lacking}: a place needs both")
    if size is not None and at is None:
        raise ConfigError("--size is given without --slide and --at: it is the size of a place")


def _check_layer(card: ModelCard, layer: str | None) -> None:
    if layer is not None:
        with torch.device("meta"):  # its names alone
            find_layer(ARCHITECTURES[card.architecture](**card.arguments), layer)


def _asked(config: Config, slide_id: str | None, at, size) -> Place | None:
    check_place(slide_id, at, size)
    if slide_id is None:
        return None
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


def _run_units(
    config: Config, client: Client, stage: str, units: Sequence[Unit], narrowed: bool,
    gpu: bool = False,
) -> Outcome:  # fmt: skip
    """Do units; `narrowed`: not all that the settings ask for, so other failures still count.

    Those of places asked for earlier always do: no run but one for that place has their units.
    """
    stage = of_model(stage, config.train.name)
    now = {unit.key for unit in units}
    earlier = {row.unit for row in read_failures(config.out) if row.stage == stage}
    return run_units(
        client,
        units,
        run_dir=config.out,
        stage=stage,
        keep={key for key in earlier - now if narrowed or key.startswith("asked-")},
        schema_version=SCHEMA_VERSION,
        retries=config.jobs.retries,
        window=config.jobs.window,
        resources={GPU: 1} if gpu and has_resource(client, GPU) else None,
    )


def _check_methods(
    config: Config, client: Client, methods: Sequence[str], slides: pd.DataFrame, card: ModelCard,
    narrowed: bool,
) -> tuple[MethodChecks, Outcome]:  # fmt: skip
    """Rank the methods and try whether they can be trusted."""
    patches, units = _check_units(config, methods, slides, card)
    done = {
        stage: _run_units(config, client, stage, of_stage, narrowed, gpu=True)
        for stage, of_stage in units.items()
    }
    results = {stage: outcome.results for stage, outcome in done.items()}
    return _tables(patches, results), done["rank"] + done["trust"]


def _checks_on_record(config: Config, slides: pd.DataFrame, card: ModelCard) -> MethodChecks:
    """What is known of all methods, with nothing run; nothing where no evaluation can be used."""
    methods = choose_methods(None, card.architecture)
    try:
        patches, units = _check_units(config, methods, slides, card)
    except RunError:
        return _tables(0, {"rank": {}, "trust": {}})
    results = {}
    for stage, of_stage in units.items():
        record = Record(config.out, of_model(stage, config.train.name))
        done = [unit.key for unit in of_stage if record.is_done(unit, SCHEMA_VERSION)]
        results[stage] = {key: record.result(key) for key in done}
    return _tables(patches, results)


def _check_units(
    config: Config, methods: Sequence[str], slides: pd.DataFrame, card: ModelCard
) -> tuple[int, dict[str, list[Unit]]]:
    """The number of patches that are drawn, and the units of the two checks on them."""
    settings = config.explain
    patches = annotated_patches(config.out, config.train.name, settings.patches, config.seed)
    return len(patches), {
        "rank": rank_units(patches, methods, slides, config, card),
        "trust": trust_units(patches[: settings.trust_patches], methods, slides, config, card),
    }


def _tables(patches: int, results: Mapping[str, Mapping[str, dict]]) -> MethodChecks:
    trust, layers = trust_tables(results["trust"])
    return MethodChecks(ranking_table(results["rank"]), patches, trust, layers)


def _drawn(config: Config) -> dict[str, dict]:
    """What is on record of each picture that is there, by place."""
    folder = explanation_folder(config.out, config.train.name)
    lines = read_done(config.out, of_model("panels", config.train.name))
    return {
        name: line["result"]
        for name, line in lines.items()
        if (folder / name / "panel.png").is_file()
    }


def _remove_others(config: Config, places: Sequence[Place]) -> None:
    """Remove places of an earlier evaluation, which are not among today's."""
    kept = {place.name for place in places}
    for name, result in _drawn(config).items():
        if result["place"]["kind"] != "asked" and name not in kept:
            shutil.rmtree(explanation_folder(config.out, config.train.name) / name)


def _write_page(
    config: Config, card: ModelCard, slides: pd.DataFrame, evaluated: Sequence[Place],
    methods: Sequence[str], checks: MethodChecks,
) -> None:  # fmt: skip
    name, folder = config.train.name, explanation_folder(config.out, config.train.name)
    shown = _shown(config, card, slides, [place.name for place in evaluated])
    checked = {*checks.ranking["method"], *checks.trust["method"]}
    drawn = {method for result in shown.values() for method in result["methods"]}
    used = {*methods, *drawn, *checked}
    settings = {
        "model": f"{card.architecture}, {model_id(name, card.weights_sha256)}",
        "ranking and trust": made_with(checked, config),
    }
    report = evaluation_folder(config.out, name) / "report.html"
    stages = {of_model(stage, name) for stage in EXPLAIN_STAGES}
    failures = [row for row in read_failures(config.out) if row.stage in stages]
    write_explanations(
        folder,
        title=f"Explanations: {name} on {config.out.name}",
        report=f"../../evaluation/{name}/report.html" if report.is_file() else None,
        run={name: words for name, words in settings.items() if words},
        places=[_on_page(folder, place, result) for place, result in shown.items()],
        table=_places_table(shown),
        words={
            method: {"name": words.name, "legend": words.legend}
            for method, words in WORDS.items()
            if method in used
        },
        checks=checks,
        failures=pd.DataFrame(failures),
    )
    show_explanations(report)


def _shown(
    config: Config, card: ModelCard, slides: pd.DataFrame, evaluated: Sequence[str]
) -> dict[str, dict]:
    """Pictures for the page, by place, in its order: those of today's model, slide, annotation.

    The evaluation's come in its order, before those of its kind from an earlier run with more.
    """
    today = {slide.slide_id: shown_of(slide, config, card) for slide in slides.itertuples()}
    rank = {name: place for place, name in enumerate(evaluated)}
    kinds = list(KINDS)
    found = {
        name: result
        for name, result in _drawn(config).items()
        if result["of"] == today.get(result["place"]["slide_id"])
    }
    order = sorted(
        found,
        key=lambda name: (
            kinds.index(found[name]["place"]["kind"]),
            rank.get(name, len(rank)),
            name,
        ),
    )
    return {name: found[name] for name in order}


def _on_page(folder: Path, name: str, result: dict) -> ExplainedPlace:
    return ExplainedPlace(
        name=name,
        group=KINDS[result["place"]["kind"]],
        title=result["title"],
        where=result["where"],
        made=result["made"],
        picture=(folder / name / "panel.png").read_bytes(),
    )


def _places_table(shown: dict[str, dict]) -> pd.DataFrame:
    rows = [
        result["place"] | result | {"place": name, "methods": " ".join(result["methods"])}
        for name, result in shown.items()
    ]
    table = pd.DataFrame(rows, columns=list(PLACE_COLUMNS)).astype({"lesion_id": "Int64"})
    return table.rename(columns={"x": "x_level0", "y": "y_level0"})
