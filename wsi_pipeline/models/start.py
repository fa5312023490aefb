"""A model ready for training: random weights, pretrained ones, or those of a file."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.architectures import build_network
from wsi_pipeline.models.card import NAMED_WEIGHTS, TIMM, NetworkOutput
from wsi_pipeline.models.timm_backbone import TimmBackbone, features_of_file, pretrained_features
from wsi_pipeline.models.vgg16 import IMAGENET, VGG16
from wsi_pipeline.seeds import derived_seed

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def start_model(
    architecture: str,
    weights: str | Path,
    *,
    arguments: dict | None = None,
    output: NetworkOutput | None = None,
    freeze: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Build a model with the weights that its training starts from.

    Parameters
    ----------
    architecture : str
        As for `build_network`, and ``timm:hf-hub:NAME``.
    weights : str or path-like
        - ``"none"``: random.
        - ``"imagenet"``, for VGG16 alone: torchvision's, downloaded once (torch's hub cache,
          ``TORCH_HOME``).
        - ``"pretrained"``, for networks of timm alone: those that timm downloads.
        - A file: ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` with a model of ours. For VGG16
          also torchvision's state dict of it, or only its ``features``; for a network of timm also
          timm's state dict of it. Without a dense unit in the file, that unit stays at its start.
    arguments : dict, optional
        Keyword arguments of the network's class or function.
    output : NetworkOutput, optional
        As for `build_network`.
    freeze : bool
        Train the head alone, see `freeze_all_but_head`.
    seed : int
        Of what starts at random. torch's global generator is left as it was.

    Raises
    ------
    ModelError
        If the network cannot be built or frozen, the download fails, or the file is missing,
        damaged, or of another network.
    """
    arguments = arguments or {}
    if weights == "imagenet" and architecture != "vgg16":
        raise ModelError(
            f"train.weights is imagenet, which there are for vgg16 alone: for {architecture} it"
            " must be none or a file"
        )
    if weights == "pretrained" and not architecture.startswith(TIMM):
        raise ModelError(
            "train.weights is pretrained. That is for networks of timm (train.model timm:NAME). For"
            f" {architecture} it must be none or a file"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed, "weights"))
        module = build_network(architecture, arguments, output)
    if weights != "none":
        _load(module, _start_weights(architecture, weights, arguments), architecture, weights)
    if freeze:
        freeze_all_but_head(module, architecture)
    return module


def freeze_all_but_head(module: nn.Module, architecture: str) -> None:
    """Leave only the weights of a model's ``head`` to training.

    Raises
    ------
    ModelError
        If it has no module of that name with weights.
    """
    head = getattr(module, "head", None)
    if not isinstance(head, nn.Module) or not list(head.parameters()):
        raise ModelError(
            f"train.freeze: {architecture} has no module named head, so there is nothing to train."
            " Set train.freeze to false"
        )
    module.requires_grad_(False)
    head.requires_grad_(True)


def _start_weights(
    architecture: str, weights: str | Path, arguments: dict
) -> dict[str, torch.Tensor]:
    if weights == "imagenet":
        return _download_imagenet()
    if weights == "pretrained":
        others = {name: value for name, value in arguments.items() if name != "pooling"}
        found = pretrained_features(architecture.removeprefix(TIMM), others)
        return {f"features.{name}": value for name, value in found.items()}
    return _read_state(Path(weights))


def _load(
    module: nn.Module, state: dict[str, torch.Tensor], architecture: str, weights: str | Path
) -> None:
    """Fill a model with weights, of which those of its head may be missing."""
    source = IMAGENET.url if weights == "imagenet" else weights
    try:
        if isinstance(module, VGG16):
            state = _of_vgg16(state, module)
        elif isinstance(module, TimmBackbone):
            state = _of_timm(state, module)
        module.load_state_dict(state)
    except (ModelError, RuntimeError) as error:  # torch lists keys missing, unknown, of other shape
        raise ModelError(f"{source}: does not fit {architecture}: {error}") from error


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
            f"{path}: no such file; weights are {', '.join(NAMED_WEIGHTS)}, or a .safetensors or"
            " .pth file"
        )
    if path.suffix not in SUFFIXES:
        raise ModelError(f"{path}: weights must be a .safetensors, .pth or .pt file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as weights: {error}") from error
    if not isinstance(state, dict):
        raise ModelError(f"{path}: holds {type(state).__name__}, not a state dict")
    for name in ("state_dict", "model"):  # of a training's file, which holds more
        if isinstance(state.get(name), dict):
            return state[name]
    return state


def _of_vgg16(state: dict[str, torch.Tensor], module: VGG16) -> dict[str, torch.Tensor]:
    """A state dict of torchvision's, or of its features alone, as one of ours."""
    if not any(key.startswith("features.") for key in state):
        state = {f"features.{key}": value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    if not any(key.startswith("head.") for key in state):
        state |= {f"head.{key}": value for key, value in module.head.state_dict().items()}
    return state


def _of_timm(state: dict[str, torch.Tensor], module: TimmBackbone) -> dict[str, torch.Tensor]:
    """A state dict of timm's, or of the features alone, as one of ours."""
    own = module.state_dict()
    if state.keys() == own.keys():
        return state
    head = {name: value for name, value in own.items() if name.startswith("head.")}
    if state.keys() == own.keys() - head.keys():
        return {**state, **head}
    return {**features_of_file(module, state), **head}
