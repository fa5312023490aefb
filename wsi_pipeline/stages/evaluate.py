"""The evaluate stage: patch metrics, slide accuracy, FROC, each lesion, and the report."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from distributed import Client

from wsi_pipeline.config import AnnotationConfig, Config, DetectionConfig
from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.cohort_hits import (
    MODES,
    cohort_hits,
    cohort_lesions,
    false_positives,
    save_froc_hits,
    write_hits,
)
from wsi_pipeline.evaluation.detections import write_detections
from wsi_pipeline.evaluation.evaluation_mask import official_labels
from wsi_pipeline.evaluation.froc import (
    FrocCurve,
    FrocHits,
    froc_curve,
    froc_metrics,
    lecture_hits,
    lesion_scores,
)
from wsi_pipeline.evaluation.lesions import found_or_missed
from wsi_pipeline.evaluation.patch_level import patch_metrics
from wsi_pipeline.evaluation.patch_scores import read_scores, read_slide_scores, write_scores
from wsi_pipeline.evaluation.slide_level import accuracy_curve, slide_metrics
from wsi_pipeline.evaluation.uncertainty import froc_band, froc_intervals, intervals
from wsi_pipeline.evaluation.weighted_metrics import binary_statistic
from wsi_pipeline.files import write_whole
from wsi_pipeline.heatmaps.detect import find_detections
from wsi_pipeline.heatmaps.store import open_heatmap
from wsi_pipeline.jobs.run import Outcome, run_units
from wsi_pipeline.jobs.unit import LargeFile, Output, SmallFile, Unit
from wsi_pipeline.patches.index import read_index
from wsi_pipeline.report.evaluation_page import SlidePanel, write_report
from wsi_pipeline.report.explanations_page import read_summary
from wsi_pipeline.report.slide_pictures import HeatmapPanel, heatmap_figure
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages import tile
from wsi_pipeline.stages.card_evaluation import record_evaluation
from wsi_pipeline.stages.leakage import learned_patients, of_patients, refuse_leakage
from wsi_pipeline.stages.lesion_pictures import picture_units, read_pictures
from wsi_pipeline.stages.run_directory import (
    catalog_notes,
    evaluation_folder,
    explanation_folder,
    explanations_link,
    heatmap_folder,
    index_path,
    model_folder,
    model_id,
    of_model,
    read_model_card,
    tiled_slides,
)
from wsi_pipeline.stages.slide_annotation import slide_annotation
from wsi_pipeline.stages.status import (
    failures_on_the_way,
    notes_by_slide,
    precision_difference,
)

SCHEMA_VERSION = 2
SPLITS = ("validation", "test")
LIBRARIES = ("wsi_pipeline", "torch", "torchvision", "openslide-python", "zarr", "scikit-learn")


def run(config: Config, client: Client) -> Outcome:
    """Write ``RUN/evaluation/NAME/``: the report and its tables.

    Slides of unknown label are predicted but not evaluated. FROC on detections needs lesions to
    be drawn: tumour slides without annotation are left out of it.

    Raises
    ------
    RunError
        If no slide of the test split has a heatmap, patients of it were trained on, or patches
        were made of other annotations than today's.
    """
    folder = evaluation_folder(config.out, config.train.name)
    card = read_model_card(config.out, config.train.name)
    for part in ("slides", "detections", "hits", "froc", "gallery"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    slides = tiled_slides(config.out, [s for s in SPLITS if s in config.heatmap.splits])
    if stale := tile.stale_slides(config, slides):
        raise RunError(
            f"the patches of slides {', '.join(stale[:5])} ({len(stale)} in all) were made of other"
            " annotations or settings than today's: run the tile stage, and those after it, again"
        )
    test = slides[slides["split"] == "test"]
    _refuse_unlabelled(config, test)
    refuse_leakage(card, test=set(test["patient_id"]), test_slides=set(test["slide_id"]))
    slides = slides[~of_patients(slides, learned_patients(card))]
    official: dict[str, int] = {}
    for _, of_split in slides.groupby("split"):
        labels = of_split["label"].astype(int)
        official |= official_labels(dict(zip(of_split["slide_id"], labels, strict=True)))
    for name in ("report.html", "metrics.json"):  # none beside files of another evaluation
        (folder / name).unlink(missing_ok=True)
    common: dict[str, Any] = {
        "run_dir": config.out,
        "schema_version": SCHEMA_VERSION,
        "retries": config.jobs.retries,
        "window": config.jobs.window,
    }
    outcome = run_units(
        client,
        [
            _unit(slide, config, card, folder, official[slide.slide_id])
            for slide in slides.itertuples(index=False)
        ],
        stage=of_model("evaluate", config.train.name),
        **common,
    )
    slides = slides[slides["slide_id"].isin(outcome.results)].reset_index(drop=True)
    slides["lesions"] = [outcome.results[s]["lesions"] for s in slides["slide_id"]]
    test = slides[slides["split"] == "test"]
    if not (test["label"] >= 0).any():
        raise RunError(
            f"{config.out}: no labelled slide of the test split could be evaluated. See"
            f" {config.out / 'failures.csv'}"
        )
    precision = _precision(config, card, [outcome.results[s] for s in slides["slide_id"]])
    judged = _judge(config, folder, test)
    pictures = run_units(
        client,
        picture_units(
            test,
            judged.lesions.head(config.evaluate.gallery),
            judged.false_positives.head(config.evaluate.gallery),
            heatmap_folder(config.out, config.train.name),
            folder / "gallery",
            config.catalog.annotation,
        ),
        stage=of_model("pictures", config.train.name),
        **common,
    )
    _report(config, folder, slides, judged, card, precision)
    return outcome + pictures


def _refuse_unlabelled(config: Config, test: pd.DataFrame) -> None:
    """Refuse a test split in which no slide has a known label."""
    if (test["label"] >= 0).any():
        return
    if test.empty:
        raise RunError(
            f"{config.out} has no slide in the test split. See catalog.split and the table's column"
            " split"
        )
    raise RunError(
        f"None of the {len(test)} test slides of {config.out} has a label, so there is nothing to"
        " evaluate them against. Give labels or annotations in the catalog. `wsi predict` applies"
        " a model to slides without labels"
    )


def _precision(config: Config, card: dict, results: list[dict]) -> dict:
    """What weights and heatmaps were computed in, and how far float32 would be from that.

    Raises
    ------
    RunError
        If some heatmaps are in float32 and others in bfloat16.
    """
    found = {result["precision"] for result in results}
    if len(found) > 1:
        raise RunError(
            f"{heatmap_folder(config.out, config.train.name)}: some heatmaps are in float32 and"
            " others in bfloat16. Run the heatmap stage to its end first"
        )
    (heatmaps,) = found
    return {
        "training": card.get("precision"),
        "heatmaps": heatmaps,
        "difference": precision_difference(config.out, config.train.name)
        if heatmaps == "bfloat16"
        else None,
    }


@dataclass(frozen=True)
class ScoreSlide(Unit):
    """Look up each patch's probability, find and judge detections, draw the slide.

    Writes, in `folder`: ``slides/SLIDE.parquet``, see `write_scores`; ``detections/SLIDE.csv``;
    ``hits/SLIDE.*``, see `write_hits`; and ``slides/SLIDE.jpg``: the slide with its annotation
    beside its heatmap.
    """

    slide: LargeFile
    mpp: float
    size: tuple[int, int]
    labels: dict[str, int]
    annotation: SmallFile | None
    annotation_rules: AnnotationConfig
    index: SmallFile
    heatmap: LargeFile
    model: str
    detections: DetectionConfig
    thumbnail_px: int
    folder: Output

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The slide's picture, which is written last."""
        return (_picture_path(Path(self.folder), self.slide_id),)

    def run(self) -> dict:
        """Score the slide.

        Returns
        -------
        dict
            ``lesions``: their number; ``precision`` of the heatmap.
        """
        patches, probabilities = read_index(self.index.path), open_heatmap(self.heatmap.path)
        grid, values, folder = patches.grid, probabilities.values(), Path(self.folder)
        if probabilities.grid != grid or probabilities.model != self.model:
            raise RunError(
                f"{self.heatmap.path}: made by model {probabilities.model} from other patches or"
                f" another model than today's ({self.model}): run the heatmap stage again"
            )
        scores = probabilities.at(patches.table["x"].to_numpy(), patches.table["y"].to_numpy())
        write_scores(folder, self.slide_id, patches.table, scores)
        found = find_detections(values, grid, **self.detections.model_dump())
        write_detections(_detections_path(folder, self.slide_id), found)
        with Slide(self.slide.path, self.mpp) as slide:
            thumbnail, _ = slide.thumbnail(self.thumbnail_px)
            lesions = slide_annotation(slide, self.annotation, self.annotation_rules).lesions
        write_hits(
            folder / "hits", self.slide_id, found,
            size=self.size, mpp=self.mpp, labels=self.labels, truth=lesions,
        )  # fmt: skip
        panel = HeatmapPanel("heatmap", values, grid)
        (picture,) = self.outputs
        write_whole(picture, heatmap_figure(thumbnail, grid.bounds, lesions, [panel]))
        return {"lesions": len(lesions), "precision": probabilities.precision}


def _unit(slide, config: Config, card: dict, folder: Path, official_label: int) -> ScoreSlide:
    heatmap = heatmap_folder(config.out, config.train.name) / f"{slide.slide_id}.zarr"
    return ScoreSlide(
        slide_id=slide.slide_id,
        slide=LargeFile.at(slide.path),
        mpp=float(slide.mpp),
        size=(int(slide.width), int(slide.height)),
        labels={"official": official_label, "corrected": int(slide.label == 1)},
        annotation=slide.annotation and SmallFile.at(slide.annotation),
        annotation_rules=config.catalog.annotation,
        index=SmallFile.at(index_path(config.out, slide.slide_id)),
        heatmap=LargeFile.at(heatmap),  # a finished store is renamed, never written to
        model=model_id(config.train.name, card["weights_sha256"]),
        detections=config.evaluate.detections,
        thumbnail_px=config.evaluate.thumbnail_px,
        folder=Output(folder),
    )


def _picture_path(folder: Path, slide_id: str) -> Path:
    return folder / "slides" / f"{slide_id}.jpg"


def _detections_path(folder: Path, slide_id: str) -> Path:
    return folder / "detections" / f"{slide_id}.csv"


@dataclass(frozen=True, eq=False)
class _Judged:
    """What the model found in the test split, and what it missed."""

    patches: pd.DataFrame
    hits: dict[str, FrocHits]
    curves: dict[str, FrocCurve]
    lesions: pd.DataFrame
    false_positives: pd.DataFrame


def _judge(config: Config, folder: Path, test: pd.DataFrame) -> _Judged:
    """Put the slides' hits together; FROC on detections leaves out who has no lesions drawn."""
    slide_ids = test["slide_id"].tolist()
    lesion_ids = {row.slide_id: range(1, row.lesions + 1) for row in test.itertuples()}
    labels = test.set_index("slide_id")["label"].astype(int)
    on_lesions = pc.list_value_length(pc.field("lesions")) > 0
    by_patch = lesion_scores(
        read_scores(folder, slide_ids, ("lesions", "score"), on_lesions), lesion_ids
    )
    patches = read_scores(folder, slide_ids)
    drawn = test.loc[(test["label"] == 0) | (test["lesions"] > 0), "slide_id"].tolist()
    hits = {"lecture": lecture_hits(patches, by_patch, labels)}
    hits |= {mode: cohort_hits(folder / "hits", drawn, mode) for mode in MODES}
    for of_mode in hits.values():
        save_froc_hits(folder / "froc", of_mode)
    curves = {mode: froc_curve(of_mode) for mode, of_mode in hits.items()}
    lesions = found_or_missed(
        cohort_lesions(folder / "hits", drawn),
        curves["corrected"],
        max(config.evaluate.false_positives),
    ).merge(
        by_patch.rename(columns={"score": "patch_score"}),
        on=["slide_id", "lesion_id"],
        how="left",
    )
    detections = {slide_id: _detections_path(folder, slide_id) for slide_id in drawn}
    return _Judged(
        patches, hits, curves, lesions, false_positives(folder / "hits", drawn, detections)
    )


def _report(
    config: Config, folder: Path, slides: pd.DataFrame, judged: _Judged, card: dict, precision: dict
):
    """Put the figures together and write the report."""
    settings, model = config.evaluate, model_id(config.train.name, card["weights_sha256"])
    slides = slides.assign(score=read_slide_scores(folder, slides["slide_id"].tolist()))
    by_split = {
        split: slides.loc[slides["split"] == split, ["slide_id", "label", "score"]]
        for split in SPLITS
    }
    metrics = _metrics(config, slides, by_split, judged) | {"precision": precision}
    bootstrap: dict[str, Any] = {"replicates": settings.replicates, "seed": config.seed}
    shown = (judged.lesions.head(settings.gallery), judged.false_positives.head(settings.gallery))
    write_report(
        folder,
        title=f"{config.train.name} on {config.out.name}",
        model=model,
        run={
            "seed": config.seed,
            "model": config.train.name,
            "versions": {name: version(name) for name in LIBRARIES},
            "training": card["training"],
            "settings": _settings(config, precision),
        },
        metrics=metrics,
        patches=judged.patches,
        slide_curves={
            split: accuracy_curve(of_split["label"], of_split["score"])
            for split, of_split in by_split.items()
        },
        curves=judged.curves,
        bands={
            mode: froc_band(hits, _patients(slides), **bootstrap)
            for mode, hits in judged.hits.items()
        },
        lesions=judged.lesions,
        false_positives=judged.false_positives,
        lesion_pictures=read_pictures(folder / "gallery", "lesion", shown[0], "lesion_id"),
        false_positive_pictures=read_pictures(folder / "gallery", "false-positive", shown[1]),
        slides=_panels(config.out, config.train.name, slides, metrics["slide"]["threshold"]),
        failures=pd.DataFrame(failures_on_the_way(config.out, config.train.name)),
        explanations=explanations_link(config.train.name),
        explained=read_summary(explanation_folder(config.out, config.train.name), model),
        notes=catalog_notes(config.out),
    )
    record_evaluation(model_folder(config.out, config.train.name), folder, config.out.name)


def _settings(config: Config, precision: dict) -> dict:
    """The settings as they were used: with the precision that was decided where they have none."""
    settings = config.model_dump(mode="json")
    settings["train"]["precision"] = precision["training"]
    settings["heatmap"]["precision"] = precision["heatmaps"]
    return settings


def _metrics(
    config: Config, slides: pd.DataFrame, by_split: dict[str, pd.DataFrame], judged: _Judged
) -> dict:
    """Every figure with its interval."""
    settings, patients = config.evaluate, _patients(slides)
    bootstrap = {"replicates": settings.replicates, "seed": config.seed}
    patches = judged.patches
    patch = patch_metrics(patches["label"], patches["score"], settings.patch_threshold)
    slide = slide_metrics(by_split["validation"], by_split["test"], settings.patch_threshold)
    statistics = {
        "patch": binary_statistic(patches, patch["threshold"], "patches"),
        "slide": binary_statistic(by_split["test"], slide["threshold"], "slides"),
    }
    return {
        **{
            name: figures | {"intervals": intervals(statistics[name], patients, **bootstrap)}
            for name, figures in (("patch", patch), ("slide", slide))
        },
        "froc": {
            mode: froc_metrics(judged.curves[mode], len(hits.slide_ids), settings.false_positives)
            | {"intervals": froc_intervals(hits, patients, settings.false_positives, **bootstrap)}
            for mode, hits in judged.hits.items()
        },
    }


def _patients(slides: pd.DataFrame) -> dict[str, str]:
    return dict(zip(slides["slide_id"], slides["patient_id"], strict=True))


def _left_out(slide) -> list[str]:
    undrawn = slide.label == 1 and slide.lesions == 0
    return ["no lesion is outlined: left out of FROC on detections"] if undrawn else []


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
            notes=(*notes.get(slide.slide_id, ()), *_left_out(slide)),
        )
        for slide in slides.itertuples(index=False)
    ]
