"""A model's card, ``model.json``: how to rebuild it, prepare its input and read its output.

It is read without torch.
"""

import json
import re
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from wsi_pipeline.errors import ModelError
from wsi_pipeline.files import replace_atomically

OURS = ("vgg16", "patchnet", "cam", "vgg11")
TIMM = "timm:"
"""What the architecture of one of timm's networks begins with; its name follows."""
ARCHIVES = ("pt2", "onnx")
"""Networks in a file of their own format, with their weights: for inference alone."""
CARD_FILE = "model.json"
NAMED_WEIGHTS = ("imagenet", "none", "pretrained")
"""Start weights of a training that are not a file."""
MODULE_AND_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

Probability = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class NetworkOutput:
    """What a network returns for N patches, and which of it is tumour.

    Parameters
    ----------
    kind : {"logit", "probability"}
    tumour_class : int or None
        Of an output (N, C), the column that is tumour: its softmax is F. None: the output is
        (N,) or (N, 1), and its sigmoid is F.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Literal["logit", "probability"] = "logit"
    tumour_class: Annotated[int, Field(ge=0)] | None = None


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Probabilities from which on a slide or a patch is called tumour; None: not chosen.

    Parameters
    ----------
    slide : float or None
        The t of the highest accuracy on validation slides.
    patch : float or None
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    slide: float | None = None
    patch: Probability | None = None


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """How to rebuild a model, prepare its input and read its output, and where it comes from.

    Parameters
    ----------
    architecture : str
        One of `OURS`; ``timm:NAME``; ``module:function``, a factory of the network; or one of
        `ARCHIVES`.
    name : str
        What the model is called; "" is the name of its folder.
    arguments : dict
        Keyword arguments of the network's constructor.
    mean, std : tuple of float
        Red, green, blue; of pixel values scaled to 0..1. Input is ``(rgb / 255 - mean) / std``,
        colours corrected before the mean is taken off where `gamma` or `shades_of_gray` say so.
    patch_px : int
        Side of the patches trained on, working px.
    mpp : float
        Micrometres per working px of the patches trained on.
    gamma : float or None
        Of the gamma correction (`colour.correct_gamma`); None: there is none.
    shades_of_gray : float or None
        The power p of the colour constancy (`colour.shades_of_gray`); None: there is none.
    output : NetworkOutput
    precision : {"float32", "bfloat16"} or None
        Of the training's computations; None: not known.
    tiling : dict
        How slides were tiled for the training, where that is known: ``stride_px``, ``inner_px``,
        ``min_tissue`` and ``tissue`` as in the settings' section ``tile``.
    thresholds : Thresholds
        Chosen by an evaluation.
    evaluation : dict
        Figures of that evaluation; empty without one.
    training : dict
        JSON-able summary: best epoch, its metrics, seed, settings, slides and patients.
    versions : dict
        Of the libraries that made it.
    weights_sha256 : str
        Of the weights' file: a pair that does not belong together is not loaded.
    format_version : int
        Of this description.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    architecture: str
    name: str = ""
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    patch_px: PositiveInt
    mpp: PositiveFloat
    gamma: float | None = None
    shades_of_gray: float | None = None
    output: NetworkOutput = NetworkOutput()
    precision: Precision | None = None
    arguments: dict = field(default_factory=dict)
    tiling: dict = field(default_factory=dict)
    thresholds: Thresholds = Thresholds()
    evaluation: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: _versions())
    weights_sha256: str = ""
    format_version: Literal[1] = 1

    @property
    def archived(self) -> bool:
        """Whether the network is an archive: it cannot be trained, and computes in float32."""
        return self.architecture in ARCHIVES

    @property
    def weights_file(self) -> str:
        """Name of the file of the weights, in the model's folder."""
        return f"model.{self.architecture if self.archived else 'safetensors'}"

    @property
    def normalisation(self) -> dict:
        """How pixels become input: the keyword arguments of `normalise` and of `predictor`."""
        return {
            "mean": self.mean,
            "std": self.std,
            "gamma": self.gamma,
            "shades_of_gray": self.shades_of_gray,
        }


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("wsi_pipeline", "torch", "torchvision")}


def with_version(card: ModelCard, library: str) -> ModelCard:
    """A card that states the version of one more library that made the model."""
    return replace(card, versions={**card.versions, library: version(library)})


def write_card(folder: str | Path, card: ModelCard) -> None:
    """Write a model's card, atomically: with weights of its hash beside it, it is a model."""
    with replace_atomically(Path(folder) / CARD_FILE) as part:
        part.write_text(json.dumps(asdict(card), indent=2) + "\n")


def read_card(folder: str | Path) -> ModelCard:
    """Read a saved model's card without its weights.

    Raises
    ------
    ModelError
        If it is missing, damaged, or of an architecture that this version does not know.
    """
    path = Path(folder) / CARD_FILE
    try:
        card = TypeAdapter(ModelCard).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist: run `wsi train` first, or see train.name"
        ) from None
    except ValidationError as error:
        raise ModelError(f"{path}: no readable model description: {_explain(error)}") from error
    except OSError as error:
        raise ModelError(f"{path}: no readable model description: {error}") from error
    if not is_architecture(card.architecture):
        known = ", ".join((*OURS, *ARCHIVES, "timm:NAME", "module:function"))
        raise ModelError(f"{path}: architecture {card.architecture!r} is not one of {known}")
    return card


def is_architecture(name: str) -> bool:
    """Whether a name is that of an architecture, as far as its form tells."""
    if name.startswith(TIMM):
        return name != TIMM
    return name in (*OURS, *ARCHIVES) or bool(MODULE_AND_FUNCTION.fullmatch(name))


def _explain(error: ValidationError) -> str:
    """Each broken rule in a few words: where, and what."""
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or 'the file'}: {_rule(item)}" for item in error.errors()
    )


def _rule(item: ErrorDetails) -> str:
    if item["type"] == "missing" and item["loc"] == ("mpp",):
        return (
            "it is missing. It is the um per px of the patches that the model was trained on. Add"
            ' it to the file, as in "mpp": 0.5'
        )
    return item["msg"]
