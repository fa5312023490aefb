"""Verbs on results, ours or anybody's: FROC, slide accuracy, comparison."""

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from wsi_pipeline.cli.main import (
    file_type,
    folder_type,
    main,
    results_option,
    scheduler_option,
    seed_option,
)
from wsi_pipeline.command import alone_in, console, finish


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
