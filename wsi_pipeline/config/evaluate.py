"""Settings of what is made of heatmaps: evaluation, hard negatives, explanations."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from wsi_pipeline.config.section import (
    Fraction,
    Section,
)


class DetectionConfig(Section):
    """Detections from the heatmaps: the candidates of CAMELYON16's FROC."""

    method: Literal["peaks", "components"] = Field(
        "peaks",
        description="peaks: the highest cells, none within radius_um of a higher one that is kept;"
        " components: the highest cell of each connected group",
    )
    radius_um: float = Field(
        150.0,
        ge=0,
        description="nothing else is kept around a peak: less gives more false positives from one"
        " place, more hides small lesions beside a larger one",
    )
    min_probability: Fraction = Field(0.1, description="cells from here on are candidates")


class EvaluateConfig(Section):
    """Patch metrics, slide accuracy, FROC, report."""

    patch_threshold: Fraction = Field(0.75, description="a patch is called positive from here on")
    false_positives: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.25, 0.5, 1, 2, 4, 8),
        min_length=1,
        description="average false positives at which FROC is read off, rising",
    )
    replicates: int = Field(
        2000,
        gt=0,
        description="resampled cohorts behind the 95 % intervals (bootstrap of patients)",
    )
    thumbnail_px: int = Field(640, gt=0, description="longest side of the report's slide pictures")
    gallery: int = Field(
        40, ge=0, description="lesions, and false positives, shown in pictures of their own"
    )
    detections: DetectionConfig = DetectionConfig()

    @field_validator("false_positives")
    @classmethod
    def _rising(cls, points):
        if list(points) != sorted(set(points)):
            raise ValueError("they must rise")
        return points


class MineConfig(Section):
    """Hard negatives from the validation split, for `train.hard_negatives` of another training."""

    patients: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="share of the validation patients that are mined; another training that uses"
        " them validates on the others alone",
    )
    count: int = Field(2000, gt=0, description="hard negatives at most, the most probable first")
    min_probability: Fraction = Field(
        0.5, description="a patch without tumour is mined from here on"
    )


class ExplainConfig(Section):
    """Explanations: why a patch was called positive."""

    methods: tuple[str, ...] | None = Field(
        None, description="methods by name, see docs/explanations.md; null: all that fit the model"
    )
    layer: str | None = Field(
        None,
        description="layer that grad_cam, clear and attentive_response_map look at, features.28"
        " say; null: the last convolution",
    )
    top: int = Field(
        3,
        gt=0,
        description="places of each kind: worst false positives, missed lesions, best hits",
    )
    patches: int = Field(
        20, ge=0, description="annotated test patches that rank the methods; 0: no ranking"
    )
    trust_patches: int = Field(
        3, ge=0, description="of these, patches for the trust checks, which take longest; 0: none"
    )
