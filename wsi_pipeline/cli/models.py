"""Verbs on a trained model and its heatmaps: apply it, and export what it found."""

from pathlib import Path

import click

from wsi_pipeline.cli.main import main, scheduler_option
from wsi_pipeline.command import run_stages

PREDICTING = ("tile", "heatmap", "predictions")


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
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
@click.option("--export", "formats", metavar="A,B", help="Formats to export, see `wsi export`.")
@click.option("--workers", type=click.IntRange(1), help="Local processes. Default: one per core.")
@scheduler_option
def predict(model, slides, out, stride_px, mpp, precision, formats, workers, scheduler):
    """Apply a trained model to new slides: heatmaps, detections, a table and a page.

    MODEL is a model folder. SLIDES are slide files, a folder, or a table (.csv).
    """
    from wsi_pipeline.models.card import read_card
    from wsi_pipeline.stages import new_slides

    card = read_card(model)
    name = card.name or model.absolute().name
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
    run_stages(config, PREDICTING, prepare=lambda: new_slides.begin(config, model, slides))
