"""Methods for our own models: which fit, and PatchNet's heatmap, which is none for any other.

`wsi_pipeline.explain` knows no model of ours; what depends on one is here.
"""

from collections.abc import Sequence

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


def why_unfit(name: str, architecture: str) -> str:
    """Why one of our models cannot have a method; empty where it can.

    Parameters
    ----------
    name : str
        A key of `ALL_METHODS`.
    architecture : str
        A key of `wsi_pipeline.models.checkpoint.ARCHITECTURES`.
    """
    lacks = LACKS[architecture]
    reasons = [
        f"it needs {need}, and {lacks[need]}" for need in ALL_METHODS[name].needs if need in lacks
    ]
    return reasons[0] if reasons else ""


def choose_methods(names: Sequence[str] | None, architecture: str) -> tuple[str, ...]:
    """The methods asked for, or all that one of our models can have.

    Parameters
    ----------
    names : sequence of str or None
        Keys of `ALL_METHODS`; None for all that fit, in their order there.
    architecture : str
        A key of `wsi_pipeline.models.checkpoint.ARCHITECTURES`.

    Raises
    ------
    ConfigError
        If a name is unknown (the message lists the known) or there is none.
    ModelError
        If the model cannot have a method that is named.
    """
    if names is None:
        return tuple(name for name in ALL_METHODS if not why_unfit(name, architecture))
    known = ", ".join(ALL_METHODS)
    if not names:
        raise ConfigError(f"no method of explanation is named; there are {known}")
    for name in names:
        if name not in ALL_METHODS:
            raise ConfigError(f"method {name!r} is not known; there are {known}")
        if reason := why_unfit(name, architecture):
            raise ModelError(f"method {name} is not for a model {architecture!r}: {reason}")
    return tuple(dict.fromkeys(names))
