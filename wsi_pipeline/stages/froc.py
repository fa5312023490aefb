"""FROC of anybody's detections: CSV files, annotations or masks, and a table of slides."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from distributed import Client

from wsi_pipeline.config import AnnotationConfig
from wsi_pipeline.errors import CatalogError, RunError
from wsi_pipeline.evaluation.cohort_hits import (
    MODES,
    cohort_hits,
    cohort_lesions,
    false_positives,
    write_hits,
)
from wsi_pipeline.evaluation.detections import detection_files, read_detections, tell_passed_over
from wsi_pipeline.evaluation.evaluation_mask import official_labels
from wsi_pipeline.evaluation.froc import AVERAGE_FPS, froc_curve, froc_metrics, vertices
from wsi_pipeline.evaluation.lesion_pixels import read_mask
from wsi_pipeline.evaluation.lesions import found_or_missed
from wsi_pipeline.evaluation.uncertainty import REPLICATES, froc_band, froc_intervals
from wsi_pipeline.files import write_csv, write_json, write_whole
from wsi_pipeline.jobs.run import Outcome, run_units
from wsi_pipeline.jobs.unit import Output, SmallFile, Unit
from wsi_pipeline.report.curves import froc_figure
from wsi_pipeline.slides.annotations import read_annotation
from wsi_pipeline.slides.catalog import ANNOTATION_SUFFIXES, files_by_stem, read_measured_slides

SCHEMA_VERSION = 1
MASK_SUFFIXES = frozenset((".tif", ".tiff"))
OUTPUTS = (
    "froc.json", "froc.svg", "lesions.csv", "false_positives.csv",
    *(f"froc_{mode}.csv" for mode in MODES),
)  # fmt: skip


def run(
    detections: Path,
    slides: Path,
    out: Path,
    client: Client,
    *,
    annotations: Path | None = None,
    masks: Path | None = None,
    modes: Sequence[str] = MODES,
    tumour: Sequence[str] = AnnotationConfig().positive,
    average_fps: Sequence[float] = AVERAGE_FPS,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Outcome:
    """Write ``froc.json``, ``froc.svg``, the curves, the lesions and the false positives as CSV.

    Nothing is written but the hits of the slides that went well when one failed: a score over
    part of a cohort is not the cohort's.

    Parameters
    ----------
    detections : Path
        Folder of ``SLIDE.csv``, see `wsi_pipeline.evaluation.detections`.
    slides : Path
        See `read_measured_slides`.
    out : Path
        Made when missing.
    client : Client
    annotations : Path, optional
        Folder of annotation files named as the slides are, in level-0 px.
    masks : Path, optional
        Instead of annotations: folder of mask TIFFs, ``SLIDE.tif`` or ``SLIDE_Mask.tif``.
    modes : sequence of str
        Of "official" and "corrected".
    tumour : sequence of str
        Groups or classes of the annotations that are tumour.
    average_fps : sequence of float
    replicates, seed : int
        Of the bootstrap.

    Raises
    ------
    CatalogError, RunError
        If a slide lacks its detections or annotation, or has several; the message names them.
        Files of other slides are passed over with a warning.
    """
    if (annotations is None) == (masks is None):
        raise RunError("give the lesions either as annotations or as masks, one of the two")
    table = read_measured_slides(slides)
    files = detection_files(detections, table["slide_id"])
    truth = _truth(table, annotations, masks)
    labels = dict(zip(table["slide_id"], table["label"].astype(int), strict=True))
    by_mode = {"official": official_labels(labels), "corrected": labels}
    hits = out / "hits"
    hits.mkdir(parents=True, exist_ok=True)
    for name in OUTPUTS:  # of an earlier call: they are not what this one is about
        (out / name).unlink(missing_ok=True)
    outcome = run_units(
        client,
        [
            _unit(
                row,
                files[row.slide_id],
                truth.get(row.slide_id),
                {mode: of_mode[row.slide_id] for mode, of_mode in by_mode.items()},
                list(tumour),
                hits,
            )
            for row in table.itertuples(index=False)
        ],
        run_dir=out,
        stage="froc",
        schema_version=SCHEMA_VERSION,
    )
    if not outcome.failed:
        _write(out, table, files, modes, average_fps, {"replicates": replicates, "seed": seed})
    return outcome


def scores(out: Path) -> dict[str, str]:
    """What ``froc.json`` says, in a line for each mode."""
    lines = {}
    for mode, found in json.loads((out / "froc.json").read_text()).items():
        ends = found["intervals"]["score"]
        interval = "" if ends["low"] is None else f" ({ends['low']:.4f} to {ends['high']:.4f})"
        lines[mode] = (
            f"undefined: {found['undefined']}"
            if found["undefined"]
            else f"{found['score']:.4f}{interval}, lesions: {found['lesions']},"
            f" slides: {found['slides']}"
        )
    return lines


@dataclass(frozen=True)
class SlideHits(Unit):
    """Compare one slide's detections with its lesions."""

    detections: SmallFile
    size: tuple[int, int]
    mpp: float
    labels: dict[str, int]
    truth: SmallFile | None
    annotation_rules: dict
    folder: Output

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The lesions' table, which is written last."""
        return (Path(self.folder) / f"{self.slide_id}.lesions.parquet",)

    def run(self) -> dict:
        """Write the slide's hits.

        Returns
        -------
        dict
            ``lesions``: their number; ``notes``: what was repaired or passed over in the
            annotation.
        """
        lesions, notes = self._lesions()
        if self.labels["corrected"] == 0 and lesions:
            raise CatalogError(
                f"{self.truth.path} annotates slide {self.slide_id}, whose label is 0: which of the"
                " two is right?"
            )
        number = write_hits(
            Path(self.folder), self.slide_id, read_detections(self.detections.path, self.size),
            size=self.size, mpp=self.mpp, labels=self.labels, truth=lesions,
        )  # fmt: skip
        return {"lesions": number, "notes": notes}

    def _lesions(self) -> tuple[Sequence | Path, list[str]]:
        if self.truth is None:
            return (), []
        path, tumour = Path(self.truth.path), bool(self.labels["corrected"])
        if path.suffix.lower() in MASK_SUFFIXES:
            return path if tumour or read_mask(path).any() else (), []
        annotation = read_annotation(path, **self.annotation_rules, size=self.size)
        if tumour and not annotation.lesions:
            raise CatalogError(
                f"{path} holds no lesion, but the label of slide {self.slide_id} is 1: its"
                " detections cannot be told from false positives"
            )
        return annotation.lesions, annotation.notes


def _truth(table: pd.DataFrame, annotations: Path | None, masks: Path | None) -> dict[str, Path]:
    """The annotation or mask of each slide that has one, as every tumour slide must."""
    folder = masks or annotations
    files = files_by_stem(
        folder,
        MASK_SUFFIXES if masks else ANNOTATION_SUFFIXES,
        "masks" if masks else "annotations",
    )
    by_name = defaultdict(list)
    for stem, path in files.items():
        by_name[stem.casefold().removesuffix("_mask")].append(path)
    of_slides = {s: by_name.pop(s.casefold()) for s in table["slide_id"] if s.casefold() in by_name}
    tell_passed_over(folder, [path for paths in by_name.values() for path in paths])
    for paths in of_slides.values():
        if len(paths) > 1:
            raise CatalogError(f"{paths[1]} and {paths[0]}: two masks of one slide")
    truth = {slide_id: path for slide_id, (path,) in of_slides.items()}
    tumour = table.loc[table["label"] == 1, "slide_id"]
    if lacking := [slide_id for slide_id in tumour if slide_id not in truth]:
        raise CatalogError(
            f"{folder}: nothing for the slides {', '.join(lacking[:5])} ({len(lacking)} in all),"
            " whose label is 1: their detections cannot be told from false positives"
        )
    return truth


def _unit(
    row, detections: Path, truth: Path | None, labels: dict[str, int], tumour: list[str], hits: Path
) -> SlideHits:
    return SlideHits(
        slide_id=row.slide_id,
        detections=SmallFile.at(detections.absolute()),
        size=(int(row.width), int(row.height)),
        mpp=float(row.mpp),
        labels=labels,
        truth=truth and SmallFile.at(truth.absolute()),
        annotation_rules={"positive": tumour, "exclusion": list(AnnotationConfig().exclusion)},
        folder=Output(hits.absolute()),
    )


def _write(
    out: Path,
    table: pd.DataFrame,
    detections: dict[str, Path],
    modes: Sequence[str],
    average_fps: Sequence[float],
    bootstrap: dict[str, int],
):
    slide_ids = table["slide_id"].tolist()
    patients = dict(zip(slide_ids, table["patient_id"], strict=True))
    hits = {mode: cohort_hits(out / "hits", slide_ids, mode) for mode in MODES}
    curves = {mode: froc_curve(hits[mode]) for mode in MODES}
    metrics, bands = {}, {}
    for mode in modes:
        metrics[mode] = {
            **froc_metrics(curves[mode], len(slide_ids), average_fps),
            "intervals": froc_intervals(hits[mode], patients, average_fps, **bootstrap),
        }
        bands[mode] = froc_band(hits[mode], patients, **bootstrap)
        write_csv(out / f"froc_{mode}.csv", vertices(curves[mode]))
    lesions = cohort_lesions(out / "hits", slide_ids)
    write_csv(out / "lesions.csv", found_or_missed(lesions, curves["corrected"], max(average_fps)))
    write_csv(out / "false_positives.csv", false_positives(out / "hits", slide_ids, detections))
    shown = {mode: curves[mode] for mode in modes if not curves[mode].undefined}
    if shown:
        write_whole(out / "froc.svg", froc_figure(shown, bands, average_fps).svg)
    write_json(out / "froc.json", metrics)
