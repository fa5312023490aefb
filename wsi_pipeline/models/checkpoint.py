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
from wsi_pipeline.models.architectures import CLASSES, build_network
from wsi_pipeline.models.archive import open_archive
from wsi_pipeline.models.card import CARD_FILE, OURS, ModelCard, read_card, write_card
from wsi_pipeline.models.model_folder import file_kind, refuse_unsafe


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
    weights = _each_by_itself(module.state_dict())
    with replace_atomically(folder / "model.safetensors") as part:
        save_file(weights, part)
        card = replace(card, weights_sha256=sha256(part))
    write_card(folder, card)
    return card


def _each_by_itself(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights on the CPU; those that share memory, which safetensors refuses, as copies."""
    weights: dict[str, torch.Tensor] = {}
    memory: set[int] = set()
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        weights[key] = value.clone() if place in memory else value
        memory.add(place)
    return weights


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
        If a file is missing or damaged, the two do not belong together, the weights are not of the
        card's architecture, or that cannot be built here.
    """
    folder = Path(folder)
    card = read_card(folder)
    path = folder / card.weights_file
    _check_hash(path, card, folder)
    if card.archived:
        return open_archive(
            path, card.architecture, patch_px=card.patch_px, output=card.output, device=device
        ), card
    try:
        module = _empty_network(card, device)
        module.load_state_dict(load_file(path))
    except (OSError, RuntimeError, TypeError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be loaded as {card.architecture}: {error}") from error
    return module.to(device).eval(), card


def _check_hash(path: Path, card: ModelCard, folder: Path) -> None:
    try:
        found = sha256(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be loaded as {card.architecture}: {error}") from error
    if found != card.weights_sha256:
        refuse_unsafe(path, file_kind(path))
        raise ModelError(f"{path}: not the weights that {folder / CARD_FILE} describes")


def _empty_network(card: ModelCard, device: torch.device | str) -> nn.Module:
    """The card's network, its weights still to be loaded."""
    if card.architecture in OURS:
        with torch.device("meta"):  # no random weights that are replaced at once
            module = CLASSES[card.architecture](**card.arguments)
        return module.to_empty(device=device)
    # Others may hold tensors that are not among their weights: these are made on the CPU.
    return build_network(card.architecture, card.arguments, card.output)


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
            if sha256(part) != card.weights_sha256:
                raise ModelError(f"{weights}: not the weights that {folder / CARD_FILE} describes")
    except OSError as error:
        raise ModelError(f"{weights}: cannot be copied to {out}: {error}") from error
    write_card(out, card)
    return card


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
