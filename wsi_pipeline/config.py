"""Settings: one frozen section for each stage.

Every field carries its own description, from which `wsi init` writes the commented YAML: there
is no second place where a setting is explained.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.slides.patients import check_patient_rule

Fraction = Annotated[float, Field(ge=0, le=1)]
SplitName = Literal["train", "validation", "test"]
KEEPS_RESULT: dict[str, Any] = {"changes_result": False}
"""Of settings that say how work is done, not what comes out: units do not depend on them."""
Precision = Literal["float32", "bfloat16"]
NULL_PRECISION = "; decided when the run begins, and kept"
MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Section(BaseModel):
    """Base of the sections: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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


class TissueConfig(Section):
    """Tissue mask: what is more coloured than the slide's own glass, then morphology."""

    mpp: float = Field(8.0, gt=0, description="resolution of the mask, um per px")
    min_chroma: Fraction = Field(
        0.045,
        description="tissue passes the colours of light at least this differently, as a share of"
        " the light through the glass; lower finds paler tissue, and dirtier glass",
    )
    drop_ink: bool = Field(
        True,
        description="leave out blue and green ink; false for blue or green stains, such as Masson's"
        " trichrome or Alcian blue",
    )
    closing_um: float = Field(24.0, ge=0, description="radius of the morphological closing")
    min_area_um2: float = Field(10_000.0, ge=0, description="smaller pieces are dropped")
    max_hole_um2: float = Field(40_000.0, ge=0, description="smaller holes are filled")


class TileConfig(Section):
    """The patch grid and the inner-square label."""

    level: int | None = Field(0, ge=0, description="working resolution: a pyramid level, or null")
    mpp: float | None = Field(None, gt=0, description="... or um per px (then level: null)")
    patch_px: int = Field(512, ge=32, description="side of a patch, working px")
    stride_px: int = Field(256, gt=0, description="step between patches, working px")
    inner_px: int = Field(256, gt=0, description="side of the centred square that gives the label")
    gaps: bool = Field(
        False,
        description="whether stride_px may be larger than inner_px: what lies between the inner"
        " squares then gives no patch its label, and lesions there are lost",
    )
    min_tissue: Fraction = Field(
        0.05, description="a patch is indexed if more than this share of its inner square is tissue"
    )
    tissue: TissueConfig = TissueConfig()

    @model_validator(mode="after")
    def _consistent(self):
        if (self.level is None) == (self.mpp is None):
            raise ValueError("give either level or mpp and set the other to null")
        if self.stride_px > self.inner_px and not self.gaps:
            raise ValueError(
                f"stride_px is {self.stride_px} and inner_px {self.inner_px}: annotated pixels"
                " between the inner squares would give no label. Set stride_px to inner_px or less,"
                " or gaps to true"
            )
        try:
            PatchGrid(Bounds(0, 0, 1, 1), 1.0, 1.0, self.patch_px, self.stride_px, self.inner_px)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


class AugmentConfig(Section):
    """Random flips and colour perturbations of the training patches (torchvision's ColorJitter)."""

    flips: bool = Field(True, description="vertical and horizontal, each with probability 1/2")
    brightness: float = Field(0.25, ge=0, description="factor drawn from 1 - b to 1 + b")
    contrast: float = Field(0.25, ge=0)
    saturation: float = Field(0.25, ge=0)
    hue: float = Field(0.04, ge=0, le=0.5, description="shift, share of the colour circle")
    rotate_180: bool = Field(False, description="half a turn, with probability 1/2")
    zoom: float = Field(1.0, ge=1, description="zoom in by a factor drawn from 1 to this")


class PatchNetConfig(Section):
    """PatchNet, when that is the model: small patches within each patch, and its subnet."""

    patch_px: int = Field(31, gt=0, description="side of its patches; the paper has 11 to 31")
    stride_px: int = Field(
        31, gt=0, description="step between them in training, at most their side"
    )
    filters: int = Field(64, gt=0, description="of each convolution")
    layers: int = Field(7, gt=0, description="convolutions")
    padding: Literal["same", "valid"] = Field(
        "same",
        description="same: zeros at each patch's own border in every layer, the paper's; valid:"
        " none, another model whose fine heatmaps cost some 100 times less",
    )

    @model_validator(mode="after")
    def _consistent(self):
        if self.stride_px > self.patch_px:
            raise ValueError(
                f"stride_px is {self.stride_px} and patch_px {self.patch_px}: pixels between"
                " patches would not count"
            )
        if self.padding == "valid" and self.patch_px <= 2 * self.layers:
            raise ValueError(
                f"patch_px is {self.patch_px}: {self.layers} layers without padding need"
                f" {2 * self.layers + 1} or more"
            )
        return self


class TrainConfig(Section):
    """The patch classifier and its schedule; the defaults are the lecture's."""

    name: str = Field(
        "vgg16",
        pattern=MODEL_NAME,
        description="folder of the model's results",
        json_schema_extra=KEEPS_RESULT,
    )
    model: Literal["vgg16", "patchnet", "cam", "vgg11"] = Field(
        "vgg16",
        description="vgg16: the lecture's; patchnet; cam and vgg11: the PatchNet paper's baselines"
        " for CAM and Grad-CAM",
    )
    patchnet: PatchNetConfig = PatchNetConfig()
    weights: str = Field(
        "imagenet",
        description="initial weights: imagenet (vgg16 alone), none, or a .safetensors or .pth file",
    )
    epoch_examples: int = Field(100_000, gt=0, description="sampled examples in an epoch")
    validation_examples: int = Field(
        20_000, gt=0, description="examples drawn once, by the same three steps, for validation"
    )
    max_epochs: int = Field(100, gt=0)
    batch_size: int = Field(32, gt=0, description="over all processes together")
    optimizer: Literal["rmsprop", "adam"] = Field(
        "rmsprop", description="rmsprop: the lecture's; adam: PatchNet's"
    )
    learning_rate: float = Field(5e-5, gt=0)
    alpha: float = Field(0.9, ge=0, lt=1, description="RMSprop's forgetting rho")
    momentum: float = Field(0.9, ge=0, lt=1)
    halve_after: int | None = Field(
        3,
        gt=0,
        description="epochs without a better validation loss until the rate is halved; null: never",
    )
    best_by: Literal["roc_auc", "loss"] = Field(
        "roc_auc", description="the validation measure that tells the best epoch"
    )
    stop_after: int = Field(5, gt=0, description="epochs without a better one until training stops")
    stop_at_accuracy: Fraction | None = Field(
        None, description="training accuracy that stops training, PatchNet's 1; null: none does"
    )
    hard_negatives: Path | None = Field(
        None,
        description="Parquet table slide_id, x, y of patches without tumour that an earlier model"
        " took for tumour, to draw more often; null: none",
    )
    hard_negative_share: Fraction = Field(
        0.25, description="share of the examples without tumour that is drawn from hard_negatives"
    )
    gamma: float | None = Field(
        None,
        gt=0,
        description="gamma correction of the input, values to the power 1 / gamma; PatchNet's 2.2",
    )
    shades_of_gray: float | None = Field(
        None,
        ge=1,
        description="colour constancy of each patch: the Minkowski norm of its illuminant, usually"
        " 6; null: none. Fine heatmaps cannot have it",
    )
    augment: AugmentConfig = AugmentConfig()
    precision: Precision | None = Field(
        None,
        description="float32, or bfloat16: faster where the processor supports it, less exact;"
        " null: bfloat16 on GPUs that support it, float32 on CPUs" + NULL_PRECISION,
    )
    cache: bool = Field(
        False,
        description="read patches from the cache that `wsi cache` makes, not from the slides: the"
        " same pixels; docs/training.md says when it pays",
        json_schema_extra=KEEPS_RESULT,
    )
    loader_workers: int | None = Field(
        None,
        ge=0,
        description="processes that read training patches, and as many that read validation"
        " patches, of each training process; null: for a GPU its share of the cores less two, at"
        " most 16; none on a CPU",
        json_schema_extra=KEEPS_RESULT,
    )
    checkpoint_seconds: float = Field(
        300.0,
        gt=0,
        description="how often the state to resume from is saved within an epoch",
        json_schema_extra=KEEPS_RESULT,
    )
    processes: int | None = Field(
        None, gt=0, description="torchrun processes; null: one for each GPU, or one on the CPU"
    )

    @model_validator(mode="after")
    def _imagenet_is_vgg16s(self):
        if self.weights == "imagenet" and self.model != "vgg16":
            raise ValueError(
                f"weights is imagenet, which there are for vgg16 alone: for {self.model} it must be"
                " none or a file"
            )
        return self


class HeatmapConfig(Section):
    """The model over every indexed patch."""

    splits: tuple[SplitName, ...] = Field(
        ("validation", "test"),
        description="splits whose slides are predicted",
        json_schema_extra=KEEPS_RESULT,
    )
    batch_size: int | None = Field(
        None,
        gt=0,
        description="patches a forward pass; null: 32 on a GPU; 4 on a CPU, where more are no"
        " faster and take 150 MB each at 512 px",
        json_schema_extra=KEEPS_RESULT,
    )
    precision: Precision | None = Field(
        None,
        description="float32, or bfloat16: faster where the processor supports it, less exact;"
        " null: bfloat16 if all workers support it, else float32" + NULL_PRECISION,
    )
    chunk: int = Field(
        16,
        gt=0,
        description="side of a chunk, heatmap px: the slab that a task reads at once; with 32 fewer"
        " tiles lie on edges and are decoded twice, and a killed task loses four times the work",
    )
    ngff: Literal["0.5", "0.4"] = Field("0.5", description="OME-Zarr version")


class FineConfig(Section):
    """PatchNet's fine heatmap, of the slides, precision and OME-Zarr version that heatmap has."""

    stride_px: int = Field(8, gt=0, description="step between heatmap pixels, working px")
    coarse: str | None = Field(
        None,
        pattern=MODEL_NAME,
        description="model whose heatmap says where to look, vgg16 say; null: at every indexed"
        " patch",
    )
    min_probability: Fraction = Field(
        0.5, description="a pixel of the coarse heatmap is suspicious from here on"
    )
    chunk: int = Field(
        128, gt=0, description="side of a chunk, heatmap px: the slab that a task reads at once"
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


class JobsConfig(Section):
    """Dask."""

    scheduler: str | None = Field(
        None, description="tcp://host:port of a running scheduler; null: a LocalCluster"
    )
    workers: int | None = Field(None, gt=0, description="local processes; null: one for each core")
    retries: int = Field(2, ge=0, description="new tries of a unit that kills its worker")
    window: int = Field(4, gt=0, description="units in flight, for each worker thread")


class Config(Section):
    """A run: where it goes, its seed, and a section for each stage."""

    out: Path = Field(description="the run directory; made when missing")
    seed: int = Field(0, ge=0, description="everything random derives from it")
    catalog: CatalogConfig
    tile: TileConfig = TileConfig()
    train: TrainConfig = TrainConfig()
    heatmap: HeatmapConfig = HeatmapConfig()
    fine: FineConfig = FineConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    mine: MineConfig = MineConfig()
    explain: ExplainConfig = ExplainConfig()
    jobs: JobsConfig = JobsConfig()

    @model_validator(mode="after")
    def _patches_within_patches(self):
        inner = self.train.patchnet.patch_px
        if self.train.model == "patchnet" and inner > self.tile.patch_px:
            raise ValueError(
                f"train.patchnet.patch_px is {inner} and tile.patch_px {self.tile.patch_px}:"
                " PatchNet's patches must fit into a patch"
            )
        return self
