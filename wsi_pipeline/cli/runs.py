"""Verbs on a run: one for each stage, all of them in turn, and what a run's files tell."""

import sys
from importlib import resources
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from wsi_pipeline.cli.main import (
    Point,
    Size,
    config_option,
    load_settings,
    main,
    out_option,
    scheduler_option,
)
from wsi_pipeline.command import FAILED, alone_in, console, finish, run_stages
from wsi_pipeline.config import CatalogConfig, Config
from wsi_pipeline.config_file import commented_yaml, load_config
from wsi_pipeline.errors import RunError

STAGES = ("check", "tile", "cache", "train", "heatmap", "evaluate")
"""Of `wsi run`; the cache is one where train.cache is set."""


def _stage_verb(name: str, stages: tuple[str, ...], text: str):
    @main.command(name, help=text)
    @config_option
    @out_option
    @scheduler_option
    def verb(path, out, scheduler):
        run_stages(load_settings(path, out, scheduler), stages)


@main.command()
@config_option
@out_option
@scheduler_option
def run(path, out, scheduler):
    """All stages: check, tile, cache where train.cache is set, train, heatmap, evaluate."""
    config = load_settings(path, out, scheduler)
    run_stages(config, _stages(config))


_stage_verb(
    "check", ("check",), "Look at all slides and settings first: what is wrong, and what to do."
)
_stage_verb("tile", ("tile",), "Catalog the slides and index their patches with labels.")
_stage_verb("cache", ("cache",), "Keep the patches that training draws in Zarr: optional.")
_stage_verb("train", ("train",), "Train the patch classifier.")
_stage_verb("heatmap", ("heatmap",), "Predict every indexed patch: one OME-Zarr a slide.")
_stage_verb(
    "fine",
    ("fine",),
    "PatchNet's fine heatmap: everywhere or where the coarse one is suspicious.",
)
_stage_verb("evaluate", ("evaluate",), "Patch metrics, slide accuracy, FROC, and the report.")


@main.command()
def init():
    """Print a complete, commented configuration: wsi init > my.yaml."""
    config = Config(out="runs/my", catalog=CatalogConfig(csv="slides.csv"))
    click.echo(commented_yaml(config), nl=False)


@main.command()
@config_option
@out_option
@click.option("--slide", metavar="ID", help="A slide, with --at; else places of the evaluation.")
@click.option("--at", type=Point(), help="Upper left corner of a place in it, level-0 px.")
@click.option("--size", type=Size(), help="Its size, working px; one patch unless given.")
@click.option("--methods", metavar="A,B", help="Names, in place of explain.methods.")
@click.option("--top", type=click.IntRange(1), help="Places of each kind, in place of explain.top.")
@scheduler_option
def explain(path, out, scheduler, methods, slide, at, size, top):
    """Why: explanations of mistakes, hits or any place, in slide coordinates."""
    from wsi_pipeline.stages.explain import plan_explanations

    config = load_settings(path, out, scheduler)
    names = None if methods is None else [name.strip() for name in methods.split(",")]
    asked = {"slide": slide, "at": at, "size": size, "methods": names, "top": top}
    run_stages(config, ("explain",), plan=lambda: {"explain": plan_explanations(config, **asked)})


@main.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--slides", default=20, show_default=True, help="Number of slides.")
@click.option("--seed", default=0, show_default=True)
@click.option("--size", type=Size(), default=(4096, 4096), help="Level-0 px. [default: 4096x4096]")
@click.option("--mpp", default=0.5, show_default=True, help="um per level-0 px.")
@click.option(
    "--textures",
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    help="Piece the slides together from real tiles: a folder with one folder for each class.",
)
@click.option("--normal", default="H", show_default=True, help="Folder of normal tiles.")
@click.option("--lesion", default="AC", show_default=True, help="Folder of tumour tiles.")
@click.option(
    "--naevi", default=0, show_default=True, help="Benign look-alikes of tumour in each slide."
)
@scheduler_option
def phantom(scheduler, out, **settings):
    """Write a cohort of synthetic slides with known lesions."""
    from wsi_pipeline.jobs.cluster import connect
    from wsi_pipeline.stages import phantom as stage

    with connect(scheduler) as client:
        outcome = stage.run(out.absolute(), client, **settings)
    finish([("phantom", outcome)], out)


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/demo"),
    show_default=True,
    help="The run directory.",
)
@scheduler_option
def demo(out, scheduler):
    """A phantom cohort through all stages, in minutes on two cores."""
    from wsi_pipeline.jobs.cluster import connect
    from wsi_pipeline.stages import phantom as stage

    cohort = out.absolute() / "phantom"
    settings = Path(str(resources.files("wsi_pipeline.configs") / "demo.yaml"))
    config = load_settings(settings, out, scheduler, catalog={"csv": cohort / "slides.csv"})
    with connect(config.jobs.scheduler, workers=config.jobs.workers) as client:
        outcome = stage.run(cohort, client, **DEMO_COHORT, seed=config.seed)
    if outcome.failed:
        finish([("phantom", outcome)], cohort)
    run_stages(config, _stages(config))


DEMO_COHORT: dict[str, Any] = {"slides": 26, "size": (3072, 3072), "mpp": 0.5}


@main.command()
@config_option
@out_option
def mine(path, out):
    """Hard negatives: what the model took for tumour in validation slides."""
    from wsi_pipeline.stages import mine as stage

    config = load_settings(path, out, None)
    with alone_in(config.out):
        mined, table = stage.run(config)
    console.print(
        f"hard negatives: {len(table)}, of slides: {table['slide_id'].nunique()}, in {mined}:"
        " set train.hard_negatives to this file, and train.name to another name",
        soft_wrap=True,
    )


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
def status(run_dir):
    """What of a run is done, what failed, what is left."""
    from wsi_pipeline.jobs.record import read_failures
    from wsi_pipeline.stages.run_directory import catalog_notes
    from wsi_pipeline.stages.status import (
        heatmap_reading,
        notes_by_slide,
        precision_summary,
        stage_status,
    )

    if not (run_dir / "config.yaml").is_file():
        raise RunError(f"{run_dir}: it has no config.yaml, so it is no run directory")
    table = Table("stage", "done", "failed", "left", title=str(run_dir))
    for row in stage_status(run_dir):
        left = "?" if row.left is None else str(row.left)
        table.add_row(row.stage, str(row.done), str(row.failed), left)
    out = Console()
    out.print(table)
    out.print("Slides, annotations or settings changed since? Only running a stage finds that out.")
    model = load_config(run_dir / "config.yaml").train.name
    if reading := heatmap_reading(run_dir, model):
        out.print(f"heatmap: {reading}", markup=False, soft_wrap=True)
    for stage, comparison in (("heatmap", "precision"), ("fine", "fine_precision")):
        if text := precision_summary(run_dir, model, comparison):
            out.print(f"{stage}: {text}", markup=False, soft_wrap=True)
    for note in catalog_notes(run_dir):
        out.print(f"note: {note}", markup=False, soft_wrap=True)
    for slide_id, notes in notes_by_slide(run_dir, model).items():
        for note in notes:
            out.print(f"note: {slide_id}: {note}", markup=False)
    failures = read_failures(run_dir)
    for of in failures:
        out.print(f"failed: {of.stage} {of.unit}: {of.error}: {of.reason}", markup=False)
    sys.exit(FAILED if failures else 0)


def _stages(config: Config) -> tuple[str, ...]:
    return tuple(name for name in STAGES if name != "cache" or config.train.cache)
