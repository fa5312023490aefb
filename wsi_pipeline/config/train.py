"""Settings of training: the model, its schedule, its augmentation."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from wsi_pipeline.config.section import (
    KEEPS_RESULT,
    MODEL_NAME,
    NULL_PRECISION,
    Fraction,
    Precision,
    Section,
)
from wsi_pipeline.models.card import ARCHIVES, NAMED_WEIGHTS, OURS, TIMM, is_architecture

Spread = Annotated[float, Field(gt=0)]


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
    model: str = Field(
        "vgg16",
        description="vgg16: the lecture's; patchnet; cam and vgg11: the PatchNet paper's baselines"
        " for CAM and Grad-CAM; timm:NAME: a network of the library timm with the lecture's head;"
        " module:function: your own. See docs/models.md",
    )
    patchnet: PatchNetConfig = PatchNetConfig()
    arguments: dict[str, Any] = Field(
        {}, description="keyword arguments of timm's network or of your own function"
    )
    pooling: Literal["max", "average"] = Field(
        "max", description="global pooling before the head of a timm network"
    )
    tumour_class: int | None = Field(
        None,
        ge=0,
        description="column of tumour, from 0 on, where your own network returns classes; null: 1"
        " of two",
    )
    mean: tuple[float, float, float] | None = Field(
        None,
        description="red, green and blue that the input's colours are centred on, of 0 to 1; null:"
        " timm's own for its networks, ImageNet's for all others",
    )
    std: tuple[Spread, Spread, Spread] | None = Field(
        None, description="what the centred colours are divided by; null: as for mean"
    )
    weights: str = Field(
        "imagenet",
        description="initial weights: imagenet (vgg16 alone), pretrained (timm networks, from their"
        " hub), none, or a .safetensors or .pth file",
    )
    freeze: bool = Field(
        False, description="train the head alone; the network before it keeps its initial weights"
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

    @property
    def weights_path(self) -> Path | None:
        """The file of the initial weights, where they are one."""
        return None if self.weights in NAMED_WEIGHTS else Path(self.weights)

    @model_validator(mode="after")
    def _model_is_known(self):
        if self.model in ARCHIVES or not is_architecture(self.model):
            raise ValueError(
                f"model is {self.model!r}: it must be {', '.join(OURS)}, timm:NAME or"
                " module:function"
            )
        if self.model in OURS and self.arguments:
            raise ValueError(
                f"arguments are for networks of timm and for your own: {self.model} takes none"
            )
        one_logit = self.model in OURS or self.model.startswith(TIMM)
        if one_logit and self.tumour_class is not None:
            raise ValueError(f"tumour_class is for networks with classes: {self.model} has none")
        return self

    @model_validator(mode="after")
    def _weights_fit_the_model(self):
        if self.weights == "imagenet" and self.model != "vgg16":
            also = ", pretrained" if self.model.startswith(TIMM) else ""
            raise ValueError(
                f"weights is imagenet, which there are for vgg16 alone: for {self.model} it must be"
                f" none{also} or a file"
            )
        if self.weights == "pretrained" and not self.model.startswith(TIMM):
            raise ValueError(
                f"weights is pretrained, which is for networks of timm: for {self.model} it must be"
                " none or a file"
            )
        return self
