"""All methods for any model under one name and in one call form, with what each shows in words.

``METHODS[name](model, images, *, target=1) -> maps``: normalised images (N, 3, H, W), on the
model's device, to maps (N, H, W), float32, in the method's own units. Lengths that a method needs
(windows, segments) follow the images' size, so that they mean the same on every patch size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from wsi_pipeline.explain import perturbation
from wsi_pipeline.explain.cam import class_activation_map, grad_cam
from wsi_pipeline.explain.gradients import (
    deconvolution,
    guided_backpropagation,
    saliency,
    smooth_grad,
)
from wsi_pipeline.explain.response import attentive_response_map, clear_map
from wsi_pipeline.explain.unveiling import guided_smooth_grad, unveiled_regions

Method = Callable[..., torch.Tensor]

WINDOW_SHARE = 1 / 8
"""Side of occlusion's square, of the shorter side of the image; it steps by half of that."""
SUPERPIXELS, SAMPLES = 50, 500
"""LIME's: half of the library's own, since a 512 px patch takes seconds for every copy on a CPU."""
SMOOTHING_SHARE = 11 / 224
"""Side of unveiling's smoothing square: the paper's 11 px on the 224 px that its network takes."""


def occlusion(
    model: nn.Module, images: torch.Tensor, *, target: int = 1, **settings
) -> torch.Tensor:
    """`wsi_pipeline.explain.perturbation.occlusion` by squares of `WINDOW_SHARE` of the image."""
    window_px = max(2, round(WINDOW_SHARE * min(images.shape[-2:])))
    sizes = {"window_px": window_px, "stride_px": window_px // 2}
    return perturbation.occlusion(model, images, target=target, **sizes | settings)


def unveiling(
    model: nn.Module, images: torch.Tensor, *, target: int = 1, seed: int = 0, **settings
) -> torch.Tensor:
    """`unveiled_regions`, smoothed by a square of `SMOOTHING_SHARE` of the image; odd, 3 or more.

    `seed` is that of the noise of its SmoothGrad.
    """
    half = round((SMOOTHING_SHARE * min(images.shape[-2:]) - 1) / 2)
    noisy = partial(guided_smooth_grad, seed=seed)
    sizes = {"kernel_px": 2 * max(1, half) + 1, "saliency": noisy}
    return unveiled_regions(model, images, target=target, **sizes | settings)


METHODS: dict[str, Method] = {
    "saliency": saliency,
    "guided_backpropagation": guided_backpropagation,
    "deconvolution": deconvolution,
    "grad_cam": grad_cam,
    "cam": class_activation_map,
    "clear": clear_map,
    "attentive_response_map": attentive_response_map,
    "smooth_grad": smooth_grad,
    "unveiling": unveiling,
    "occlusion": occlusion,
    "lime": partial(perturbation.lime, superpixels=SUPERPIXELS, samples=SAMPLES),
}
"""Every method by name, the fast ones first: from one pass of the model to hundreds."""

SEEDED = ("smooth_grad", "unveiling", "lime")
"""Methods that draw at random, and take a `seed`."""
LAYERED = ("grad_cam", "clear", "attentive_response_map")
"""Methods that look at one layer, and take its name as `layer`."""


@dataclass(frozen=True)
class Words:
    """A method in words for people who look at its maps.

    Parameters
    ----------
    name : str
        As a title.
    shows : str
        What is coloured, for the panel: a few words.
    legend : str
        One sentence.
    unit : str
        Of the values, for the colour scale.
    signed : bool
        Negative values are evidence against tumour, not merely less of it.
    coarse : bool
        It finds regions rather than pixels: drawn over the patch.
    """

    name: str
    shows: str
    legend: str
    unit: str
    signed: bool = False
    coarse: bool = False


WORDS: dict[str, Words] = {
    "saliency": Words(
        "Saliency",
        "pixels that matter, for or against",
        "Pixels whose colour, changed a little, changes the score most; it does not say whether"
        " for or against tumour.",
        "change of score per colour",
    ),
    "guided_backpropagation": Words(
        "Guided backpropagation",
        "details that raise the score",
        "Details that raise the score through every layer; sharp, but it tends to show edges"
        " whatever the model has learned.",
        "strength of evidence",
    ),
    "deconvolution": Words(
        "Deconvolution",
        "details traced back from the score",
        "What the score is traced back to, layer by layer, positive parts alone; it tends to show"
        " edges as well.",
        "strength of evidence",
    ),
    "grad_cam": Words(
        "Grad-CAM",
        "regions that speak for tumour",
        "Regions whose features, in the last convolution, speak for tumour; coarse, since those"
        " feature maps are small.",
        "evidence for tumour",
        coarse=True,
    ),
    "cam": Words(
        "Class activation map",
        "regions for (red), against (blue)",
        "How much each region adds to the score (red) or takes from it (blue): together they are"
        " the score.",
        "share of the score",
        signed=True,
        coarse=True,
    ),
    "clear": Words(
        "CLEAR",
        "where evidence for tumour prevails",
        "Pixels to which the network responds more with evidence for tumour than against it, and"
        " how strongly.",
        "level of response",
    ),
    "attentive_response_map": Words(
        "Attentive response map",
        "what the strongest detectors saw",
        "What those 25 detectors of the last convolution responded to that speak most for tumour.",
        "level of response",
    ),
    "smooth_grad": Words(
        "SmoothGrad",
        "saliency, averaged over noise",
        "Saliency averaged over noisy copies of the patch, which leaves what does not depend on"
        " single pixels.",
        "change of score per colour",
    ),
    "unveiling": Words(
        "Iterative unveiling",
        "regions hidden until the call fell",
        "Regions that had to be hidden, one after another, until the patch was no longer called"
        " tumour; none where it was not called so.",
        "hidden (1) or not (0)",
        coarse=True,
    ),
    "occlusion": Words(
        "Occlusion",
        "covering red lowers the score",
        "By how much the score falls (red) or rises (blue) when a square there is covered.",
        "fall of the score",
        signed=True,
        coarse=True,
    ),
    "lime": Words(
        "LIME",
        "segments for (red), against (blue)",
        "How much each segment of the patch raises (red) or lowers (blue) the score by being"
        " there, by a simple model fitted to hundreds of covered copies.",
        "weight in the score",
        signed=True,
        coarse=True,
    ),
}
"""For each method."""


def bind(name: str, *, seed: int = 0, layer: str | None = None) -> Method:
    """A method with a seed, where it draws at random, and a layer, where it looks at one.

    Parameters
    ----------
    name : str
        A key of `METHODS`.
    seed : int
    layer : str or None
        As in ``model.named_modules()``; None for the method's default, the last convolution.
    """
    settings: dict = {"seed": seed} if name in SEEDED else {}
    if name in LAYERED and layer is not None:
        settings["layer"] = layer
    return partial(METHODS[name], **settings)


def unit_maps(maps: torch.Tensor) -> torch.Tensor:
    """Maps as evidence from 0 to 1: for statistics that need one range.

    What is negative, evidence against, becomes 0; the rest is divided by each map's maximum. A map
    without positive evidence is 0 throughout.

    Parameters
    ----------
    maps : float tensor, shape (N, H, W)

    Returns
    -------
    float32 tensor, shape (N, H, W), in [0, 1]
    """
    evidence = maps.float().clamp(min=0)
    largest = evidence.amax((1, 2), keepdim=True)
    return torch.where(largest > 0, evidence / largest, 0.0)
