"""Class activation maps: the last feature maps, weighed by what each means for the score."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from captum.attr import LayerGradCam
from torch import nn
from torch.nn import functional

from wsi_pipeline.errors import ModelError
from wsi_pipeline.explain.explained_model import explained, find_layer, score

CAM_FORM = "a class activation map needs features, then global average pooling, then a linear head"
TOLERANCE = 1e-3
"""Of a class activation map's two sums, relative to the largest term: float32 and TF32 pass."""


def grad_cam(
    model: nn.Module,
    images: torch.Tensor,
    *,
    target: int = 1,
    layer: str | None = None,
    relu: bool = True,
) -> torch.Tensor:
    """Grad-CAM: a layer's feature maps, each weighed by the score's mean gradient over it.

    ``M = ReLU(sum_k a_k F_k)`` with ``a_k`` the mean over feature map ``F_k`` of the score's
    gradient (Lecture; Selvaraju et al. 2017), brought to the images' size bilinearly, pixel
    centres on pixel centres, as the paper does.

    Both sources take the feature maps as the next layer sees them. By default the map is therefore
    of the last convolution's ReLU: the ``nn.ReLU`` behind it in the same ``nn.Sequential`` (after
    its batch normalisation, if any). Where no such module is, it is of the convolution itself.

    Parameters
    ----------
    model : nn.Module
    images : float tensor, shape (N, 3, H, W)
        Normalised.
    target : {1, 0}
        The score is the logit or, for 0, its negative.
    layer : str or None
        Another layer, as in ``model.named_modules()``; the map is of its output as it is.
    relu : bool
        False keeps negative values, evidence against `target`.

    Returns
    -------
    float32 tensor, shape (N, H, W)
        0 or more with `relu`; in units of the score, with no fixed upper end. Higher is more
        evidence for `target`.

    Raises
    ------
    ModelError
        If the layer is not there, is not run, or does not give one set of feature maps an image
        (PatchNet's convolutions see patches: its heatmap explains it), or by `score`.
    """
    module = _last_activation(model) if layer is None else find_layer(model, layer)
    method = LayerGradCam(partial(score, model, target=target), module)
    try:
        with explained(model):
            maps = method.attribute(images.detach(), relu_attributions=relu)
    except AssertionError as error:  # captum's for a layer that the model does not call
        raise ModelError(f"layer {layer!r}: {error}") from error
    if maps.ndim != 4 or len(maps) != len(images):
        raise ModelError(
            f"layer {layer or '(the last convolution)'} gives maps of shape {tuple(maps.shape)} for"
            f" {len(images)} images: Grad-CAM needs one set of feature maps for each image"
        )
    return _upsampled(maps, images)


def class_activation_map(
    model: nn.Module,
    images: torch.Tensor,
    *,
    target: int = 1,
    features: str = "features",
    head: str = "head",
) -> torch.Tensor:
    """Class activation map: the feature maps, each weighed by the linear head (Zhou et al. 2016).

    ``M(x, y) = sum_k w_k f_k(x, y)``, brought to the images' size bilinearly. It parts the score
    among the places: the mean of M before that, plus the head's bias, is the logit.

    Parameters
    ----------
    model : nn.Module
        Of the form: features, global average pooling, linear head.
    images : float tensor, shape (N, 3, H, W)
        Normalised.
    target : {1, 0}
        0 gives the negative map.
    features, head : str
        Names of the module whose output is pooled and of the ``nn.Linear`` with one output.

    Returns
    -------
    float32 tensor, shape (N, H, W)
        In units of the logit, of both signs: below 0 is evidence against `target`.

    Raises
    ------
    ModelError
        If the model is not of that form: a module is missing, or for these images the head's input
        is not the features' mean (VGG16's is their maximum), or its output not the logit. Or by
        `score`.
    """
    convolutions, linear = _parts(model, features, head)
    with explained(model), torch.no_grad(), _watched(convolutions, linear) as calls:
        scores = score(model, images, target)
    if len(calls) < 2:
        raise ModelError(f"the model does not run {features!r} and {head!r}: {CAM_FORM}")
    (_, values), (pooled, logits) = calls[convolutions], calls[linear]
    _check_average_pooled(values, pooled)
    sign = 1 if target == 1 else -1
    if not _close(sign * logits.squeeze(1), scores):
        raise ModelError(f"the model's output is not that of {head!r}: {CAM_FORM}")
    weights = sign * linear.weight.detach()[0]
    return _upsampled(torch.einsum("k,nkhw->nhw", weights, values.to(weights))[:, None], images)


def _last_activation(model: nn.Module) -> nn.Module:
    """The ReLU behind the last convolution in its nn.Sequential, or the convolution."""
    convolution = find_layer(model)
    for parent in model.modules():
        if isinstance(parent, nn.Sequential) and convolution in list(parent):
            behind = list(parent)[list(parent).index(convolution) + 1 :]
            behind = [module for module in behind if not isinstance(module, nn.BatchNorm2d)]
            if behind and isinstance(behind[0], nn.ReLU):
                return behind[0]
    return convolution


def _parts(model: nn.Module, features: str, head: str) -> tuple[nn.Module, nn.Linear]:
    modules = dict(model.named_modules())
    missing = [name for name in (features, head) if name not in modules]
    if missing:
        raise ModelError(f"the model has no module named {' or '.join(missing)}: {CAM_FORM}")
    if not isinstance(modules[head], nn.Linear) or modules[head].out_features != 1:
        raise ModelError(f"{head} is {modules[head]}, not linear with one output: {CAM_FORM}")
    return modules[features], modules[head]


@contextmanager
def _watched(*modules: nn.Module) -> Iterator[dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]]:
    """Collect, while the model runs, each module's input and output."""
    calls = {}

    def note(module, inputs, output):
        calls[module] = inputs[0], output

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _check_average_pooled(values: torch.Tensor, pooled: torch.Tensor) -> None:
    """Raise ModelError unless the head's input is the feature maps' mean.

    Every channel is compared: the logits alone could agree by chance.
    """
    if values.ndim != 4 or values.shape[:2] != pooled.shape:
        raise ModelError(
            f"feature maps of shape {tuple(values.shape)} and a head's input of shape"
            f" {tuple(pooled.shape)} do not belong together: {CAM_FORM}"
        )
    if not _close(values.mean(dim=(2, 3)), pooled):
        raise ModelError(f"the head's input is not the mean of the feature maps: {CAM_FORM}")


def _close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool((first - second).abs().max() <= TOLERANCE * second.abs().max())


def _upsampled(maps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Maps (N, 1, h, w) at the images' height and width, as float32 (N, H, W)."""
    size = images.shape[-2:]
    return functional.interpolate(maps.detach().float(), size, mode="bilinear")[:, 0]
