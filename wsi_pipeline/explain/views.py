"""Views of a model itself (Lecture): its first filters, feature maps, representative inputs."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from wsi_pipeline.errors import ConfigError, ModelError
from wsi_pipeline.explain.explained_model import explained, layer_outputs, neuron_values


@dataclass(frozen=True)
class Representatives:
    """The inputs that a class or a unit responds to most, the strongest first.

    Attributes
    ----------
    images : float tensor, shape (K, 3, H, W)
    values : float tensor, shape (K,)
        Logit or activity, see `wsi_pipeline.explain.explained_model.neuron_values`.
    places : int64 tensor, shape (K,)
        Each one's place, from 0, among all inputs in their order.
    """

    images: torch.Tensor
    values: torch.Tensor
    places: torch.Tensor


def first_layer_filters(model: nn.Module) -> np.ndarray:
    """Pictures of the first convolution's filters: the weights of each as one RGB image.

    Returns
    -------
    uint8 array, shape (filters, h, w, 3)
        128 for a weight of 0; 1 or 255 for the largest magnitude of each filter.

    Raises
    ------
    ModelError
        If the model has no convolution, or its first one does not take three channels.
    """
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    if first is None:
        raise ModelError("the model has no convolution")
    weights = first.weight.detach().float().cpu().numpy()
    if weights.shape[1] != 3:
        raise ModelError(
            f"the first convolution's filters have {weights.shape[1]} channels: pictures need 3"
        )
    largest = np.abs(weights).max(axis=(1, 2, 3), keepdims=True)
    scaled = np.divide(weights, largest, out=np.zeros_like(weights), where=largest > 0)
    return np.round(128 + 127 * scaled.transpose(0, 2, 3, 1)).astype(np.uint8)


def feature_maps(model: nn.Module, images: torch.Tensor, layer: str | None = None) -> torch.Tensor:
    """What a layer hands on for images.

    Of a convolution these are the values before the ReLU that follows, also an in-place one: name
    the ReLU to see the rectified ones.

    Parameters
    ----------
    model : nn.Module
    images : float tensor, shape (N, 3, H, W)
        Normalised, on the model's device.
    layer : str or None
        Dotted name; None for the last convolution.

    Returns
    -------
    tensor, shape (N, C, h, w)

    Raises
    ------
    ModelError
        If there is no such layer, or the model does not call it.
    """
    with explained(model), torch.no_grad():
        return layer_outputs(model, images, layer)


def most_representative(
    model: nn.Module,
    batches: Iterable[torch.Tensor],
    *,
    target: int = 1,
    layer: str | None = None,
    unit: int | None = None,
    top: int = 9,
) -> Representatives:
    """The inputs of the highest y_i: of the logit, or of a unit's activity.

    Batches are read once; only the best `top` inputs so far are kept. Of equal inputs those that
    came first stay.

    Parameters
    ----------
    model : nn.Module
    batches : iterable of float tensors, shape (N, 3, H, W)
        Normalised, on the model's device; all of one H and W.
    target : {1, 0}
        Where there is no `unit`.
    layer : str or None
        Dotted name of the unit's layer; None for the last convolution.
    unit : int or None
        None for the score of `target`.
    top : int
        1 or more.

    Returns
    -------
    Representatives
        Fewer than `top` if there were fewer inputs.

    Raises
    ------
    ConfigError
        If `top` is under 1, or there are no batches.
    ModelError
        As `neuron_values`.
    """
    if top < 1:
        raise ConfigError(f"top is {top}: it must be 1 or more")
    best, seen = None, 0
    with explained(model), torch.no_grad():
        for images in batches:
            values = neuron_values(model, images, target=target, layer=layer, unit=unit)
            places = torch.arange(seen, seen + len(images), device=values.device)
            best = _strongest(best, Representatives(images, values, places), top)
            seen += len(images)
    if best is None:
        raise ConfigError("there are no batches to find representative inputs in")
    return best


def _strongest(best: Representatives | None, new: Representatives, top: int) -> Representatives:
    images, values, places = new.images, new.values, new.places
    if best is not None:
        images = torch.cat([best.images, images])
        values = torch.cat([best.values, values])
        places = torch.cat([best.places, places])
    order = values.argsort(descending=True, stable=True)[:top]
    return Representatives(images[order], values[order], places[order])
