"""The command line: one verb for each stage. A stage is imported only when its verb runs."""

import logging
import re
import sys
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from wsi_pipeline import __version__
from wsi_pipeline.command import FAILED, WRONG, alone_in, console, finish, run_stages
from wsi_pipeline.config import CatalogConfig, Config
from wsi_pipeline.config_file import commented_yaml, load_config
from wsi_pipeline.errors import RunError, WsiError

STAGES = ("check", "tile", "cache", "train", "heatmap", "evaluate")
"""Of `wsi run`; the cache is one where train.cache is set."""


class Verbs(click.Group):
    """Shows the user's errors without a traceback and leaves with status 2."""

    def invoke(self, ctx):
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except (WsiError, OSError) as error:  # OSError: the disk is full, the network gone
            message = f"{type(error).__name__}: {error}"
        console.print(message, style="red", markup=False, soft_wrap=True)
        return ctx.exit(WRONG)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="wsi")
def main():
    """Whole-slide pathology: from slides and annotations to heatmaps and a FROC report."""
    own = logging.getLogger("wsi_pipeline")
    own.addHandler(RichHandler(console=console, show_path=False, show_level=False, show_time=False))
    own.setLevel(logging.INFO)


scheduler_option = click.option(
    "--scheduler", metavar="tcp://HOST:PORT", help="A running Dask scheduler; else this machine."
)
out_option = click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="The run directory."
)
config_option = click.option(
    "-c",
    "--config",
    "path",
    required=True,
    type=click.Path(path_type=Path),
    help="Settings: a YAML file, see `wsi init`.",
)


def _stage_verb(name: str, stages: tuple[str, ...], text: str):
    @main.command(name, help=text)
    @config_option
    @out_option
    @scheduler_option
    def verb(path, out, scheduler):
        run_stages(_load(path, out, scheduler), stages)


@main.command()
@config_option
@out_option
@scheduler_option
def run(path, out, scheduler):
    """All stages: check, tile, cache where train.cache is set, train, heatmap, evaluate."""
    config = _load(path, out, scheduler)
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


class Size(click.ParamType):
    """Width and height in pixels, as 4096x4096."""

    name = "WxH"

    def convert(self, value, param, ctx):
        """Two positive numbers."""
        if isinstance(value, tuple):
            return value
        if not (found := re.fullmatch(r"(\d+)x(\d+)", value)):
            self.fail(f"{value!r} is no size: write it as 4096x4096", param, ctx)
        return int(found[1]), int(found[2])


class Point(click.ParamType):
    """A pixel, as 1024,-64."""

    name = "X,Y"

    def convert(self, value, param, ctx):
        """Two whole numbers."""
        if isinstance(value, tuple):
            return value
        if not (found := re.fullmatch(r"(-?\d+),(-?\d+)", value)):
            self.fail(f"{value!r} is no place: write it as 1024,2048", param, ctx)
        return int(found[1]), int(found[2])


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

    config = _load(path, out, scheduler)
    names = None if methods is None else [name.strip() for name in methods.split(",")]
    asked = {"slide": slide, "at": at, "size": size, "methods": names, "top": top}
    run_stages(config, ("explain",), plan=partial(plan_explanations, config, **asked))


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
    config = _load(settings, out, scheduler, catalog={"csv": cohort / "slides.csv"})
    with connect(config.jobs.scheduler, workers=config.jobs.workers) as client:
        outcome = stage.run(cohort, client, **DEMO_COHORT, seed=config.seed)
    if outcome.failed:
        finish([("phantom", outcome)], cohort)
    run_stages(config, _stages(config))


DEMO_COHORT: dict[str, Any] = {"slides": 26, "size": (3072, 3072), "mpp": 0.5}


folder_type = click.Path(path_type=Path, exists=True, file_okay=False)
file_type = click.Path(path_type=Path, exists=True, dir_okay=False)
results_option = click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder of the results; made when missing.",
)
seed_option = click.option("--seed", default=0, show_default=True, help="Of the bootstrap.")


@main.command()
@click.option("--detections", type=folder_type, required=True, help="Folder of SLIDE.csv files.")
@click.option("--annotations", type=folder_type, help="Folder of annotation files.")
@click.option("--masks", type=folder_type, help="Or: folder of the challenge's mask TIFFs.")
@click.option(
    "--slides",
    type=file_type,
    required=True,
    help="CSV: slide_id, width, height, mpp, label and optionally patient_id.",
)
@click.option(
    "--tumour",
    multiple=True,
    metavar="NAME",
    help="Group or class of the annotations that is tumour; CAMELYON's unless given.",
)
@click.option(
    "--mode",
    "modes",
    type=click.Choice(["official", "corrected"]),
    multiple=True,
    help="A definition of FROC; both unless given. The lecture's needs patches: `wsi evaluate`.",
)
@results_option
@seed_option
@scheduler_option
def froc(scheduler, modes, tumour, out, **settings):
    """FROC of anybody's detections against annotations or masks."""
    from wsi_pipeline.jobs.cluster import connect
    from wsi_pipeline.stages import froc as stage

    with alone_in(out), connect(scheduler) as client:
        if tumour:
            settings["tumour"] = tumour
        outcome = stage.run(out=out, client=client, modes=modes or stage.MODES, **settings)
    for slide_id, result in outcome.results.items():
        for note in result["notes"]:
            console.print(f"note: {slide_id}: {note}", markup=False, soft_wrap=True)
    if not outcome.failed:
        for mode, found in stage.scores(out).items():
            console.print(f"{mode}: {found}", markup=False)
    finish([("froc", outcome)], out)


@main.command("slide-scores")
@click.argument("csv", type=file_type)
@click.option("--slide", required=True, metavar="COL", help="Column of slide ids.")
@click.option("--label", required=True, metavar="COL", help="Column of labels.")
@click.option(
    "--score", "scores", required=True, multiple=True, metavar="COL", help="Column of scores."
)
@click.option("--split", metavar="COL", help="Column of splits.")
@click.option("--patient", metavar="COL", help="Column of patients.")
@results_option
@seed_option
def slide_scores(csv, out, scores, **columns):
    """Slide accuracy and ROC AUC from any table of slide scores."""
    import pandas as pd

    from wsi_pipeline.report.slide_scores import write_slide_scores

    write_slide_scores(csv, out, scores=scores, **columns)
    for row in pd.read_csv(out / "slide_scores.csv").to_dict("records"):
        figures = (
            f"{text} {row[name]:.4f} ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})"
            for text, name in (("ROC AUC", "roc_auc"), ("accuracy", "accuracy"))
        )
        found = (
            f"{row['score']}: {', '.join(figures)} at {row['threshold']:.3g}, slides: {row['n']}"
        )
        console.print(found.replace("nan to nan", "no interval"), markup=False, soft_wrap=True)
    console.print(f"all figures: {out}", markup=False, soft_wrap=True)


@main.command()
@click.argument("first", type=folder_type)
@click.argument("second", type=folder_type)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file of the figures."
)
@seed_option
def compare(first, second, out, seed):
    """Two evaluations of the same slides: what differs, and by more than chance."""
    from wsi_pipeline.files import write_json
    from wsi_pipeline.stages import compare as stage

    found = stage.run(first, second, seed=seed)
    table = Table("figure", "A", "B", "A - B", "95 % interval", "p")
    table.columns[0].no_wrap = True  # figures may wrap on a narrow screen, their names may not
    refused = {part: found[part]["refused"] for part in found if "refused" in found[part]}
    for part, figures in found.items():
        for name, row in figures.items() if part not in refused else ():
            table.add_row(stage.figure_name(part, name), *stage.cells(row))
    screen = Console()
    screen.print(f"A: {first}\nB: {second}", markup=False, soft_wrap=True)
    screen.print(table)
    for part, reason in refused.items():
        screen.print(f"{part} is not compared: {reason}", markup=False, soft_wrap=True)
    if out is not None:
        write_json(out, found)


@main.command()
@config_option
@out_option
def mine(path, out):
    """Hard negatives: what the model took for tumour in validation slides."""
    from wsi_pipeline.stages import mine as stage

    config = _load(path, out, None)
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


def _load(path: Path, out: Path | None, scheduler: str | None, **overrides) -> Config:
    if out is not None:
        overrides["out"] = out
    if scheduler is not None:
        overrides["jobs"] = {"scheduler": scheduler}
    return load_config(path, **overrides)


def _stages(config: Config) -> tuple[str, ...]:
    return tuple(name for name in STAGES if name != "cache" or config.train.cache)
