"""Methods for our own models: which fit, and PatchNet's heatmap, which is none for any other.

`wsi_pipeline.explain` knows no model of ours; what depends on one is here.
"""

from collections.abc import Sequence

import torch
from torch import nn

from wsi_pipeline.errors import ConfigError, ModelError
from wsi_pipeline.explain import methods
from wsi_pipeline.explain.cam import CAM_FORM
from wsi_pipeline.explain.core import check_target, explained
from wsi_pipeline.explain.methods import Method, Words
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


METHODS: dict[str, Method] = {"patchnet": patchnet, **methods.METHODS}
"""Every method by name, the fast ones first."""

WORDS: dict[str, Words] = {
    "patchnet": Words(
        "PatchNet's probability",
        "tumour probability around each pixel",
        "The probability of tumour that PatchNet itself gives the small patch around each pixel;"
        " the patch's probability is their mean.",
        "probability of tumour",
        coarse=True,
    ),
    **methods.WORDS,
}
"""For each method."""

_ONE_FOR_EACH = "it needs one set of feature maps for each image, and PatchNet's are of its patches"
_STACK = "it needs images that go straight into the convolutions, and VGG-11 resizes them first"
_POOLED = "its head sees the largest value of each feature map, or more layers: " + CAM_FORM
UNFIT: dict[str, dict[str, str]] = {
    "vgg16": {"cam": _POOLED},
    "cam": {},
    "vgg11": {"cam": _POOLED, "clear": _STACK, "attentive_response_map": _STACK},
    "patchnet": dict.fromkeys(("grad_cam", "cam", "clear", "attentive_response_map"),
                              _ONE_FOR_EACH),
}  # fmt: skip
"""For each of our architectures the methods that it cannot have, and why."""


def choose_methods(names: Sequence[str] | None, architecture: str) -> tuple[str, ...]:
    """The methods asked for, or all that one of our models can have.

    Parameters
    ----------
    names : sequence of str or None
        Keys of `METHODS`; None for all that fit, in their order there.
    architecture : str
        A key of `wsi_pipeline.models.checkpoint.ARCHITECTURES`.

    Raises
    ------
    ConfigError
        If a name is unknown (the message lists the known) or there is none.
    ModelError
        If the model cannot have a method that is named.
    """
    unfit = dict(UNFIT[architecture])
    if architecture != "patchnet":
        unfit["patchnet"] = "it is the heatmap of a PatchNet"
    if names is None:
        return tuple(name for name in METHODS if name not in unfit)
    known = ", ".join(METHODS)
    if not names:
        raise ConfigError(f"no method of explanation is named; there are {known}")
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"method {name!r} is not known; there are {known}")
        if name in unfit:
            raise ModelError(f"method {name} is not for a model {architecture!r}: {unfit[name]}")
    return tuple(dict.fromkeys(names))


def bind(name: str, *, seed: int = 0, layer: str | None = None) -> Method:
    """A method of `METHODS` with its seed and layer, see `wsi_pipeline.explain.methods.bind`."""
    return patchnet if name == "patchnet" else methods.bind(name, seed=seed, layer=layer)
