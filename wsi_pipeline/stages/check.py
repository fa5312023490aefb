"""The check: all that can be known to go wrong, said at once before anything starts."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
from distributed import Client

from wsi_pipeline.config import Config
from wsi_pipeline.errors import (
    AnnotationError,
    CatalogError,
    MaskError,
    ModelError,
    ResolutionError,
    RunError,
    WsiError,
)
from wsi_pipeline.files import write_csv
from wsi_pipeline.jobs.record import read_done, read_failures
from wsi_pipeline.jobs.run import Outcome, run_units
from wsi_pipeline.jobs.unit import Unit
from wsi_pipeline.patches.index import SCHEMA_VERSION as INDEX_VERSION
from wsi_pipeline.patches.sampling import MAX_MPP_RATIO, read_hard_negatives
from wsi_pipeline.stages.catalog import SCHEMA_VERSION as CATALOG_VERSION
from wsi_pipeline.stages.catalog import (
    InspectSlide,
    copied_slides,
    inspection,
    listed_slides,
    same_annotations,
)
from wsi_pipeline.stages.leakage import patients_of_weights, shared_patients
from wsi_pipeline.stages.run_directory import TRAINING_SPLITS, cache_path, check_path
from wsi_pipeline.stages.tile_inputs import TileInputs

SCHEMA_VERSION = 1
PLAUSIBLE_MPP = (0.05, 4.0)
"""Of scanners, um per level-0 px; 42 would be a printer's 600 dots per inch."""
BYTES_A_PATCH = 40
"""Of its index, its heatmap pixel and its scores."""

KINDS = {
    AnnotationError: "annotation",
    CatalogError: "label",
    MaskError: "mask",
    ResolutionError: "resolution",
}
ADVICE = {
    "slide": "replace the file, or leave the slide out of the table",
    "resolution": "state the true one in the table's column mpp",
    "annotation": "see docs/annotations.md",
    "label": "correct the label of the table, or the annotation",
    "mask": "see docs/tissue.md",
    "tissue": "see docs/tissue.md",
    "copy": "keep one of each",
    "split": "see catalog.split, and the table's columns split and label",
    "leakage": "set train.weights to others, or move the patients to another split",
    "settings": "correct the setting",
    "disk": "make room, or set out to another disk",
}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes
    ----------
    slide_id : str
        '' where it is of the cohort, the settings or the disk.
    kind : str
        One of `ADVICE`.
    what, advice : str
        What is wrong, and what to do about it.
    refuses : bool
        Whether `wsi run` does not start: it would end in the middle, or for nothing.
    """

    slide_id: str
    kind: str
    what: str
    advice: str
    refuses: bool = False

    @classmethod
    def of(cls, kind: str, what: str, slide_id: str = "", refuses: bool = False) -> "Finding":
        """A finding with its kind's advice."""
        return cls(slide_id, kind, what, ADVICE[kind], refuses)


@dataclass(frozen=True)
class CheckSlide(Unit):
    """Look at one slide as the catalog and the tile stage will."""

    inspect: InspectSlide
    inputs: TileInputs
    attempt: int  # what failed is looked at again: a file may be whose time did not change

    def run(self) -> dict:
        """Open it, its annotation and its tissue.

        Returns
        -------
        dict
            ``findings``: pairs of kind and text. Of a slide that can be opened also what
            `InspectSlide` tells; of one that can be tiled, ``working_mpp`` and ``patches``, about
            how many it will give. ``failed``: whether something could not be read or used.
        """
        findings: list[tuple[str, str]] = []
        seen: dict = {"findings": findings, "attempt": self.attempt, "failed": False}
        implausible = ""
        try:
            seen |= self.inspect.run()
            findings += [("annotation", text) for text in seen["doubts"]]
            if implausible := self._implausible(seen["mpp"]):
                findings.append(("resolution", implausible))
            view = replace(self.inputs, mpp=seen["mpp"]).look()
            findings += [("annotation", text) for text in view.misplaced]
            findings += [("tissue", text) for text in view.tissue.notes]
            if view.tissue.unread:
                text = f"parts of it cannot be decoded: {view.tissue.unread[0]}"
                findings.append(("slide", text))
            working_mpp = None if implausible else view.grid.working_mpp
            seen |= {"working_mpp": working_mpp, "patches": view.expected_patches}
        except WsiError as error:
            seen["failed"] = True
            if not implausible:  # else this follows from it
                findings.append((KINDS.get(type(error), "slide"), str(error)))
        return seen

    def _implausible(self, mpp: float) -> str:
        low, high = PLAUSIBLE_MPP
        if low <= mpp <= high:
            return ""
        source = self.inspect.slide.path if self.inspect.mpp is None else "the table"
        return f"{source} states {mpp:.4g} um per px at level 0; scanners have {low:g} to {high:g}"


def run(config: Config, client: Client) -> Outcome:
    """Write ``RUN/check.csv``: the findings, one row each.

    Every slide and its annotation are opened and its tissue is looked for; then copies, the
    splits, the start weights and the disk are looked at. Nothing is refused here: see
    `read_findings`.

    Raises
    ------
    CatalogError
        If the table or the folders contradict themselves, or hold no slide.
    """
    frame, _ = listed_slides(config)
    before = {key: line["result"] for key, line in read_done(config.out, "check").items()}
    attempts = {key: of.get("attempt", 0) + of.get("failed", 0) for key, of in before.items()}
    outcome = run_units(
        client,
        (
            CheckSlide(
                row.slide_id,
                inspection(row, config.catalog),
                TileInputs.of_slide(row, config),
                attempts.get(row.slide_id, 0),
            )
            for row in frame.itertuples(index=False)
        ),
        total=len(frame),
        run_dir=config.out,
        stage="check",
        schema_version=[SCHEMA_VERSION, CATALOG_VERSION, INDEX_VERSION],
        retries=config.jobs.retries,
        window=config.jobs.window,
    )
    results = {s: outcome.results[s] for s in frame["slide_id"] if s in outcome.results}
    findings = [
        Finding.of(kind, text, slide_id)
        for slide_id, result in results.items()
        for kind, text in result["findings"]
    ]
    findings += [
        Finding.of("slide", f"it could not be looked at: {row.reason}", row.slide_id)
        for row in read_failures(config.out)
        if row.stage == "check"
    ]
    opened = {key: result for key, result in results.items() if "mpp" in result}
    refuses = config.catalog.copies == "refuse"
    findings += [Finding.of("copy", text, refuses=refuses) for text in copied_slides(opened, frame)]
    findings += [Finding.of("annotation", text) for text in same_annotations(opened)]
    seen = frame.drop(columns=["label", "mpp"]).merge(_table(results), on="slide_id")
    for look_at in (_resolutions, _splits, _network, _leakage, _disk):
        findings += look_at(seen, config)
    columns = [field.name for field in fields(Finding)]
    rows = pd.DataFrame([asdict(finding) for finding in findings], columns=columns)
    write_csv(check_path(config.out), rows)
    return outcome


def read_findings(run_dir: Path) -> list[Finding]:
    """Read what `run` wrote."""
    text = dict.fromkeys(("slide_id", "kind", "what", "advice"), str)
    rows = pd.read_csv(check_path(run_dir), dtype=text, keep_default_na=False)
    return [Finding(**row) for row in rows.to_dict("records")]


def _table(results: dict[str, dict]) -> pd.DataFrame:
    """What was seen of each slide that can be tiled."""
    names = ("label", "lesions", "working_mpp", "patches")
    rows = [
        {"slide_id": slide_id, **{name: result[name] for name in names}}
        for slide_id, result in results.items()
        if "patches" in result
    ]
    return pd.DataFrame(rows, columns=["slide_id", *names])


def _resolutions(slides: pd.DataFrame, config: Config) -> Iterator[Finding]:
    """Slides whose working resolution is not that of most; training refuses to mix them."""
    slides = slides[slides["working_mpp"].notna()]  # of plausible slides
    mpp = slides["working_mpp"].to_numpy(float)
    if not len(mpp):
        return
    alike = np.abs(np.log(mpp[:, np.newaxis] / np.unique(mpp))) <= np.log(MAX_MPP_RATIO) / 2
    usual = np.unique(mpp)[alike.sum(axis=0).argmax()]
    apart = slides[np.abs(np.log(mpp / usual)) > np.log(MAX_MPP_RATIO) / 2]
    trained = slides.loc[slides["split"].isin(TRAINING_SPLITS), "working_mpp"]
    mixed = trained.max() > MAX_MPP_RATIO * trained.min()
    for slide in apart.itertuples():
        what = (
            f"its patches would have {slide.working_mpp:.4g} um per px, those of most slides"
            f" {usual:.4g}"
        )
        refuses = bool(mixed and slide.split in TRAINING_SPLITS)
        advice = "set tile.mpp, and tile.level to null"
        yield Finding(slide.slide_id, "resolution", what, advice, refuses)


def _splits(slides: pd.DataFrame, config: Config) -> Iterator[Finding]:
    """Splits that lack what their stage needs."""
    for name in TRAINING_SPLITS:
        if not slides.loc[slides["split"] == name, "lesions"].gt(0).any():
            what = f"no slide with lesions is in the {name} split: training needs tumour patches"
            yield Finding.of("split", what, refuses=True)
    if "test" not in config.heatmap.splits:
        what = f"heatmap.splits is {[*config.heatmap.splits]}: evaluation needs the test split"
        yield Finding.of("settings", what, refuses=True)
    labels = set(slides.loc[slides["split"] == "test", "label"]) - {-1}
    if not labels:
        what = "no slide of known label is in the test split: there is nothing to evaluate"
        yield Finding.of("split", what, refuses=True)
    elif len(labels) == 1:
        only = "tumour" if labels == {1} else "normal"
        what = f"all slides of the test split are {only}: slide accuracy and ROC AUC need both"
        yield Finding.of("split", what)


def _network(slides: pd.DataFrame, config: Config) -> Iterator[Finding]:
    """A network that cannot be built, or does not fit the patches."""
    from wsi_pipeline.stages.network import network_plan

    try:
        network_plan(config)
    except ModelError as error:
        yield Finding.of("settings", str(error), refuses=True)


def _leakage(slides: pd.DataFrame, config: Config) -> Iterator[Finding]:
    """What training starts from: missing files, and slides or patients that it must not know."""
    train = config.train
    validation = set(slides.loc[slides["split"] == "validation", "patient_id"])
    test = slides[slides["split"] == "test"]
    test_slides = set(test["slide_id"])
    if train.weights_path is not None and not train.weights_path.is_file():
        what = f"train.weights is {train.weights}: there is no such file"
        yield Finding.of("settings", what, refuses=True)
        return
    try:
        known = patients_of_weights(
            train.weights, test=set(test["patient_id"]), test_slides=test_slides
        )
        if validation and not validation - set(shared_patients(validation, {*known["earlier"]})):
            what = f"{train.weights}: all patients of the validation split trained these weights"
            yield Finding.of("leakage", what, refuses=True)
    except RunError as error:
        yield Finding.of("leakage", str(error), refuses=True)
    if train.hard_negatives is not None:
        try:
            read_hard_negatives(train.hard_negatives, test_slides)
        except RunError as error:
            yield Finding.of("settings", str(error), refuses=True)


def _disk(slides: pd.DataFrame, config: Config) -> Iterator[Finding]:
    """Less room than the cache and the heatmaps may take."""
    needed = BYTES_A_PATCH * slides["patches"].sum()
    if config.train.cache:
        kept = slides[slides["split"].isin(TRAINING_SPLITS) & slides["label"].ge(0)]
        to_make = [not cache_path(config.out, slide_id).exists() for slide_id in kept["slide_id"]]
        needed += 3 * config.tile.patch_px**2 * kept.loc[to_make, "patches"].sum()
    free = shutil.disk_usage(config.out).free
    if needed > free:
        what = (
            f"{config.out}: up to {needed / 1e9:,.1f} GB may be written, of some"
            f" {slides['patches'].sum():,.0f} patches; {free / 1e9:,.1f} GB are free"
            + (" (train.cache takes the most)" if config.train.cache else "")
        )
        yield Finding.of("disk", what, refuses=True)
