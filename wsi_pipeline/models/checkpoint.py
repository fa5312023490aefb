"""A trained model on disk: ``model.safetensors`` (weights) and ``model.json`` (its card)."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from pydantic import ConfigDict, PositiveFloat, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from wsi_pipeline.errors import ModelError
from wsi_pipeline.files import replace_atomically
from wsi_pipeline.models.baselines import CAMNet, GradCAMNet
from wsi_pipeline.models.patchnet import PatchNet
from wsi_pipeline.models.precision import Precision
from wsi_pipeline.models.vgg16 import VGG16

ARCHITECTURES = {"vgg16": VGG16, "patchnet": PatchNet, "cam": CAMNet, "vgg11": GradCAMNet}


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("wsi_pipeline", "torch", "torchvision")}


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """How to rebuild a model and prepare its input, and where it comes from.

    Parameters
    ----------
    architecture : str
        A key of `ARCHITECTURES`.
    arguments : dict
        Keyword arguments of its constructor.
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
    precision : {"float32", "bfloat16"} or None
        Of the training's computations; None: an earlier version did not say.
    training : dict
        JSON-able summary: best epoch, its metrics, seed, settings.
    versions : dict
        Of the libraries that trained it.
    weights_sha256 : str
        Of ``model.safetensors``, filled by `save_model`: a pair that does not belong together
        is not loaded.
    format_version : int
        Of this description.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    architecture: str
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    patch_px: int
    mpp: float
    gamma: float | None = None
    shades_of_gray: float | None = None
    precision: Precision | None = None
    arguments: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=_versions)
    weights_sha256: str = ""
    format_version: Literal[1] = 1

    @property
    def normalisation(self) -> dict:
        """How pixels become input: the keyword arguments of `normalise` and of `predictor`."""
        return {
            "mean": self.mean,
            "std": self.std,
            "gamma": self.gamma,
            "shades_of_gray": self.shades_of_gray,
        }


def save_model(folder: str | Path, module: nn.Module, card: ModelCard) -> ModelCard:
    """Write ``model.safetensors`` and ``model.json``, each atomically.

    Parameters
    ----------
    folder : path-like
        Made when missing; a model in it is replaced.
    module : nn.Module
        Of the card's architecture, on any device.
    card : ModelCard

    Returns
    -------
    ModelCard
        With the hash of the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.cpu().contiguous() for key, value in module.state_dict().items()}
    with replace_atomically(folder / "model.safetensors") as part:
        save_file(weights, part)
        card = replace(card, weights_sha256=_sha256(part))
    write_card(folder, card)
    return card


def write_card(folder: str | Path, card: ModelCard) -> None:
    """Write a model's card, atomically: with weights of its hash beside it, it is a model."""
    with replace_atomically(Path(folder) / "model.json") as part:
        part.write_text(json.dumps(asdict(card), indent=2) + "\n")


def load_model(
    folder: str | Path, device: torch.device | str = "cpu"
) -> tuple[nn.Module, ModelCard]:
    """Rebuild a saved model, in evaluation mode.

    Parameters
    ----------
    folder : path-like
    device : torch.device or str

    Raises
    ------
    ModelError
        If a file is missing or damaged, the two do not belong together, or the weights are not
        of the card's architecture.
    """
    folder = Path(folder)
    card = read_card(folder)
    path = folder / "model.safetensors"
    try:
        if _sha256(path) != card.weights_sha256:
            raise ModelError(f"{path}: not the weights that {folder / 'model.json'} describes")
        weights = load_file(path)
        with torch.device("meta"):  # no random weights that are replaced at once
            module = ARCHITECTURES[card.architecture](**card.arguments)
        module.to_empty(device=device).load_state_dict(weights)
    except (OSError, RuntimeError, TypeError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be loaded as {card.architecture}: {error}") from error
    return module.eval(), card


def read_card(folder: str | Path) -> ModelCard:
    """Read a saved model's card without its weights.

    Raises
    ------
    ModelError
        If it is missing, damaged, or of an architecture that this version does not know.
    """
    path = Path(folder) / "model.json"
    try:
        card = TypeAdapter(ModelCard).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist: run `wsi train` first, or see train.name"
        ) from None
    except (OSError, ValidationError) as error:
        raise ModelError(f"{path}: no readable model description: {error}") from error
    if card.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"{path}: architecture {card.architecture!r} is not one of {known}")
    return card


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
