"""Methods for our own models: which fit, and PatchNet's heatmap, which is none for any other.

`wsi_pipeline.explain` knows no model of ours; what depends on one is here.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from wsi_pipeline.errors import ConfigError, ModelError
from wsi_pipeline.explain.explained_model import check_target, explained
from wsi_pipeline.explain.methods import (
    FEATURE_MAPS,
    LINEAR_HEAD,
    METHODS,
    PLAIN_INPUT,
    Method,
)
from wsi_pipeline.models.output import first_line
from wsi_pipeline.models.patchnet import Subnet
from wsi_pipeline.models.patchnet_heatmaps import global_heatmap


def patchnet(model: nn.Module, images: torch.Tensor, *, target: int = 1) -> torch.Tensor:
    """PatchNet's own heatmap: the probability Q of the small patch centred at each pixel.

    It is no method on top of a model but what the model itself computes, see
    `wsi_pipeline.models.patchnet_heatmaps.global_heatmap`.

    Parameters
    ----------
    model : PatchNet
        Any module with a `Subnet` named ``subnet``.
    images : float tensor, shape (N, 3, H, W)
        Normalised, on the model's device.
    target : {1, 0}
        0 gives 1 - Q.

    Returns
    -------
    float32 tensor, shape (N, H, W), in [0, 1]

    Raises
    ------
    ModelError
        If the model has no such subnet, or `target` is another number.
    """
    check_target(target)
    subnet = getattr(model, "subnet", None)
    if not isinstance(subnet, Subnet):
        raise ModelError(f"{type(model).__name__} has no subnet: only PatchNet has such a heatmap")
    with explained(model), torch.no_grad():
        q = torch.stack([global_heatmap(subnet, image) for image in images]).float()
    return q if target == 1 else 1 - q


SUBNET = "the subnet whose heatmap it is"
PATCHNET = Method(
    name="patchnet",
    function=patchnet,
    title="PatchNet's probability",
    shows="tumour probability around each pixel",
    legend=(
        "The probability of tumour that PatchNet itself gives the small patch around each pixel;"
        " the patch's probability is their mean."
    ),
    unit="probability of tumour",
    coarse=True,
    probability=True,
    needs=(SUBNET,),
)
ALL_METHODS = {PATCHNET.name: PATCHNET, **METHODS}
"""PatchNet's own heatmap and the methods for any model, by name, the fast ones first."""

_NO_SUBNET = {SUBNET: "only a PatchNet has one"}
LACKS: dict[str, dict[str, str]] = {
    "vgg16": _NO_SUBNET | {LINEAR_HEAD: "VGG16 takes the largest value of each feature map"},
    "cam": _NO_SUBNET,
    "vgg11": _NO_SUBNET
    | {
        LINEAR_HEAD: "VGG-11's head has more layers",
        PLAIN_INPUT: "VGG-11 resizes them first",
    },
    "patchnet": {FEATURE_MAPS: "PatchNet's are of its patches"},
}
"""What each of our architectures does not have of what methods need, and why."""
TRIED = {
    "saliency": ("saliency", "smooth_grad"),
    "guided_backpropagation": ("guided_backpropagation", "unveiling"),
    **{name: (name,) for name in ("deconvolution", "grad_cam", "cam")},
    **{name: (name,) for name in ("clear", "attentive_response_map")},
}
"""Methods of one pass, and those that work where they do."""


def why_unfit(name: str, architecture: str) -> str:
    """Why one of our models cannot have a method; empty where it can.

    Parameters
    ----------
    name : str
        A key of `ALL_METHODS`.
    architecture : str
        One of `OURS`.
    """
    lacks = LACKS[architecture]
    reasons = [
        f"it needs {need}, and {lacks[need]}" for need in ALL_METHODS[name].needs if need in lacks
    ]
    return reasons[0] if reasons else ""


def unfit_by_name(architecture: str) -> dict[str, str]:
    """The methods that one of our models cannot have, and why."""
    reasons = {name: why_unfit(name, architecture) for name in ALL_METHODS}
    return {name: reason for name, reason in reasons.items() if reason}


def unfit_by_trial(model: nn.Module, patch_px: int) -> dict[str, str]:
    """The methods that a model cannot have, and why: those of one pass are tried on a patch.

    Parameters
    ----------
    model : nn.Module
        Of any kind, on the CPU.
    patch_px : int
    """
    image = torch.randn(1, 3, patch_px, patch_px, generator=torch.Generator().manual_seed(0))
    unfit = {}
    if not isinstance(getattr(model, "subnet", None), Subnet):
        unfit[PATCHNET.name] = _NO_SUBNET[SUBNET]
    for tried, names in TRIED.items():
        if reason := _why_it_fails(tried, model, image):
            unfit |= dict.fromkeys(names, reason)
    return unfit


def _why_it_fails(name: str, model: nn.Module, image: torch.Tensor) -> str:
    convolutions = [part for part in model.modules() if isinstance(part, nn.Conv2d)]
    if name == "grad_cam" and convolutions and all(map(_cuts_patches, convolutions)):
        return "its convolution only cuts the image into patches"
    try:
        ALL_METHODS[name](model, image)
    except Exception as error:  # of anybody's network
        return first_line(error)
    return ""


def _cuts_patches(convolution: nn.Conv2d) -> bool:
    """Whether it is the first layer of a transformer."""
    return convolution.kernel_size == convolution.stride and convolution.stride != (1, 1)


def choose_methods(
    names: Sequence[str] | None, architecture: str, unfit: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """The methods asked for, or all that a model can have.

    Parameters
    ----------
    names : sequence of str or None
        Keys of `ALL_METHODS`; None for all that fit, in their order there.
    architecture : str
    unfit : mapping, optional
        Why the model cannot have some methods; unless given, `unfit_by_name`.

    Raises
    ------
    ConfigError
        If a name is unknown (the message lists the known) or there is none.
    ModelError
        If the model cannot have a method that is named.
    """
    if unfit is None:
        unfit = unfit_by_name(architecture)
    if names is None:
        return tuple(name for name in ALL_METHODS if name not in unfit)
    known = ", ".join(ALL_METHODS)
    if not names:
        raise ConfigError(f"no method of explanation is named; there are {known}")
    for name in names:
        if name not in ALL_METHODS:
            raise ConfigError(f"method {name!r} is not known; there are {known}")
        if name in unfit:
            raise ModelError(f"method {name} is not for a model {architecture!r}: {unfit[name]}")
    return tuple(dict.fromkeys(names))
