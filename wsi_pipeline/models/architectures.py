"""The networks that a card or a setting can name, and how each is built."""

import importlib
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.baselines import CAMNet, GradCAMNet
from wsi_pipeline.models.card import ARCHIVES, OURS, TIMM, NetworkOutput
from wsi_pipeline.models.output import find_output, first_line, give_tumour_logit
from wsi_pipeline.models.patchnet import PatchNet
from wsi_pipeline.models.timm_backbone import TimmBackbone, plan_timm
from wsi_pipeline.models.vgg16 import IMAGENET_MEAN, IMAGENET_STD, VGG16

CLASSES = {"vgg16": VGG16, "patchnet": PatchNet, "cam": CAMNet, "vgg11": GradCAMNet}
"""The classes of `OURS`."""


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """How to build a network, prepare its input and read its output: fields of its card.

    Parameters
    ----------
    architecture : str
    arguments : dict
        JSON-able.
    mean, std : tuple of float
    output : NetworkOutput
    """

    architecture: str
    arguments: dict = field(default_factory=dict)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    output: NetworkOutput = field(default_factory=NetworkOutput)


def build_network(
    architecture: str, arguments: dict[str, Any], output: NetworkOutput | None = None
) -> nn.Module:
    """Build a network with random weights.

    Parameters
    ----------
    architecture : str
        One of `OURS`, ``timm:NAME``, or ``module:function``, whose code runs.
    arguments : dict
        Keyword arguments of its class or function.
    output : NetworkOutput, optional
        What a function's network returns; unless given, the network is left as it is.

    Returns
    -------
    nn.Module
        Normalised patches, float (N, 3, H, W), to logits (N,).

    Raises
    ------
    ModelError
        If it cannot be built.
    """
    if architecture in OURS:
        try:
            return CLASSES[architecture](**arguments)
        except TypeError as error:
            raise ModelError(f"{architecture} cannot be built: {error}") from error
    if architecture.startswith(TIMM):
        return TimmBackbone(architecture.removeprefix(TIMM), **arguments)
    if architecture in ARCHIVES:
        raise ModelError(f"a network in a file ({architecture}) cannot be built: it is only opened")
    network = _call(architecture, arguments)
    return give_tumour_logit(network, output) if output else network


def _call(architecture: str, arguments: dict[str, Any]) -> nn.Module:
    """What the function returns that an architecture names."""
    module, name = architecture.split(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may fail in any way
        raise ModelError(
            f"{architecture} cannot be imported: {first_line(error)}. Install its package, or put"
            " its folder in the environment variable PYTHONPATH"
        ) from error
    try:
        network = function(**arguments)
    except Exception as error:
        raise ModelError(f"{architecture} fails when it is called: {first_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"{architecture} returns a {type(network).__name__}, not a torch.nn.Module"
        )
    return network


def plan_network(
    architecture: str,
    *,
    patch_px: int,
    arguments: dict[str, Any] | None = None,
    tumour_class: int | None = None,
    kind: str = "logit",
) -> NetworkPlan:
    """Find out how to build a network for patches of some size, by trying it on two.

    Networks of ours are not tried.

    Parameters
    ----------
    architecture : str
        As for `build_network`, and ``timm:hf-hub:NAME``.
    patch_px : int
    arguments : dict, optional
    tumour_class : int, optional
        Of a function's network with classes: the column that is tumour; unless given, column 1
        of two.
    kind : {"logit", "probability"}
        What a function's network returns.

    Raises
    ------
    ModelError
        If it cannot be built, fails, or returns something else.
    """
    arguments = arguments or {}
    if architecture in OURS:
        return NetworkPlan(architecture=architecture, arguments=arguments)
    if architecture.startswith(TIMM):
        pooling = {k: v for k, v in arguments.items() if k == "pooling"}
        others = {k: v for k, v in arguments.items() if k != "pooling"}
        plan = plan_timm(architecture.removeprefix(TIMM), patch_px, others)
        backbone = TimmBackbone(plan.name, **pooling, **plan.arguments)
        find_output(backbone, name=architecture, patch_px=patch_px)
        return NetworkPlan(
            architecture=TIMM + plan.name,
            arguments={**pooling, **plan.arguments},
            mean=plan.mean,
            std=plan.std,
        )
    network = build_network(architecture, arguments)
    output = find_output(
        network, name=architecture, patch_px=patch_px, kind=kind, tumour_class=tumour_class
    )
    return NetworkPlan(architecture=architecture, arguments=arguments, output=output)
