"""All methods for any model: one record of each, which can be called and says what it shows.

``METHODS[name](model, images, *, target=1, seed=0, layer=None) -> maps``: normalised images
(N, 3, H, W), on the model's device, to maps (N, H, W), float32, in the method's own units. Lengths
that a method needs (windows, segments) follow the images' size, so that they mean the same on
every patch size.
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

WINDOW_SHARE = 1 / 8
"""Side of occlusion's square, of the shorter side of the image; it steps by half of that."""
SUPERPIXELS, SAMPLES = 50, 500
"""LIME's: half of the library's own, since a 512 px patch takes seconds for every copy on a CPU."""
SMOOTHING_SHARE = 11 / 224
"""Side of unveiling's smoothing square: the paper's 11 px on the 224 px that its network takes."""

FEATURE_MAPS = "one set of feature maps for each image"
PLAIN_INPUT = "images that go straight into the convolutions"
LINEAR_HEAD = "features, then global average pooling, then a linear head"


@dataclass(frozen=True)
class Method:
    """An explanation method: a function, and what people and programs need to know of its maps.

    Parameters
    ----------
    name : str
        As settings, files and tables name it.
    function : callable
        ``function(model, images, *, target=1, ...) -> maps``, with a keyword ``seed`` or ``layer``
        where `takes_seed` or `takes_layer` says so.
    title : str
        Its name for people who look at its maps.
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
    probability : bool
        Values are probabilities: statistics that need a range from 0 to 1 take them as they are.
    takes_seed : bool
        It draws at random.
    takes_layer : bool
        It looks at one layer, named as in ``model.named_modules()``.
    needs : tuple of str
        What a model must have for it, such as `FEATURE_MAPS`; empty where any model will do.
    """

    name: str
    function: Callable[..., torch.Tensor]
    title: str
    shows: str
    legend: str
    unit: str
    signed: bool = False
    coarse: bool = False
    probability: bool = False
    takes_seed: bool = False
    takes_layer: bool = False
    needs: tuple[str, ...] = ()

    def with_settings(self, **settings) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
        """The method as a function of a model and images alone."""
        return partial(self, **settings)

    def __call__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        *,
        target: int = 1,
        seed: int = 0,
        layer: str | None = None,
    ) -> torch.Tensor:
        """Explain images.

        Parameters
        ----------
        model : nn.Module
        images : float tensor, shape (N, 3, H, W)
            Normalised, on the model's device.
        target : {1, 0}
        seed : int
            Ignored unless the method draws at random.
        layer : str or None
            Ignored unless the method looks at one layer; None for its default, the last
            convolution.

        Returns
        -------
        float32 tensor, shape (N, H, W)

        Raises
        ------
        ModelError
            If the model does not have what the method needs, or lacks the layer.
        """
        settings: dict = {"seed": seed} if self.takes_seed else {}
        if self.takes_layer and layer is not None:
            settings["layer"] = layer
        return self.function(model, images, target=target, **settings)


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


_FROM_FAST_TO_SLOW = (
    Method(
        name="saliency",
        function=saliency,
        title="Saliency",
        shows="pixels that matter, for or against",
        legend=(
            "Pixels whose colour, changed a little, changes the score most; it does not say whether"
            " for or against tumour."
        ),
        unit="change of score per colour",
    ),
    Method(
        name="guided_backpropagation",
        function=guided_backpropagation,
        title="Guided backpropagation",
        shows="details that raise the score",
        legend=(
            "Details that raise the score through every layer; sharp, but it tends to show edges"
            " whatever the model has learned."
        ),
        unit="strength of evidence",
    ),
    Method(
        name="deconvolution",
        function=deconvolution,
        title="Deconvolution",
        shows="details traced back from the score",
        legend=(
            "What the score is traced back to, layer by layer, positive parts alone; it tends to"
            " show edges as well."
        ),
        unit="strength of evidence",
    ),
    Method(
        name="grad_cam",
        function=grad_cam,
        title="Grad-CAM",
        shows="regions that speak for tumour",
        legend=(
            "Regions whose features, in the last convolution, speak for tumour; coarse, since those"
            " feature maps are small."
        ),
        unit="evidence for tumour",
        coarse=True,
        takes_layer=True,
        needs=(FEATURE_MAPS,),
    ),
    Method(
        name="cam",
        function=class_activation_map,
        title="Class activation map",
        shows="regions for (red), against (blue)",
        legend=(
            "How much each region adds to the score (red) or takes from it (blue): together they"
            " are the score."
        ),
        unit="share of the score",
        signed=True,
        coarse=True,
        needs=(FEATURE_MAPS, LINEAR_HEAD),
    ),
    Method(
        name="clear",
        function=clear_map,
        title="CLEAR",
        shows="where evidence for tumour prevails",
        legend=(
            "Pixels to which the network responds more with evidence for tumour than against it,"
            " and how strongly."
        ),
        unit="level of response",
        takes_layer=True,
        needs=(FEATURE_MAPS, PLAIN_INPUT),
    ),
    Method(
        name="attentive_response_map",
        function=attentive_response_map,
        title="Attentive response map",
        shows="what the strongest detectors saw",
        legend=(
            "What those 25 detectors of the last convolution responded to that speak most for"
            " tumour."
        ),
        unit="level of response",
        takes_layer=True,
        needs=(FEATURE_MAPS, PLAIN_INPUT),
    ),
    Method(
        name="smooth_grad",
        function=smooth_grad,
        title="SmoothGrad",
        shows="saliency, averaged over noise",
        legend=(
            "Saliency averaged over noisy copies of the patch, which leaves what does not depend on"
            " single pixels."
        ),
        unit="change of score per colour",
        takes_seed=True,
    ),
    Method(
        name="unveiling",
        function=unveiling,
        title="Iterative unveiling",
        shows="regions hidden until the call fell",
        legend=(
            "Regions that had to be hidden, one after another, until the patch was no longer called"
            " tumour; none where it was not called so."
        ),
        unit="hidden (1) or not (0)",
        coarse=True,
        takes_seed=True,
    ),
    Method(
        name="occlusion",
        function=occlusion,
        title="Occlusion",
        shows="covering red lowers the score",
        legend="By how much the score falls (red) or rises (blue) when a square there is covered.",
        unit="fall of the score",
        signed=True,
        coarse=True,
    ),
    Method(
        name="lime",
        function=partial(perturbation.lime, superpixels=SUPERPIXELS, samples=SAMPLES),
        title="LIME",
        shows="segments for (red), against (blue)",
        legend=(
            "How much each segment of the patch raises (red) or lowers (blue) the score by being"
            " there, by a simple model fitted to hundreds of covered copies."
        ),
        unit="weight in the score",
        signed=True,
        coarse=True,
        takes_seed=True,
    ),
)

METHODS = {method.name: method for method in _FROM_FAST_TO_SLOW}
"""Every method by name, the fast ones first: from one pass of the model to hundreds."""


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
