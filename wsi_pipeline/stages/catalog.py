"""The catalog: every slide opened once, its size, resolution, annotation and label checked."""

import logging
from dataclasses import dataclass
from functools import partial

import pandas as pd
import shapely
from distributed import Client

from wsi_pipeline.config import AnnotationConfig, CatalogConfig, Config
from wsi_pipeline.errors import AnnotationError, CatalogError, SlideError
from wsi_pipeline.files import replace_atomically
from wsi_pipeline.jobs.run import Outcome, run_units
from wsi_pipeline.jobs.unit import LargeFile, SmallFile, Unit
from wsi_pipeline.slides.annotation_frame import (
    GOOD,
    better_ways,
    file_to_level0,
    share_on_tissue,
    share_scanned,
)
from wsi_pipeline.slides.annotations import (
    Annotation,
    OffSlideError,
    read_annotation,
    uses_bounds_origin,
)
from wsi_pipeline.slides.catalog import assign_splits, read_catalog, scan_folders
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.tissue import TissueMask
from wsi_pipeline.stages.run_directory import SLIDE_COLUMNS, slides_path

SCHEMA_VERSION = 2

logger = logging.getLogger(__name__)


def run(config: Config, client: Client) -> Outcome:
    """Write ``RUN/slides.parquet``: one row a slide, those that failed to open included.

    Columns: ``slide_id, path, annotation, patient_id, split`` (strings), ``label`` (1 tumour,
    0 normal, -1 unknown), ``mpp`` (um per level-0 px), ``width, height`` (level-0 px), ``status``
    ("ok" or "failed"; why is in ``RUN/failures.csv``).

    Raises
    ------
    CatalogError
        If the table or the folders contradict themselves, or hold no slide.
    """
    frame = _listed_slides(config)
    outcome = run_units(
        client,
        (_unit(row, config.catalog) for row in frame.itertuples(index=False)),
        total=len(frame),
        run_dir=config.out,
        stage="catalog",
        schema_version=SCHEMA_VERSION,
        retries=config.jobs.retries,
        window=config.jobs.window,
    )
    found = pd.DataFrame(
        [{"slide_id": key, **outcome.results[key]} for key in outcome.results],
        columns=["slide_id", "label", "mpp", "width", "height"],
    )
    frame = frame.drop(columns=["label", "mpp"]).merge(found, on="slide_id", how="left")
    frame["status"] = frame["width"].notna().map({True: "ok", False: "failed"})
    frame = frame.astype({"label": "Int8", "width": "Int64", "height": "Int64"})
    with replace_atomically(slides_path(config.out)) as path:
        frame[list(SLIDE_COLUMNS)].to_parquet(path, index=False)
    return outcome


def slide_annotation(slide: Slide, file: SmallFile | None, rules: AnnotationConfig) -> Annotation:
    """A slide's annotation in its level-0 px; an empty one where there is no file.

    Raises
    ------
    AnnotationError
        If the file cannot be understood, or all of its lesions lie off the slide; the message
        names the settings by which they would lie on it.
    """
    if file is None:
        return Annotation()
    origin = rules.origin
    if origin == "auto":
        origin = "bounds" if uses_bounds_origin(file.path) else "slide"
    scale = 1 / slide.mpp if rules.scale == "um" else rules.scale
    try:
        return read_annotation(
            file.path,
            positive=rules.positive,
            exclusion=rules.exclusion,
            ignored=rules.ignored,
            to_level0=file_to_level0(slide, origin, scale),
            size=slide.size,
        )
    except OffSlideError as error:
        better = better_ways(error.drawn, slide, partial(share_scanned, slide=slide))
        raise AnnotationError(f"{error}{_advice(better, 'on the slide')}") from error


def refuse_misplaced(
    slide: Slide, annotation: Annotation, mask: TissueMask, rules: AnnotationConfig, file: SmallFile
) -> list[str]:
    """Notes where lesions lie off tissue and would lie on it if the file were read otherwise.

    Raises
    ------
    AnnotationError
        If less of them than ``rules.min_on_tissue`` lies on tissue.
    """
    share = share_on_tissue(shapely.MultiPolygon(annotation.lesions), mask)
    if share >= GOOD:
        return []
    better = better_ways(annotation.drawn, slide, partial(share_on_tissue, mask=mask))
    better = {way: found for way, found in better.items() if found > share + 0.25}
    if share < rules.min_on_tissue:
        raise AnnotationError(
            f"{file.path}: {share:.0%} of the area of its lesions is tissue, under"
            f" catalog.annotation.min_on_tissue, {rules.min_on_tissue:g}"
            f"{_advice(better, 'on tissue')}"
        )
    if not better:
        return []
    return [f"{share:.0%} of the lesions' area is tissue{_advice(better, 'on tissue')}"]


def _advice(better: dict[str, float], where: str) -> str:
    if not better:
        return ": is it another slide's annotation?"
    ways = " or ".join(f"{way} ({share:.0%})" for way, share in [*better.items()][:3])
    return f": more would lie {where} with {ways}"


@dataclass(frozen=True)
class InspectSlide(Unit):
    """Open one slide and read its annotation."""

    slide: LargeFile
    mpp: float | None
    default_mpp: float | None
    annotation: SmallFile | None
    label: int | None
    unannotated: str
    annotation_rules: AnnotationConfig

    def run(self) -> dict:
        """Look at the slide.

        Returns
        -------
        dict
            ``width, height`` (level-0 px), ``mpp``, ``label``, ``lesions`` (their number) and
            ``notes`` (what was repaired or passed over in the annotation).
        """
        with _open(self.slide.path, self.mpp, self.default_mpp) as slide:
            found = slide_annotation(slide, self.annotation, self.annotation_rules)
            width, height = slide.size
            label, why = self._label(found)
            return {
                "width": width,
                "height": height,
                "mpp": slide.mpp,
                "label": label,
                "lesions": len(found.lesions),
                "notes": [*found.notes, *why],
            }

    def _label(self, found: Annotation) -> tuple[int, list[str]]:
        """The slide's label, and why, where its annotation alone does not tell."""
        file = self.annotation.path if self.annotation else ""
        if self.label == 0:
            if found.lesions or found.marks_tumour:
                drawn = f"lesions ({len(found.lesions)})" if found.lesions else found.met
                raise CatalogError(
                    f"{file} holds {drawn}, but the catalog's label of its slide is 0"
                )
            return 0, []
        if found.state == "unknown classes":
            raise AnnotationError(f"{file}: {found.unknown_classes}")
        if self.label == 1 or found.lesions:
            unused = file and not found.lesions
            return 1, ["no lesion is drawn: its patches are of unknown label"] if unused else []
        if found.state == "normal":
            return 0, []
        if found.state == "unusable":
            return -1, ["nothing that is drawn has an area: its label is unknown"]
        label = 0 if self.unannotated == "normal" else -1
        as_told = f"nothing is drawn in its annotation: {self.unannotated}, by catalog.unannotated"
        return label, [as_told] if file else []


def _open(path: str, mpp: float | None, default_mpp: float | None) -> Slide:
    """Open a slide at the resolution of the table, else its own, else the default."""
    try:
        return Slide(path, mpp)
    except SlideError:
        if mpp is not None or default_mpp is None:
            raise
        return Slide(path, default_mpp)


def _listed_slides(config: Config) -> pd.DataFrame:
    catalog = config.catalog
    if catalog.csv is not None:
        frame = read_catalog(catalog.csv)
    else:
        frame = scan_folders(catalog.slides, catalog.annotations)
    if frame["split"].isna().all():
        return assign_splits(frame, catalog.split, config.seed)
    shares = _train_shares(catalog.split)
    splits = set(frame["split"])
    if shares and "train" in splits and "validation" not in splits:
        drawn = frame["split"] == "train"
        unsplit = frame[drawn].assign(split=pd.NA)
        frame.loc[drawn, "split"] = assign_splits(unsplit, shares, config.seed)["split"]
        logger.info("no slide is in the validation split: its patients are drawn from train")
    return frame


def _train_shares(split: dict[str, float]) -> dict[str, float]:
    """The shares of train and validation among these two, where both are wanted."""
    shares = {name: split.get(name, 0) for name in ("train", "validation")}
    total = sum(shares.values())
    return {k: v / total for k, v in shares.items()} if all(shares.values()) else {}


def _unit(row, catalog: CatalogConfig) -> InspectSlide:
    return InspectSlide(
        slide_id=row.slide_id,
        slide=LargeFile.at(row.path),
        mpp=None if pd.isna(row.mpp) else float(row.mpp),
        default_mpp=catalog.mpp,
        annotation=None if pd.isna(row.annotation) else SmallFile.at(row.annotation),
        label=None if pd.isna(row.label) else int(row.label),
        unannotated=catalog.unannotated,
        annotation_rules=catalog.annotation,
    )
