"""The check: all that can be known to go wrong, said at once before anything starts."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd
from distributed import Client

from wsi_pipeline.config import Config, TileConfig
from wsi_pipeline.errors import RunError, WsiError
from wsi_pipeline.files import write_csv
from wsi_pipeline.jobs.run import Outcome, run_units
from wsi_pipeline.jobs.unit import Unit
from wsi_pipeline.stages import catalog, tile
from wsi_pipeline.stages.leakage import patients_of_weights
from wsi_pipeline.stages.run_directory import SPLITS, TRAINING_SPLITS, check_path

SCHEMA_VERSION = 1
PLAUSIBLE_MPP = (0.05, 4.0)
"""Of scanners, um per level-0 px; 42 is a printer's 600 dots per inch."""
MAX_MPP_RATIO = 1.2
"""Between the working resolutions of slides that one model is trained on and applied to."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes
    ----------
    slide_id : str
        '' where it is of the cohort, the settings or the disk.
    kind : str
        As "annotation" or "resolution".
    what, advice : str
        What is wrong, and what to do about it.
    refuses : bool
        Whether `wsi run` does not start: the run would be worth nothing, or end in the middle.
    """

    slide_id: str
    kind: str
    what: str
    advice: str
    refuses: bool = False


ADVICE = {
    "slide": "replace the file, or leave the slide out",
    "resolution": "state it: column mpp of the table, or catalog.mpp",
    "annotation": "see docs/annotations.md",
    "label": "correct the table's label, or the annotation",
    "tissue": "see docs/tissue.md",
}
"""What to do about a kind of finding where its text does not say so."""


@dataclass(frozen=True)
class CheckSlide(Unit):
    """Look at one slide as the catalog and the tile stage will."""

    inspect: catalog.InspectSlide
    tile: TileConfig

    def run(self) -> dict:
        """Open it, its annotation and its tissue.

        Returns
        -------
        dict
            ``findings``: pairs of kind and text; and, of a slide that can be opened, ``label``,
            ``working_mpp`` and ``patches``, about how many it will give.
        """
        seen: dict = {"findings": []}
        try:
            found = self.inspect.run()
            seen |= {"label": found["label"], "lesions": found["lesions"]}
            seen["findings"] += [["annotation", text] for text in found["doubts"]]
            seen["findings"] += self._implausible(found["mpp"])
            looked = tile.look_at(
                self.inspect.slide,
                found["mpp"],
                self.inspect.annotation,
                self.inspect.annotation_rules,
                self.tile,
            )
            seen["findings"] += [["tissue", text] for text in looked.notes]
            seen["working_mpp"] = looked.grid.working_mpp
            seen["patches"] = looked.expected_patches
        except WsiError as error:
            seen["findings"].append([error.subject, str(error)])
        return seen

    def _implausible(self, mpp: float) -> list[list[str]]:
        low, high = PLAUSIBLE_MPP
        if self.inspect.mpp is not None or low <= mpp <= high:
            return []
        text = (
            f"{self.inspect.slide.path} states {mpp:.4g} um per px at level 0; scanners have"
            f" {low:g} to {high:g}"
        )
        return [["resolution", text]]


def run(config: Config, client: Client) -> Outcome:
    """Write ``RUN/check.csv``: the findings, one row each.

    Every slide and its annotation are opened and its tissue is looked for; then the splits, the
    start weights and the disk are looked at. Nothing is refused here: see `read_findings`.

    Raises
    ------
    CatalogError
        If the table or the folders contradict themselves, or hold no slide.
    """
    frame = catalog.listed_slides(config)
    outcome = run_units(
        client,
        (
            CheckSlide(row.slide_id, catalog.inspection(row, config.catalog), config.tile)
            for row in frame.itertuples(index=False)
        ),
        total=len(frame),
        run_dir=config.out,
        stage="check",
        schema_version=SCHEMA_VERSION,
        retries=config.jobs.retries,
        window=config.jobs.window,
    )
    findings = [
        Finding(slide_id, kind, text, ADVICE.get(kind, ""))
        for slide_id, result in outcome.results.items()
        for kind, text in result["findings"]
    ]
    seen = frame.assign(
        **{
            name: [outcome.results.get(s, {}).get(name) for s in frame["slide_id"]]
            for name in ("label", "lesions", "working_mpp", "patches")
        }
    )
    usable = seen[seen["patches"].notna()]
    for cohort_check in (_resolutions, _splits, _leakage, _disk):
        findings += cohort_check(usable, config)
    rows = pd.DataFrame(
        [asdict(row) for row in findings], columns=[f.name for f in fields(Finding)]
    )
    write_csv(check_path(config.out), rows)
    return outcome


def read_findings(run_dir: Path) -> list[Finding]:
    """Read what `run` wrote."""
    rows = pd.read_csv(check_path(run_dir), keep_default_na=False)
    return [Finding(**row) for row in rows.to_dict("records")]


def _resolutions(slides: pd.DataFrame, config: Config) -> Iterator[Finding]:
    """Slides whose working resolution is not that of most."""
    usual = slides["working_mpp"].median()
    apart = slides["working_mpp"].astype(float).div(usual)
    for slide in slides[(apart > MAX_MPP_RATIO) | (apart < 1 / MAX_MPP_RATIO)].itertuples():
        yield Finding(
            slide.slide_id,
            "resolution",
            f"its patches would have {slide.working_mpp:.4g} um per px, those of most slides"
            f" {usual:.4g}",
            "set tile.mpp, and tile.level to null",
        )


def _splits(slides: pd.DataFrame, config: Config) -> Iterator[Finding]:
    """Splits that lack what their stage needs."""
    advice = "see catalog.split, and the table's columns split and label"
    of_split = {name: slides[slides["split"] == name] for name in SPLITS}
    for name in TRAINING_SPLITS:
        if not of_split[name]["lesions"].gt(0).any():
            what = f"no slide with lesions is in the {name} split: training needs tumour patches"
            yield Finding("", "split", what, advice, refuses=True)
    labels = set(of_split["test"]["label"]) - {-1}
    if not labels:
        what = "no slide of known label is in the test split: there is nothing to evaluate"
        yield Finding("", "split", what, advice, refuses=True)
    elif len(labels) == 1:
        what = (
            f"all slides of the test split are {'tumour' if labels == {1} else 'normal'}: slide"
            " accuracy and ROC AUC need both"
        )
        yield Finding("", "split", what, advice)


def _leakage(slides: pd.DataFrame, config: Config) -> Iterator[Finding]:
    """Start weights that are not there, or have seen patients of the test split."""
    try:
        patients_of_weights(
            config.train.weights, test=set(slides.loc[slides["split"] == "test", "patient_id"])
        )
    except RunError as error:
        yield Finding("", "leakage", str(error), "", refuses=True)
    if (
        config.train.weights not in ("imagenet", "none")
        and not Path(config.train.weights).is_file()
    ):
        what = f"train.weights is {config.train.weights}: there is no such file"
        yield Finding("", "settings", what, "correct train.weights", refuses=True)


def _disk(slides: pd.DataFrame, config: Config) -> Iterator[Finding]:
    """Less room than the cache and the heatmaps may take."""
    patches = slides["patches"]
    needed = HEATMAP_BYTES * patches[slides["split"].isin(config.heatmap.splits)].sum()
    if config.train.cache:
        trained = slides["split"].isin(TRAINING_SPLITS) & slides["label"].ge(0)
        needed += 3 * config.tile.patch_px**2 * patches[trained].sum()
    free = shutil.disk_usage(config.out).free
    if needed > free:
        what = (
            f"{config.out}: {needed / 1e9:,.1f} GB may be written (some"
            f" {patches.sum():,.0f} patches), {free / 1e9:,.1f} GB are free"
        )
        advice = (
            "make room, set out to another disk" + ", or train.cache to false" * config.train.cache
        )
        yield Finding("", "disk", what, advice, refuses=True)
