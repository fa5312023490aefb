"""The catalog: every slide opened once, its size, resolution, annotation and label checked."""

import logging
from dataclasses import dataclass

import pandas as pd
from distributed import Client

from wsi_pipeline.config import AnnotationConfig, CatalogConfig, Config
from wsi_pipeline.errors import CatalogError, SlideError
from wsi_pipeline.files import replace_atomically
from wsi_pipeline.jobs.run import Outcome, run_units
from wsi_pipeline.jobs.unit import LargeFile, SmallFile, Unit
from wsi_pipeline.slides.annotations import Annotation, read_annotation, uses_bounds_origin
from wsi_pipeline.slides.catalog import assign_splits, read_catalog, scan_folders
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages.run_directory import MASK_COLUMNS, SLIDE_COLUMNS, slides_path

SCHEMA_VERSION = 1

logger = logging.getLogger(__name__)


def run(config: Config, client: Client) -> Outcome:
    """Write ``RUN/slides.parquet``: one row a slide, those that failed to open included.

    Columns: ``slide_id, path, annotation, tissue, exclude, patient_id, split`` (strings),
    ``label`` (1 tumour, 0 normal, -1 unknown), ``mpp`` (um per level-0 px), ``width,
    height`` (level-0 px), ``status`` ("ok" or "failed"; why is in ``RUN/failures.csv``).

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
        frame[[*SLIDE_COLUMNS, *MASK_COLUMNS]].to_parquet(path, index=False)
    return outcome


def slide_annotation(slide: Slide, file: SmallFile | None, rules: AnnotationConfig) -> Annotation:
    """A slide's annotation in its level-0 px; an empty one where there is no file."""
    if file is None:
        return Annotation(lesions=(), repairs=(), ignored={})
    from_bounds = (
        uses_bounds_origin(file.path) if rules.origin == "auto" else rules.origin == "bounds"
    )
    offset = (slide.bounds.x, slide.bounds.y) if from_bounds else (0, 0)
    return read_annotation(
        file.path,
        positive=rules.positive,
        exclusion=rules.exclusion,
        offset=offset,
        size=slide.size,
    )


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
            return {
                "width": width,
                "height": height,
                "mpp": slide.mpp,
                "label": self._label(len(found.lesions)),
                "lesions": len(found.lesions),
                "notes": found.notes,
            }

    def _label(self, lesions: int) -> int:
        if self.label == 0 and lesions:
            raise CatalogError(
                f"{self.annotation.path} holds lesions ({lesions}), but the catalog's label of its"
                " slide is 0"
            )
        if self.label is not None:
            return self.label
        if self.annotation is not None:
            return int(lesions > 0)
        return 0 if self.unannotated == "normal" else -1


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
        frame = scan_folders(catalog.slides, catalog.annotations, catalog.tissue, catalog.exclude)
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
