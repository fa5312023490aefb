"""A trained model on disk: its weights and its card, in a folder that can be copied."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from wsi_pipeline.errors import ModelError
from wsi_pipeline.files import replace_atomically
from wsi_pipeline.models.baselines import CAMNet, GradCAMNet
from wsi_pipeline.models.card import CARD_FILE, ModelCard, read_card, write_card
from wsi_pipeline.models.patchnet import PatchNet
from wsi_pipeline.models.vgg16 import VGG16

ARCHITECTURES = {"vgg16": VGG16, "patchnet": PatchNet, "cam": CAMNet, "vgg11": GradCAMNet}


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
            raise ModelError(f"{path}: not the weights that {folder / CARD_FILE} describes")
        weights = load_file(path)
        with torch.device("meta"):  # no random weights that are replaced at once
            module = ARCHITECTURES[card.architecture](**card.arguments)
        module.to_empty(device=device).load_state_dict(weights)
    except (OSError, RuntimeError, TypeError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be loaded as {card.architecture}: {error}") from error
    return module.eval(), card


def copy_model(folder: str | Path, out: str | Path) -> ModelCard:
    """Copy a model, its weights and its card and nothing else; a model in `out` is replaced.

    Parameters
    ----------
    folder, out : path-like
        `out` is made when missing.

    Raises
    ------
    ModelError
        If a file is missing, or the weights are not those that the card describes.
    """
    folder, out = Path(folder), Path(out)
    card = read_card(folder)
    weights = folder / card.weights_file
    try:
        out.mkdir(parents=True, exist_ok=True)
        with replace_atomically(out / card.weights_file) as part:
            shutil.copyfile(weights, part)
            if _sha256(part) != card.weights_sha256:
                raise ModelError(f"{weights}: not the weights that {folder / CARD_FILE} describes")
    except OSError as error:
        raise ModelError(f"{weights}: cannot be copied to {out}: {error}") from error
    write_card(out, card)
    return card


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
