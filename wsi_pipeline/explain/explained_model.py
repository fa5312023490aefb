"""What explanation methods share: the score, layers and units, and a model left as it was.

A method is a function ``method(model, images, ..., target=1) -> maps``: `model` maps normalised
images (N, 3, H, W) to logits (N,), and a map (H, W) comes back for each image.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from wsi_pipeline.errors import ModelError


@contextmanager
def explained(model: nn.Module) -> Iterator[None]:
    """Hold a model ready to be explained, and leave it as it was.

    Within: evaluation mode, parameters that ask for no gradient, and no module that works in place
    (hooks and guided gradients need the values that an in-place ReLU would overwrite). Afterwards,
    errors included, each module has its own mode and each parameter its own flag and gradient.
    """
    modes = [(module, module.training) for module in model.modules()]
    in_place = [module for module, _ in modes if getattr(module, "inplace", False)]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for module in in_place:
            setattr(module, "inplace", False)  # noqa: B010 (of ReLU, Dropout and their like)
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module in in_place:
            setattr(module, "inplace", True)  # noqa: B010
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


def score(model: nn.Module, images: torch.Tensor, target: int = 1) -> torch.Tensor:
    """What is explained: the logit for class 1, its negative for class 0.

    Parameters
    ----------
    model : nn.Module
    images : float tensor, shape (N, 3, H, W)
        Normalised.
    target : {1, 0}

    Returns
    -------
    tensor, shape (N,)

    Raises
    ------
    ModelError
        If `target` is another number, or the model gives anything but one logit an image.
    """
    check_target(target)
    logits = model(images)
    if logits.shape != images.shape[:1]:
        raise ModelError(
            f"the model gives an output of shape {tuple(logits.shape)} for {len(images)} images:"
            " explanations need one logit for each"
        )
    return logits if target == 1 else -logits


def check_target(target: int) -> None:
    """Refuse any target but 1 and 0, by a ModelError."""
    if target not in (0, 1):
        raise ModelError(f"target is {target!r}: it must be 1 (tumour) or 0 (no tumour)")


def find_layer(model: nn.Module, name: str | None = None) -> nn.Module:
    """The module with a dotted name, or the last convolution.

    Parameters
    ----------
    model : nn.Module
    name : str or None
        As in ``model.named_modules()``; None for the last ``nn.Conv2d`` in that order.

    Raises
    ------
    ModelError
        If there is none; the message lists the convolutions.
    """
    modules = dict(model.named_modules())
    convolutions = [key for key, module in modules.items() if isinstance(module, nn.Conv2d)]
    if name is None and convolutions:
        return modules[convolutions[-1]]
    if name in modules and name:
        return modules[name]
    raise ModelError(
        f"layer {name!r} is not in the model; its convolutions are {', '.join(convolutions)}"
        if convolutions
        else "the model has no convolution, and no layer was named"
    )


def neuron_values(
    model: nn.Module,
    images: torch.Tensor,
    *,
    target: int = 1,
    layer: str | None = None,
    unit: int | None = None,
) -> torch.Tensor:
    """The lecture's y_i(x): the score of `target`, or the activity of one unit of a layer.

    A unit of a convolutional layer is one of its kernels; its activity is the largest value of its
    feature map, which is what global max pooling would hand on. Gradients flow to `images`. To be
    called within `explained`.

    Parameters
    ----------
    model : nn.Module
    images : float tensor, shape (N, 3, H, W)
        Normalised.
    target : {1, 0}
        Where there is no `unit`.
    layer : str or None
        Dotted name of the unit's layer; None for the last convolution.
    unit : int or None
        Index along the second axis of the layer's output; None for the score.

    Returns
    -------
    tensor, shape (N,)

    Raises
    ------
    ModelError
        As `score` and `find_layer`; if the layer has no such unit, or is named without a unit.
    """
    if unit is None:
        if layer is not None:
            raise ModelError(f"layer {layer!r} is named without a unit of it")
        return score(model, images, target)
    outputs = layer_outputs(model, images, layer)
    if not 0 <= unit < outputs.shape[1]:
        raise ModelError(f"unit is {unit}: the layer has units 0 to {outputs.shape[1] - 1}")
    return outputs[:, unit].reshape(len(images), -1).amax(1)


def layer_outputs(model: nn.Module, images: torch.Tensor, layer: str | None = None) -> torch.Tensor:
    """What a layer hands on for images, before anything that follows it; within `explained`.

    Raises
    ------
    ModelError
        As `find_layer`; if the model does not call the layer.
    """
    outputs = []
    hook = find_layer(model, layer).register_forward_hook(lambda *call: outputs.append(call[2]))
    try:
        model(images)
    finally:
        hook.remove()
    if not outputs:
        raise ModelError(f"the model does not call layer {layer!r}")
    return outputs[-1]
