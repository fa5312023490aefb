"""Settings of the slides, their annotations and patients."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from wsi_pipeline.config.section import (
    Fraction,
    Section,
    SplitName,
)
from wsi_pipeline.slides.patients import check_patient_rule


class AnnotationConfig(Section):
    """Which annotated shapes are tumour."""

    positive: tuple[str, ...] = Field(
        ("_0", "_1", "Tumor", "Tumour", "metastases", ""),
        description="groups or classes that are tumour, case ignored; '' is a shape without one,"
        " in a file in which no shape has a name",
    )
    exclusion: tuple[str, ...] = Field(
        ("_2", "Exclusion"), description="groups or classes cut out of the tumour"
    )
    ignored: tuple[str, ...] = Field(
        (),
        description="groups or classes that are known and not tumour: a slide with nothing else"
        " drawn counts as one without annotation",
    )
    origin: Literal["auto", "slide", "bounds", "lower left"] = Field(
        "auto",
        description="what annotation coordinates count from: the level-0 frame (slide), the"
        " scanned bounds (bounds), the frame's lower left corner with y upwards (lower left,"
        " Cytomine's), or auto: bounds for QuPath's GeoJSON, slide for all else",
    )
    scale: Annotated[float, Field(gt=0)] | Literal["um"] = Field(
        1.0,
        description="level-0 px of a unit of annotation coordinates, more than 1 where they are a"
        " coarser level's; um: they are micrometres",
    )
    min_on_tissue: Fraction = Field(
        0.1,
        description="a slide is refused where less than this share of its lesions lies on tissue:"
        " they count from elsewhere, or are another slide's; 0 refuses none",
    )

    @model_validator(mode="after")
    def _one_meaning(self):
        lists = {"positive": self.positive, "exclusion": self.exclusion, "ignored": self.ignored}
        meant: dict[str, str] = {}
        for of, names in lists.items():
            for name in names:
                if (other := meant.setdefault(name.casefold(), of)) != of:
                    raise ValueError(f"the class {name!r} is both in {other} and in {of}")
        return self


class CatalogConfig(Section):
    """The slides, their annotations and patients."""

    csv: Path | None = Field(
        None,
        description="table of slides: slide_id, path and optionally annotation, tissue, exclude,"
        " patient_id, split, label (1 tumour, 0 normal), mpp; its paths count from its own folder",
    )
    slides: Path | None = Field(None, description="instead of csv: a folder of slides")
    annotations: Path | None = Field(
        None, description="with slides: a folder of annotations named as the slides are"
    )
    patient_from: str | None = Field(
        "auto",
        description="patient of a slide without patient_id: auto (from names of TCGA, CPTAC, GTEx"
        " and CAMELYON17 slides, else each slide is its own patient), null (its own), or from every"
        " such slide id: tcga, cptac, gtex, camelyon17, or a regular expression with one group,"
        " such as '^([^_]+)_'",
    )
    tissue: Path | None = Field(
        None,
        description="with slides: a folder of tissue masks made elsewhere (PNG, TIFF or GeoJSON),"
        " named as the slides are; each takes the place of the pipeline's own mask",
    )
    exclude: Path | None = Field(
        None,
        description="with slides: a folder of masks of what to leave out (pen marks, artefacts),"
        " named as the slides are",
    )
    tissue_values: tuple[int, ...] | None = Field(
        None,
        description="pixel values of tissue mask images that are tissue; null: all but 0. GrandQC's"
        " tissue masks have [0]",
    )
    exclude_values: tuple[int, ...] | None = Field(
        None,
        description="pixel values of exclude images that are left out; null: all but 0. GrandQC's"
        " artefact masks have [2, 3, 4, 5, 6]",
    )
    unannotated: Literal["unknown", "normal"] = Field(
        "unknown",
        description="a slide without label, and without annotation or with an empty one:"
        " 'unknown' is predicted but never trained on or evaluated, 'normal' holds no tumour"
        " (CAMELYON's way)",
    )
    mpp: float | None = Field(
        None,
        gt=0,
        description="um per level-0 px of slides that do not state their own (a value in the"
        " table's mpp column wins over what a slide states)",
    )
    copies: Literal["refuse", "keep"] = Field(
        "refuse",
        description="slide files with the same content: refuse, since copies leak between splits"
        " and count twice; keep, where nothing is trained or evaluated",
    )
    split: dict[SplitName, Fraction] = Field(
        {"train": 0.7, "validation": 0.1, "test": 0.2},
        description="shares of the patients when the table has no split column; where it has one"
        " without validation, that split is drawn from train",
    )
    annotation: AnnotationConfig = AnnotationConfig()

    _known_rule = field_validator("patient_from")(check_patient_rule)

    @model_validator(mode="after")
    def _one_source(self):
        if (self.csv is None) == (self.slides is None):
            raise ValueError("give either csv or slides, one of the two")
        for name in ("annotations", "tissue", "exclude"):
            if getattr(self, name) is not None and self.slides is None:
                raise ValueError(f"{name} is a folder that goes with slides")
        if abs(sum(self.split.values()) - 1) > 1e-6:
            raise ValueError(f"the shares of split add up to {sum(self.split.values())}, not 1")
        return self
