"""The evaluate stage: patch metrics, slide accuracy, FROC and the report."""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from distributed import Client

from wsi_pipeline.config import Config
from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.froc import (
    froc_curve,
    froc_metrics,
    lecture_hits,
    lesion_scores,
)
from wsi_pipeline.evaluation.patch_level import patch_metrics
from wsi_pipeline.evaluation.report import SlidePanel, write_report
from wsi_pipeline.evaluation.slide_level import accuracy_curve, slide_metrics, slide_scores
from wsi_pipeline.files import replace_atomically
from wsi_pipeline.heatmaps.render import heatmap_figure
from wsi_pipeline.heatmaps.store import open_heatmap
from wsi_pipeline.jobs.record import file_fingerprint, read_failures
from wsi_pipeline.jobs.run import Outcome, Unit, run_units
from wsi_pipeline.patches.index import read_index
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages import catalog
from wsi_pipeline.stages.run_directory import (
    evaluation_folder,
    heatmap_folder,
    index_path,
    model_id,
    of_model,
    read_model_card,
    tiled_slides,
)
from wsi_pipeline.stages.status import notes_by_slide

SCHEMA_VERSION = 1
SPLITS = ("validation", "test")
LIBRARIES = ("wsi_pipeline", "torch", "torchvision", "openslide-python", "zarr", "scikit-learn")


def run(config: Config, client: Client) -> Outcome:
    """Write ``RUN/evaluation/NAME/``: the report and its tables.

    Slides of unknown label are predicted but not evaluated.

    Raises
    ------
    RunError
        If no slide of the test split has a heatmap.
    """
    folder = evaluation_folder(config.out, config.train.name)
    (folder / "slides").mkdir(parents=True, exist_ok=True)
    card = read_model_card(config.out, config.train.name)
    slides = tiled_slides(config.out, [s for s in SPLITS if s in config.heatmap.splits])
    _refuse_leakage(slides[slides["split"] == "test"], card)
    outcome = run_units(
        client,
        [_unit(slide, config, card, folder) for slide in slides.itertuples(index=False)],
        run_dir=config.out,
        stage=of_model("evaluate", config.train.name),
        schema_version=SCHEMA_VERSION,
        retries=config.jobs.retries,
        window=config.jobs.window,
    )
    slides = slides[slides["slide_id"].isin(outcome.results)]
    if not (slides["split"] == "test").any():
        raise RunError(
            f"{config.out}: no slide of the test split could be evaluated: run the heatmap stage,"
            f" and see {config.out / 'failures.csv'}"
        )
    lesions = {slide_id: result["lesions"] for slide_id, result in outcome.results.items()}
    _report(config, folder, slides.reset_index(drop=True), lesions, card)
    return outcome


def _refuse_leakage(test: pd.DataFrame, card: dict):
    patients = card["training"].get("patients", {})
    known = {patient for split in patients.values() for patient in split}
    if shared := sorted(known & set(test["patient_id"])):
        raise RunError(
            f"patients {shared[:5]} of the test split were trained or validated on: the splits have"
            " changed since, so train again"
        )


def score_slide(
    slide_id: str, path: str, mpp: float, annotation: str | None, annotation_rules: dict,
    index: str, heatmap: str, model: str, scores: str, picture: str, thumbnail_px: int,
) -> dict:  # fmt: skip
    """Look up each patch's probability and draw the slide's picture: the work of a unit.

    Writes Parquet with the index's columns and ``score`` (float32, NaN where the patch could not
    be read), and a JPEG: the slide with its annotation beside its heatmap.

    Returns
    -------
    dict
        ``lesions``: their number.
    """
    patches, probabilities = read_index(index), open_heatmap(heatmap)
    if probabilities.grid != patches.grid or probabilities.model != model:
        raise RunError(
            f"{heatmap}: made by model {probabilities.model} from other patches or another model"
            f" than today's ({model}): run the heatmap stage again"
        )
    score = probabilities.at(patches.table["x"].to_numpy(), patches.table["y"].to_numpy())
    with replace_atomically(scores) as part:
        pq.write_table(patches.table.append_column("score", pa.array(score)), part)
    with Slide(path, mpp) as slide:
        thumbnail, _ = slide.thumbnail(thumbnail_px)
        lesions = catalog.slide_annotation(slide, annotation, **annotation_rules).lesions
    grid = patches.grid
    jpeg = heatmap_figure(thumbnail, grid.bounds, lesions, probabilities.values(), grid)
    with replace_atomically(picture) as part:
        part.write_bytes(jpeg)
    return {"lesions": len(lesions)}


def _unit(slide, config: Config, card: dict, folder: Path) -> Unit:
    index = index_path(config.out, slide.slide_id)
    heatmap = heatmap_folder(config.out, config.train.name) / f"{slide.slide_id}.zarr"
    settings = {
        "annotation_rules": config.catalog.annotation.model_dump(),
        "thumbnail_px": config.evaluate.thumbnail_px,
        "model": model_id(config.train.name, card["weights_sha256"]),
    }
    inputs = {
        **settings,
        "slide_file": file_fingerprint(slide.path),
        "annotation_file": slide.annotation and file_fingerprint(slide.annotation, content=True),
        "index": file_fingerprint(index, content=True),
        "heatmap": file_fingerprint(heatmap),  # a finished store is renamed, never written to
    }
    arguments = {
        **settings,
        "slide_id": slide.slide_id,
        "path": slide.path,
        "mpp": slide.mpp,
        "annotation": slide.annotation,
        "index": str(index),
        "heatmap": str(heatmap),
        "scores": str(_scores_path(folder, slide.slide_id)),
        "picture": str(_picture_path(folder, slide.slide_id)),
    }
    output = _picture_path(folder, slide.slide_id)
    return Unit(slide.slide_id, slide.slide_id, inputs, score_slide, arguments, output)


def _scores_path(folder: Path, slide_id: str) -> Path:
    return folder / "slides" / f"{slide_id}.parquet"


def _picture_path(folder: Path, slide_id: str) -> Path:
    return folder / "slides" / f"{slide_id}.jpg"


def _report(
    config: Config, folder: Path, slides: pd.DataFrame, lesions: dict[str, int], card: dict
):
    """Put the slides' scores together and write the report."""
    settings = config.evaluate
    patches = _patches(folder, slides)
    slides = slides.assign(
        score=slide_scores(slides["slide_id"].tolist(), patches[["slide_id", "score"]]).to_numpy()
    )
    by_split = {split: slides[slides["split"] == split] for split in SPLITS}
    test = by_split["test"]
    patches = patches[patches["slide_id"].isin(test["slide_id"])]
    patches["slide_id"] = patches["slide_id"].cat.remove_unused_categories()
    found = lesion_scores(
        patches, {slide_id: range(1, lesions[slide_id] + 1) for slide_id in test["slide_id"]}
    )
    froc = froc_curve(lecture_hits(patches, found, test.set_index("slide_id")["label"]))
    metrics = {
        "patch": patch_metrics(patches["label"], patches["score"], settings.patch_threshold),
        "slide": slide_metrics(
            *(by_split[split][["slide_id", "label", "score"]] for split in SPLITS),
            settings.patch_threshold,
        ),
        "froc": {"lecture": froc_metrics(froc, len(test), settings.false_positives)},
    }
    write_report(
        folder,
        title=f"{config.train.name} on {config.out.name}",
        run={
            "seed": config.seed,
            "model": config.train.name,
            "versions": {name: version(name) for name in LIBRARIES},
            "training": card["training"],
            "settings": config.model_dump(mode="json"),
        },
        metrics=metrics,
        patches=patches,
        slide_curves={
            split: accuracy_curve(of_split["label"], of_split["score"])
            for split, of_split in by_split.items()
        },
        froc=froc,
        lesions=found,
        slides=_panels(config.out, config.train.name, slides, metrics["slide"]["threshold"]),
        failures=pd.DataFrame(read_failures(config.out)),
    )


def _patches(folder: Path, slides: pd.DataFrame) -> pd.DataFrame:
    """``slide_id, label, lesions, score`` of every patch of the slides."""
    tables = [
        pq.read_table(_scores_path(folder, slide_id), columns=["label", "lesions", "score"])
        for slide_id in slides["slide_id"]
    ]
    patches = pa.concat_tables(tables).to_pandas()
    number = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
    patches["slide_id"] = pd.Categorical.from_codes(number, slides["slide_id"].tolist())
    return patches


def _panels(run_dir: Path, model: str, slides: pd.DataFrame, threshold: float) -> list[SlidePanel]:
    notes, folder = notes_by_slide(run_dir, model), evaluation_folder(run_dir, model)
    return [
        SlidePanel(
            slide_id=slide.slide_id,
            patient_id=slide.patient_id,
            split=slide.split,
            label=int(slide.label),
            score=slide.score,
            called=None if np.isnan(slide.score) else bool(slide.score >= threshold),
            picture=_picture_path(folder, slide.slide_id).read_bytes(),
            notes=tuple(notes.get(slide.slide_id, ())),
        )
        for slide in slides.itertuples(index=False)
    ]
