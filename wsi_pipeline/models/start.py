"""A model ready for training: random weights, ImageNet's, or those of a file."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.checkpoint import ARCHITECTURES
from wsi_pipeline.models.vgg16 import IMAGENET, VGG16
from wsi_pipeline.seeds import derived_seed


def start_model(
    architecture: str, weights: str | Path, *, arguments: dict | None = None, seed: int = 0
) -> nn.Module:
    """Build a model with the weights that its training starts from.

    Parameters
    ----------
    architecture : str
        A key of `ARCHITECTURES`.
    weights : str or path-like
        ``"none"``: random. ``"imagenet"``, for VGG16 alone: torchvision's, downloaded once
        (torch's hub cache, ``TORCH_HOME``). Or a file: ``.safetensors``, ``.pth`` or ``.pt`` with
        a model of ours; for VGG16 also torchvision's state dict of it, or only its ``features``:
        without a dense unit in the file, that unit stays at its start.
    arguments : dict, optional
        Keyword arguments of the architecture's constructor.
    seed : int
        Of what starts at random. torch's global generator is left as it was.

    Raises
    ------
    ModelError
        If the download fails, or the file is missing, damaged, or of another network.
    """
    if weights == "imagenet" and architecture != "vgg16":
        raise ModelError(
            f"train.weights is imagenet, which there are for vgg16 alone: for {architecture} it"
            " must be none or a file"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed, "weights"))
        module = ARCHITECTURES[architecture](**(arguments or {}))
    if weights == "none":
        return module
    state = _download_imagenet() if weights == "imagenet" else _read_state(Path(weights))
    try:
        module.load_state_dict(_of_vgg16(state, module) if architecture == "vgg16" else state)
    except RuntimeError as error:  # its message lists the keys missing, unknown, of other shape
        source = IMAGENET.url if weights == "imagenet" else weights
        raise ModelError(f"{source}: does not fit {architecture}: {error}") from error
    return module


def _download_imagenet() -> dict[str, torch.Tensor]:
    try:
        return IMAGENET.get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash differs
        file_name = IMAGENET.url.rsplit("/", 1)[-1]
        raise ModelError(
            f"ImageNet weights could not be downloaded from {IMAGENET.url}: {error}."
            f" Download {file_name} on a machine that can, copy it here and set train.weights"
            " to its path"
        ) from error


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ModelError(
            f"{path}: no such file; weights are imagenet, none, or a .safetensors or .pth file"
        )
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ModelError(f"{path}: weights must be a .safetensors, .pth or .pt file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as weights: {error}") from error
    if not isinstance(state, dict):
        raise ModelError(f"{path}: holds {type(state).__name__}, not a state dict")
    return state


def _of_vgg16(state: dict[str, torch.Tensor], module: VGG16) -> dict[str, torch.Tensor]:
    """A state dict of torchvision's, or of its features alone, as one of ours."""
    if not any(key.startswith("features.") for key in state):
        state = {f"features.{key}": value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    if not any(key.startswith("head.") for key in state):
        state |= {f"head.{key}": value for key, value in module.head.state_dict().items()}
    return state
