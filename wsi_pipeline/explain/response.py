"""Response maps: what a layer's kernels responded to, projected back to the input.

Two papers by Kumar et al., on CLEAR (2017, here C) and on attentive response maps (here A), project
feature maps z of a layer L back by

    R = G_1 U_1 G_2 U_2 ... G_{L-1} U_{L-1} G_L z,

G_l the transposed convolution with the weights of layer l, U_l the unpooling that puts a value
back where max pooling took it from (its switch). They cite Zeiler and Fergus, whose deconvnet
also rectifies at each ReLU on the way back, but their formula does not: neither do we, unless
`rectify` is set. Biases and the input's own values play no part on the way back.

The models are those that begin with a plain stack of ``nn.Conv2d``, ``nn.ReLU`` and
``nn.MaxPool2d`` in an ``nn.Sequential``, as VGG16's `features`. Memory: one image at a time, and
`at_once` projections of it; VGG16 at 512 px and four at once take some 1.1 GiB. Time: a projection
costs what a forward pass does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from torch import nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from wsi_pipeline.errors import ConfigError, ModelError
from wsi_pipeline.explain.explained_model import check_target, explained, find_layer, score

HUES = (2 / 3, 0.0)
"""Of class 0 (blue) and class 1 (red), in [0, 1)."""


@dataclass(frozen=True)
class Response:
    """How images went up through a stack of layers: all that projecting back needs.

    Attributes
    ----------
    layers : tuple of nn.Module
    sizes : tuple of torch.Size
        Shape of what entered each layer.
    switches : tuple of int64 tensor or None
        For each max pooling, the place of each maximum in the flattened input plane.
    activations : float tensor, shape (N, C, h, w)
        What left the last layer.
    """

    layers: tuple[nn.Module, ...]
    sizes: tuple[torch.Size, ...]
    switches: tuple[torch.Tensor | None, ...]
    activations: torch.Tensor


@dataclass(frozen=True)
class ClearMaps:
    """CLEAR's two maps of each image.

    Attributes
    ----------
    dominant_class : int64 tensor, shape (N, H, W), 0 or 1
    level : float32 tensor, shape (N, H, W), 0 or more
    """

    dominant_class: torch.Tensor
    level: torch.Tensor


def respond(layers: Iterable[nn.Module], images: torch.Tensor) -> Response:
    """Pass images up through a stack, keeping the switches of its max poolings.

    Parameters
    ----------
    layers : sequence of nn.Module
        ``nn.Conv2d`` with zero padding in pixels, ``nn.ReLU``, ``nn.MaxPool2d``. An in-place
        ReLU is not run in place.
    images : float tensor, shape (N, C, H, W)

    Raises
    ------
    ModelError
        If a layer is of another kind.
    """
    sizes, switches, values = [], [], images
    for layer in layers:
        _check_kind(layer)
        sizes.append(values.shape)
        places = None
        if isinstance(layer, nn.MaxPool2d):
            values, places = functional.max_pool2d(
                values, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                layer.ceil_mode, return_indices=True,
            )  # fmt: skip
        else:
            values = functional.relu(values) if isinstance(layer, nn.ReLU) else layer(values)
        switches.append(places)
    return Response(tuple(layers), tuple(sizes), tuple(switches), values)


def project_back(
    response: Response, activations: torch.Tensor, *, rectify: bool = False
) -> torch.Tensor:
    """Project values of a stack's last layer back to its input (A, formula 1; C, formula 2).

    Where no ReLU acts this is the gradient's way back too, switches included. Where one does, a
    gradient would stop at values that were negative on the way up; this does not.

    Parameters
    ----------
    response : Response
        Of N images, or of one image onto which all `activations` are projected.
    activations : float tensor, shape (N or M, C, h, w)
        Shaped as ``response.activations``: most often a part of these.
    rectify : bool
        Set what is negative to 0 at each ReLU, as Zeiler and Fergus do.

    Returns
    -------
    tensor, shape (N or M, 3, H, W)
        Of the stack's input, so in the frame of normalised colours; either sign.
    """
    back = activations
    steps = zip(response.layers, response.sizes, response.switches, strict=True)
    for layer, size, switches in reversed(list(steps)):
        if isinstance(layer, nn.Conv2d):
            back = conv2d_input(
                (len(back), *size[1:]), layer.weight, back,
                layer.stride, layer.padding, layer.dilation, layer.groups,
            )  # fmt: skip
        elif switches is not None:  # of a max pooling
            back = unpool(back, switches, size[-2:])
        elif rectify:
            back = functional.relu(back)
    return back


def unpool(values: torch.Tensor, switches: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Put values back where max pooling took its maxima from; 0 elsewhere.

    Where windows overlap and share a maximum their values are added, as in the gradient
    (``torch.nn.functional.max_unpool2d`` would keep any one of them).

    Parameters
    ----------
    values : float tensor, shape (M, C, h, w)
    switches : int64 tensor, shape (M or 1, C, h, w)
        As ``torch.nn.functional.max_pool2d`` returns them.
    size : (H, W)
        Of the pooling's input, px.

    Returns
    -------
    tensor, shape (M, C, H, W)
    """
    height, width = size
    planes = values.new_zeros(*values.shape[:2], height * width)
    places = switches.flatten(2).expand(len(values), -1, -1)
    return planes.scatter_add(2, places, values.flatten(2)).unflatten(2, (height, width))


def attentive_response_map(
    model: nn.Module,
    images: torch.Tensor,
    *,
    target: int = 1,
    units: int = 25,
    layer: str | None = None,
    features: str = "features",
    rectify: bool = False,
    at_once: int = 4,
) -> torch.Tensor:
    """Attentive response maps of the units that speak most for a class (Kumar et al., A).

    For each of the n most active units f of the last convolutional layer, its feature map alone
    is projected back to the input, R(x|f); the map is the maximum over them at each pixel. A unit
    is one kernel, and its feature map is taken after the ReLU that follows the convolution.

    Deviations. The paper ranks units by activity alone, whatever class they speak for; with one
    logit that would give both classes the same map. Here a unit's activity counts as its share of
    the target's score, the sum of z times d(score)/dz over its feature map: its activity times its
    weight in the head where pooling is global, by the mean or by the maximum. Units without a
    positive share are left out, so fewer than n may remain, or none (a map of zeros). The paper's
    R is of grey images and signed; here the level at a pixel is the largest magnitude over the
    colour channels, since dark on bright is evidence too. Its formula 3 says argmax where its text
    says maximum.

    Parameters
    ----------
    model : nn.Module
    images : float tensor, shape (N, 3, H, W)
        Normalised, on the model's device.
    target : {1, 0}
    units : int
        The paper's n, 1 or more.
    layer : str or None
        Dotted name of a layer in the stack, whose output is taken as it is; None for the stack's
        last convolution with its ReLU.
    features : str
        Dotted name of the model's ``nn.Sequential`` of convolutions, ReLUs and max poolings, to
        which the images go first.
    rectify : bool
        As for `project_back`.
    at_once : int
        Units projected together, a matter of memory alone.

    Returns
    -------
    float32 tensor, shape (N, H, W), 0 or more
        Higher: a stronger response of units that speak for `target`.

    Raises
    ------
    ConfigError
        If `units` or `at_once` is under 1.
    ModelError
        If the model has no such stack, the stack no such layer or one of another kind, or as
        `wsi_pipeline.explain.explained_model.score`.
    """
    for name, value in (("units", units), ("at_once", at_once)):
        if value < 1:
            raise ConfigError(f"{name} is {value}: it must be 1 or more")
    with explained(model), torch.no_grad():
        stack, top = _find_stack(model, features, layer)
        maps = []
        for image in images.split(1):
            response = respond(stack[:top], image)
            gradient = _gradient(model, stack, stack[top:], image, response, target)
            chosen = _strongest_units(response.activations * gradient, units)
            maps.append(_dominant_level(response, chosen, rectify, at_once))
    return torch.stack(maps).float()


def clear(
    model: nn.Module,
    images: torch.Tensor,
    *,
    layer: str | None = None,
    features: str = "features",
    rectify: bool = False,
) -> ClearMaps:
    """CLEAR: the class that dominates at each pixel, and its level (Kumar et al., C).

    The level of a class is R(x|c), the magnitude of what its class-specific kernel responded to,
    projected back (formula 3); the dominant class has the largest (4) and gives the level (5).

    CLEAR asks for a last layer of one kernel for each class, then global average pooling. A single
    logit is two such kernels of size 1 x 1 over the last convolutional layer's feature maps z:
    sum_k max(w_k, 0) z_k for class 1 and sum_k max(-w_k, 0) z_k for class 0, where w_k is the
    weight of kernel k in the logit: d(logit)/dz summed over the feature map, which is the head's
    weight both for global average and for global max pooling. With max pooling only the strongest
    place of each kernel enters the logit; here, as in the formula, all places are projected back,
    each weighted as if it were that place. The level at a pixel is the largest magnitude over the
    colour channels.

    Parameters
    ----------
    model, images, layer, features, rectify
        As for `attentive_response_map`.

    Returns
    -------
    ClearMaps
        Where neither class responds: class 0, level 0.

    Raises
    ------
    ModelError
        As `attentive_response_map`.
    """
    with explained(model), torch.no_grad():
        stack, top = _find_stack(model, features, layer)
        levels = []
        for image in images.split(1):
            response = respond(stack[:top], image)
            gradient = _gradient(model, stack, stack[top:], image, response, 1)
            evidence = gradient.sum((2, 3), keepdim=True) * response.activations
            for_each_class = torch.cat([-evidence, evidence]).relu()
            levels.append(_level(project_back(response, for_each_class, rectify=rectify)))
    level, dominant_class = torch.stack(levels).float().max(dim=1)
    return ClearMaps(dominant_class, level)


def clear_map(
    model: nn.Module,
    images: torch.Tensor,
    *,
    target: int = 1,
    layer: str | None = None,
    features: str = "features",
    rectify: bool = False,
) -> torch.Tensor:
    """CLEAR's level where `target` dominates, 0 elsewhere: CLEAR in the common call form.

    Parameters and errors as for `clear`.

    Returns
    -------
    float32 tensor, shape (N, H, W), 0 or more
    """
    check_target(target)
    maps = clear(model, images, layer=layer, features=features, rectify=rectify)
    return maps.level * (maps.dominant_class == target)


def clear_picture(maps: ClearMaps) -> np.ndarray:
    """CLEAR's picture: hue is the dominant class, value its level, saturation 1 (formula 6).

    Returns
    -------
    uint8 array, shape (N, H, W, 3)
        RGB. Class 0 blue, class 1 red (`HUES`), black where nothing responds; the largest level of
        each image is full value.
    """
    hue = np.take(HUES, maps.dominant_class.cpu().numpy())
    level = maps.level.cpu().numpy()
    largest = level.max(axis=(1, 2), keepdims=True)
    value = np.divide(level, largest, out=np.zeros_like(level), where=largest > 0)
    rgb = hsv_to_rgb(np.stack([hue, np.ones_like(value), value], axis=-1))
    return np.round(255 * rgb).astype(np.uint8)


def _level(back: torch.Tensor) -> torch.Tensor:
    return back.abs().amax(1)


def _strongest_units(evidence: torch.Tensor, units: int) -> torch.Tensor:
    """Indices of the kernels with the largest sums over the feature map, as far as positive."""
    shares = evidence.sum((0, 2, 3))
    strongest = shares.topk(min(units, len(shares)))
    return strongest.indices[strongest.values > 0]


def _dominant_level(
    response: Response, units: torch.Tensor, rectify: bool, at_once: int
) -> torch.Tensor:
    """Maximum over units of the level of each one's projection, shape (H, W)."""
    level = response.activations.new_zeros(response.sizes[0][-2:])
    kernels = torch.eye(response.activations.shape[1]).to(level)
    for first in range(0, len(units), at_once):
        alone = kernels[units[first : first + at_once], :, None, None] * response.activations
        back = project_back(response, alone, rectify=rectify)
        level = torch.maximum(level, _level(back).amax(0))
    return level


def _find_stack(model: nn.Module, features: str, layer: str | None) -> tuple[nn.Sequential, int]:
    """The stack, and the number of its layers up to and with the one asked for."""
    stack = dict(model.named_modules()).get(features)
    if not isinstance(stack, nn.Sequential):
        raise ModelError(
            f"the model has no nn.Sequential named {features!r}: projecting back needs the stack"
            " of its convolutions, ReLUs and max poolings"
        )
    wanted = find_layer(stack) if layer is None else find_layer(model, layer)
    places = [place for place, module in enumerate(stack, 1) if module is wanted]
    if not places:
        raise ModelError(f"layer {layer!r} is not one of the layers of {features!r}")
    top = places[-1]
    with_relu = layer is None and top < len(stack) and isinstance(stack[top], nn.ReLU)
    return stack, top + with_relu


def _gradient(
    model: nn.Module,
    stack: nn.Sequential,
    above: nn.Sequential,
    image: torch.Tensor,
    response: Response,
    target: int,
) -> torch.Tensor:
    """d(score)/d(activations): the model runs with these in the place of the stack's own."""
    activations = response.activations.detach().requires_grad_()

    def replace(_module, inputs, _output):
        if not torch.equal(inputs[0], image):
            raise ModelError("the model changes its images before its stack of convolutions")
        return above(activations)

    hook = stack.register_forward_hook(replace)
    try:
        with torch.enable_grad():
            value = score(model, image, target).sum()
    finally:
        hook.remove()
    if not value.requires_grad:
        raise ModelError("the model's output does not depend on its stack of convolutions")
    return torch.autograd.grad(value, activations)[0]


def _check_kind(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            raise ModelError(f"{layer}: projecting back needs zero padding given in pixels")
    elif not isinstance(layer, nn.ReLU | nn.MaxPool2d):
        raise ModelError(
            f"{layer}: projecting back goes through Conv2d, ReLU and MaxPool2d layers only"
        )
