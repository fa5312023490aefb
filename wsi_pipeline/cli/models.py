"""Verbs on a trained model and its heatmaps: apply it, and export what it found."""

import json
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wsi_pipeline.cli.main import load_settings, main, scheduler_option
from wsi_pipeline.command import console, run_stages
from wsi_pipeline.config import Config
from wsi_pipeline.errors import RunError

PREDICTING = ("tile", "heatmap", "predictions")


class Names(click.ParamType):
    """Names, as a,b,c."""

    name = "A,B"

    def convert(self, value, param, ctx):
        """A list of names without blanks."""
        if isinstance(value, list):
            return value
        return [name.strip() for name in value.split(",") if name.strip()]


@main.command()
@click.argument("folder", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("slides", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the results. Default: predictions/NAME, after the model.",
)
@click.option("--stride-px", type=click.IntRange(1), help="Step between patches, working px.")
@click.option(
    "--mpp",
    type=click.FloatRange(0, min_open=True),
    help="um per level-0 px of slides that do not state their own.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    help="Default: bfloat16 if all workers support it, else float32.",
)
@click.option("--export", "formats", type=Names(), help="Formats to export, see `wsi export`.")
@click.option("--workers", type=click.IntRange(1), help="Local processes. Default: one per core.")
@scheduler_option
def predict(folder, slides, out, stride_px, mpp, precision, formats, workers, scheduler):
    """Apply a trained model to new slides: heatmaps, detections, a table and a page.

    MODEL is a model folder. SLIDES are slide files, a folder, or a table (.csv).
    """
    from wsi_pipeline.models.card import read_card
    from wsi_pipeline.models.model_folder import find_model
    from wsi_pipeline.stages import new_slides
    from wsi_pipeline.stages.export import plan_export
    from wsi_pipeline.stages.precision import refuse_precision

    card = read_card(find_model(folder))
    refuse_precision(card, precision)
    name = card.name or folder.absolute().name
    config = new_slides.settings_for(
        card,
        name,
        slides,
        (out or Path("predictions") / name).absolute(),
        stride_px=stride_px,
        mpp=mpp,
        precision=precision,
        jobs={"scheduler": scheduler, "workers": workers},
    )

    def plan():
        plans = {"export": plan_export(config, formats)} if formats else {}
        new_slides.begin(config, folder, slides)
        return plans

    run_stages(config, (*PREDICTING, "export") if formats else PREDICTING, plan)


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--format", "formats", type=Names(), required=True, help="Formats, as a,b.")
@click.option("--slide", "slide_ids", metavar="ID", multiple=True, help="A slide; else all.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the exports. Default: RUN/export/MODEL.",
)
@click.option("--model", "name", help="Name of the model, where the run has several.")
@click.option(
    "--threshold",
    "thresholds",
    type=click.FloatRange(0, 1),
    multiple=True,
    help="Regions are outlined where the probability is >= this. Default: export.thresholds.",
)
@scheduler_option
def export(run_dir, formats, slide_ids, out, name, thresholds, scheduler):
    """Export heatmaps, regions and detections for other viewers.

    RUN_DIR is the folder of `wsi run` or `wsi predict`. docs/export.md says which viewer takes
    which format.
    """
    from wsi_pipeline.stages.export import plan_export

    config = _settings_of(run_dir, scheduler)
    if name is not None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"name": name})})
    if thresholds:
        asked = config.export.model_copy(update={"thresholds": thresholds})
        config = config.model_copy(update={"export": asked})
    folder = out and out.absolute()
    run_stages(
        config,
        ("export",),
        lambda: {"export": plan_export(config, formats, slide_ids, folder)},
        keep_settings=True,
    )


def _settings_of(run_dir: Path, scheduler: str | None) -> Config:
    """The settings of a run, wherever its folder is now."""
    settings = run_dir / "config.yaml"
    if not settings.is_file():
        raise RunError(f"{run_dir} has no config.yaml, so it is not a run directory")
    return load_settings(settings, run_dir.absolute(), scheduler)


@main.group()
def model():
    """A trained model as a thing of its own: show, copy, import, export."""


@model.command("show")
@click.argument("folder", metavar="MODEL", type=click.Path(path_type=Path))
def show_model(folder):
    """The card: what the model is, its input, training, validation and thresholds."""
    from wsi_pipeline.models.describe import describe_model

    screen = Console()
    for title, rows in describe_model(folder):
        table = Table("", "", title=title, title_justify="left", show_header=False)
        table.columns[0].no_wrap = True
        table.columns[1].overflow = "fold"
        for label, text in rows:
            table.add_row(escape(label), escape(text))
        screen.print(table)


@model.command("copy")
@click.argument("source", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def copy(source, folder):
    """Copy a model's card and weights, and nothing else of its run."""
    from wsi_pipeline.models.checkpoint import copy_model
    from wsi_pipeline.models.model_folder import find_model

    copy_model(find_model(source), folder)
    console.print(f"model: {folder}", markup=False, soft_wrap=True)


class Colour(click.ParamType):
    """Three numbers, for red, green and blue, as 0.5,0.5,0.5."""

    name = "R,G,B"

    def convert(self, value, param, ctx):
        """A tuple of three floats."""
        if isinstance(value, tuple):
            return value
        try:
            red, green, blue = map(float, value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not three numbers, as 0.5,0.5,0.5", param, ctx)
        return red, green, blue


class Arguments(click.ParamType):
    """Keyword arguments as a JSON object."""

    name = "JSON"

    def convert(self, value, param, ctx):
        """A dictionary."""
        if isinstance(value, dict):
            return value
        try:
            found = json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is not JSON: {error}", param, ctx)
        if not isinstance(found, dict):
            self.fail(f'{value!r} is not a JSON object, as {{"width": 8}}', param, ctx)
        return found


@model.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--mpp",
    type=click.FloatRange(0, min_open=True),
    required=True,
    help="um per px of the patches that the network was trained on.",
)
@click.option("--patch-px", type=click.IntRange(1), help="Side of its patches, px.")
@click.option(
    "--architecture",
    metavar="NAME",
    help="Of .safetensors weights: timm:NAME, module:function, vgg16, ...",
)
@click.option(
    "--arguments",
    type=Arguments(),
    metavar="JSON",
    help="Arguments of its class or function, as '{\"width\": 8}'.",
)
@click.option("--mean", type=Colour(), help="Mean of the normalised input. Default: ImageNet's.")
@click.option("--std", type=Colour(), help="Standard deviation. Default: ImageNet's.")
@click.option(
    "--output",
    type=click.Choice(["logit", "probability"]),
    default="logit",
    show_default=True,
    help="What the network returns.",
)
@click.option("--tumour-class", type=click.IntRange(0), help="Column of an output (N, C).")
@click.option("--name", default="", help="What the model is called. Default: its folder's name.")
def import_file(file, folder, **about):
    """Make a model folder of a .pt2, .onnx or .safetensors file of another program.

    The network is tried on random patches first.
    """
    from wsi_pipeline.models.convert import import_model

    import_model(file, folder, **about)
    console.print(f"model: {folder}", markup=False, soft_wrap=True)


@model.command("export")
@click.argument("source", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(["pt2", "onnx"]), required=True)
def export_file(source, folder, kind):
    """Write a model as a .pt2 or ONNX archive, in a model folder of its own."""
    from wsi_pipeline.models.convert import export_model
    from wsi_pipeline.models.model_folder import find_model

    export_model(find_model(source), folder, kind)
    console.print(f"model: {folder}", markup=False, soft_wrap=True)
