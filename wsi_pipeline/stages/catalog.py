"""The catalog: every slide opened once, its size, resolution, annotation and label checked."""

import logging
from dataclasses import dataclass
from itertools import chain

import pandas as pd
from distributed import Client

from wsi_pipeline.config import AnnotationConfig, CatalogConfig, Config
from wsi_pipeline.errors import AnnotationError, CatalogError, SlideError
from wsi_pipeline.files import replace_atomically, write_whole
from wsi_pipeline.jobs.run import Outcome, run_units
from wsi_pipeline.jobs.unit import LargeFile, SmallFile, Unit
from wsi_pipeline.slides.annotations import Annotation
from wsi_pipeline.slides.catalog import read_catalog
from wsi_pipeline.slides.folders import scan_folders
from wsi_pipeline.slides.patients import patient_notes
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.same_slide import copies, slide_fingerprint
from wsi_pipeline.slides.splits import assign_splits
from wsi_pipeline.stages.run_directory import MASK_COLUMNS, SLIDE_COLUMNS, notes_path, slides_path
from wsi_pipeline.stages.slide_annotation import slide_annotation

SCHEMA_VERSION = 2
COPIES_NAMED = 5

logger = logging.getLogger(__name__)


def run(config: Config, client: Client) -> Outcome:
    """Write ``RUN/slides.parquet``: one row a slide, those that failed to open included.

    Columns: ``slide_id, path, annotation, tissue, exclude, patient_id, split`` (strings),
    ``label`` (1 tumour, 0 normal, -1 unknown), ``mpp`` (um per level-0 px), ``width,
    height`` (level-0 px), ``status`` ("ok", "failed": why is in ``RUN/failures.csv``, or "copy":
    the same slide as another). ``RUN/notes.txt`` says where patients come from and what was
    passed over in folders.

    Raises
    ------
    CatalogError
        If the table or the folders contradict themselves, or hold no slide; once all slides were
        opened, if some of them are copies of one slide.
    """
    frame, notes = listed_slides(config)
    notes = _keep_notes(config, [], notes)
    outcome = run_units(
        client,
        (inspection(row, config.catalog) for row in frame.itertuples(index=False)),
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
    notes = _keep_notes(config, notes, same_annotations(outcome.results))
    copied = copies({key: of["fingerprint"] for key, of in outcome.results.items()})
    kept = config.catalog.copies == "keep"
    frame = frame.drop(columns=["label", "mpp"]).merge(found, on="slide_id", how="left")
    frame["status"] = frame["width"].notna().map({True: "ok", False: "failed"})
    if not kept:
        frame.loc[frame["slide_id"].isin(list(chain(*copied))), "status"] = "copy"
    frame = frame.astype({"label": "Int8", "width": "Int64", "height": "Int64"})
    with replace_atomically(slides_path(config.out)) as path:
        frame[[*SLIDE_COLUMNS, *MASK_COLUMNS]].to_parquet(path, index=False)
    if kept:
        _keep_notes(config, notes, copied_slides(outcome.results, frame))
    else:
        _refuse_copies(copied_slides(outcome.results, frame))
    return outcome


def _keep_notes(config: Config, notes: list[str], new: list[str]) -> list[str]:
    """Log the new notes and write all of them; they are given back together."""
    for note in new:
        logger.info("note: %s", note)
    together = [*notes, *new]
    write_whole(
        notes_path(config.out),
        "".join(f"{note}\n" for note in together).encode(errors="backslashreplace"),
    )
    return together


def same_annotations(results: dict[str, dict]) -> list[str]:
    """Note slides whose annotations are copies of one file; those without a lesion may be."""
    drawn = {slide_id: of["annotation"] for slide_id, of in results.items() if of["lesions"]}
    return [
        f"the annotations of the slides {_listed(slide_ids)} have the same content: lesions of one"
        " slide rarely fit another"
        for slide_ids in copies(drawn)
    ]


def copied_slides(results: dict[str, dict], frame: pd.DataFrame) -> list[str]:
    """A sentence for each group of slides whose files have the same content."""
    path_of = dict(zip(frame["slide_id"], frame["path"], strict=True))
    return [
        f"copies of one slide: {_listed([f'{one} ({path_of[one]})' for one in group])}"
        for group in copies({key: of["fingerprint"] for key, of in results.items()})
    ]


def _refuse_copies(copied: list[str]):
    if copied:
        raise CatalogError(
            f"{'; '.join(copied[:COPIES_NAMED])} (slides that have copies: {len(copied)}). Keep one"
            " of each: copies in two splits leak, and copies in one split count twice."
            " slides.parquet marks all of them 'copy'"
        )


def _listed(names: list[str]) -> str:
    more = len(names) - COPIES_NAMED
    return ", ".join(names[:COPIES_NAMED]) + (f" and {more} more" if more > 0 else "")


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
            ``width, height`` (level-0 px), ``mpp``, ``label``, ``lesions`` (their number),
            ``notes`` (what was repaired or passed over in the annotation, and ``doubts``: why the
            label may not be what its author meant), and what is the same for copies:
            ``fingerprint`` of the slide, ``annotation`` (None without one).
        """
        with _open(self.slide.path, self.mpp, self.default_mpp) as slide:
            found = slide_annotation(slide, self.annotation, self.annotation_rules)
            width, height = slide.size
            label, doubts = self._label(found)
            doubts = [*found.doubts, *doubts]
            notes = [*found.notes, *doubts]
            if label == 0 and self.label is None and self.annotation and found.state == "nothing":
                notes.append("nothing is drawn in its annotation: normal, by catalog.unannotated")
            return {
                "width": width,
                "height": height,
                "mpp": slide.mpp,
                "label": label,
                "lesions": len(found.lesions),
                "notes": notes,
                "doubts": doubts,
                "fingerprint": slide_fingerprint(slide),
                "annotation": self.annotation.state if self.annotation else None,
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
        if self.unannotated == "normal":
            return 0, []
        as_told = "nothing is drawn in its annotation: unknown, by catalog.unannotated"
        return -1, [as_told] if file else []


def _open(path: str, mpp: float | None, default_mpp: float | None) -> Slide:
    """Open a slide at the resolution of the table, else its own, else the default."""
    try:
        return Slide(path, mpp)
    except SlideError:
        if mpp is not None or default_mpp is None:
            raise
        return Slide(path, default_mpp)


def listed_slides(config: Config) -> tuple[pd.DataFrame, list[str]]:
    """The slides with their patients and splits, and notes on the catalog as a whole."""
    catalog = config.catalog
    notes: list[str] = []
    if catalog.csv is not None:
        frame = read_catalog(catalog.csv, catalog.patient_from)
    else:
        frame, notes = scan_folders(
            catalog.slides, catalog.annotations, catalog.tissue, catalog.exclude,
            patient_from=catalog.patient_from,
        )  # fmt: skip
    if catalog.patient_from is not None:  # null: each slide is its own patient, as told
        notes += patient_notes(frame)
    shares: dict[str, float] = dict(catalog.split.items())
    if frame["split"].isna().all():
        return assign_splits(frame, shares, config.seed), notes
    shares = _train_shares(shares)
    splits = set(frame["split"])
    if shares and "train" in splits and "validation" not in splits:
        drawn = frame["split"] == "train"
        unsplit = frame[drawn].assign(split=pd.NA)
        frame.loc[drawn, "split"] = assign_splits(unsplit, shares, config.seed)["split"]
        notes.append("no slide is in the validation split: its patients are drawn from train")
    return frame, notes


def _train_shares(split: dict[str, float]) -> dict[str, float]:
    """The shares of train and validation among these two, where both are wanted."""
    shares = {name: split.get(name, 0) for name in ("train", "validation")}
    total = sum(shares.values())
    return {k: v / total for k, v in shares.items()} if all(shares.values()) else {}


def inspection(row, catalog: CatalogConfig) -> InspectSlide:
    """The unit that looks at a row of `listed_slides`."""
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
