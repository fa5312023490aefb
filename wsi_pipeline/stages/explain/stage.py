"""The run of the explain stage: what is done, in which order, and the page."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from distributed import Client

from wsi_pipeline.config import Config
from wsi_pipeline.errors import RunError
from wsi_pipeline.jobs.cluster import GPU, has_resource
from wsi_pipeline.jobs.record import Record, read_done, read_failures
from wsi_pipeline.jobs.run import Outcome, run_units
from wsi_pipeline.jobs.unit import Unit
from wsi_pipeline.report.evaluation_page import show_explanations
from wsi_pipeline.report.explanations_page import (
    ExplainedPlace,
    MethodChecks,
    read_summary,
    write_explanations,
)
from wsi_pipeline.stages.explain.checks import ranking_table, trust_tables
from wsi_pipeline.stages.explain.maps_and_panels import (
    SCHEMA_VERSION,
    made_with,
    panel_units,
    subject_hash,
)
from wsi_pipeline.stages.explain.methods import ALL_METHODS, choose_methods
from wsi_pipeline.stages.explain.places import KINDS, Place
from wsi_pipeline.stages.explain.plan import CheckPlan, Plan, plan_checks, plan_explanations
from wsi_pipeline.stages.run_directory import (
    EXPLAIN_STAGES,
    evaluation_folder,
    explanation_folder,
    explanations_link,
    model_id,
    of_model,
)

PLACE_COLUMNS = (
    "place", "kind", "slide_id", "lesion_id", "x", "y", "width_px", "height_px", "x_um", "y_um",
    "probability", "evaluated", "methods",
)  # fmt: skip


def run(config: Config, client: Client, plan: Plan | None = None) -> Outcome:
    """Write ``RUN/explanations/NAME/``: maps, pictures, the page, the ranking, the trust checks.

    Where a place is asked for, the page keeps all others that are still true of today's model,
    slides and annotations, and gets the checks that are on record.

    Parameters
    ----------
    config : Config
    client : distributed.Client
    plan : Plan, optional
        What to do; unless given, all that the settings ask for.

    Raises
    ------
    ConfigError, ModelError, RunError
        Without a plan, as `plan_explanations`.
    """
    plan = plan or plan_explanations(config)
    outcome = _run_units(config, client, "explain", plan.maps, plan.narrowed, gpu=True)
    panels = panel_units(plan.places, plan.maps, outcome.results, plan.slides, config, plan.card)
    outcome += _run_units(config, client, "panels", panels, plan.narrowed)
    if plan.checks is not None:
        checks, checked = _check_methods(config, client, plan.checks, plan.narrowed)
        outcome += checked
        _remove_others(config, plan.evaluated)
    else:
        checks = _checks_on_record(config, plan)
    _write_page(config, plan, checks)
    return outcome


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
    config: Config, client: Client, plan: CheckPlan, narrowed: bool
) -> tuple[MethodChecks, Outcome]:
    """Rank the methods and try whether they can be trusted."""
    done = {
        stage: _run_units(config, client, stage, of_stage, narrowed, gpu=True)
        for stage, of_stage in plan.units.items()
    }
    results = {stage: outcome.results for stage, outcome in done.items()}
    return _tables(plan.drawn, results), done["rank"] + done["trust"]


def _checks_on_record(config: Config, plan: Plan) -> MethodChecks:
    """What is known of all methods, with nothing run; nothing where no evaluation can be used."""
    methods = choose_methods(None, plan.card.architecture, plan.unfit)
    try:
        checks = plan_checks(config, methods, plan.slides, plan.card)
    except RunError:
        return _tables(0, {"rank": {}, "trust": {}})
    results = {}
    for stage, of_stage in checks.units.items():
        record = Record(config.out, of_model(stage, config.train.name))
        done = [unit.key for unit in of_stage if record.is_done(unit, SCHEMA_VERSION)]
        results[stage] = {key: record.result(key) for key in done}
    return _tables(checks.drawn, results)


def _tables(drawn: int, results: Mapping[str, Mapping[str, dict]]) -> MethodChecks:
    trust, layers = trust_tables(results["trust"])
    return MethodChecks(ranking_table(results["rank"]), drawn, trust, layers)


def _pictures_on_record(config: Config) -> dict[str, dict]:
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
    for name, result in _pictures_on_record(config).items():
        if result["place"]["kind"] != "asked" and name not in kept:
            shutil.rmtree(explanation_folder(config.out, config.train.name) / name)


def _write_page(config: Config, plan: Plan, checks: MethodChecks) -> None:
    name, folder = config.train.name, explanation_folder(config.out, config.train.name)
    shown = _shown(config, plan)
    checked = {*checks.ranking["method"], *checks.trust["method"]}
    drawn = {method for result in shown.values() for method in result["methods"]}
    used = {*plan.methods, *drawn, *checked}
    model = model_id(name, plan.card.weights_sha256)
    settings = {
        "model": f"{plan.card.architecture}, {model}",
        "ranking and trust": made_with(checked, config),
    }
    report = evaluation_folder(config.out, name) / "report.html"
    stages = {of_model(stage, name) for stage in EXPLAIN_STAGES}
    failures = [row for row in read_failures(config.out) if row.stage in stages]
    write_explanations(
        folder,
        title=f"Explanations: {name} on {config.out.name}",
        model=model,
        report=f"../../evaluation/{name}/report.html" if report.is_file() else None,
        run={name: words for name, words in settings.items() if words},
        places=[_on_page(folder, place, result) for place, result in shown.items()],
        table=_places_table(shown),
        words={
            name: {"name": method.title, "legend": method.legend}
            for name, method in ALL_METHODS.items()
            if name in used
        },
        checks=checks,
        failures=pd.DataFrame(failures),
    )
    show_explanations(
        report,
        model=model,
        explanations=explanations_link(name),
        explained=read_summary(folder, model),
    )


def _shown(config: Config, plan: Plan) -> dict[str, dict]:
    """Pictures for the page, by place, in its order: those of today's model, slide, annotation.

    The evaluation's come in its order, before those of its kind from an earlier run with more.
    """
    slides = plan.slides.itertuples()
    today = {slide.slide_id: subject_hash(slide, config, plan.card) for slide in slides}
    rank = {place.name: number for number, place in enumerate(plan.evaluated)}
    kinds = list(KINDS)
    found = {
        name: result
        for name, result in _pictures_on_record(config).items()
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
