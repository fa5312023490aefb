"""Activation maximisation: the input that a class or a unit of a network responds to most."""

from dataclasses import dataclass

import torch
from torch import nn

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.explain.explained_model import explained, neuron_values

START_STD = 0.1
"""Standard deviation of the noise that the ascent starts from, in normalised colours."""


@dataclass(frozen=True)
class Maximised:
    """An input found by gradient ascent.

    Attributes
    ----------
    image : float tensor, shape (3, size_px, size_px)
        Normalised, on the model's device.
    objective : float64 tensor, shape (steps + 1,)
        y(x) - penalty * ||x||^2 before the first step and after each; the last is the image's.
    """

    image: torch.Tensor
    objective: torch.Tensor


def activation_maximisation(
    model: nn.Module,
    *,
    target: int = 1,
    layer: str | None = None,
    unit: int | None = None,
    size_px: int = 224,
    steps: int = 200,
    learning_rate: float = 1.0,
    penalty: float = 1e-3,
    seed: int = 0,
) -> Maximised:
    """Ascend the gradient of y_i(x) - lambda * ||x||^2 from faint noise (Lecture).

    y_i is the logit (its negative for target 0), not the probability, which saturates; or the
    activity of a unit, see `wsi_pipeline.explain.explained_model.neuron_values`. ||x|| is the norm
    over all pixels and channels of the normalised image: the penalty draws towards the mean colour.
    Each step is x + learning_rate * gradient, without momentum. The lecture names neither a start
    nor a step; an all-zero start would be the same for every `seed`, and may be a point where no
    ReLU responds.

    Parameters
    ----------
    model : nn.Module
    target : {1, 0}
        Where there is no `unit`.
    layer : str or None
        Dotted name of the unit's layer; None for the last convolution.
    unit : int or None
        None for the score of `target`.
    size_px : int
        Side of the image.
    steps : int
    learning_rate, penalty : float
        Over 0, and 0 or more (lambda). Their product must be under 1: from there on each step
        would overshoot the penalty's minimum by more than it was away.
    seed : int
        Of the noise; torch's global generator is left as it was.

    Returns
    -------
    Maximised

    Raises
    ------
    ConfigError
        If a number is outside of its range.
    ModelError
        As `neuron_values`.
    """
    _check(size_px, steps, learning_rate, penalty)
    like = next(model.parameters(), torch.empty(0))
    noise = torch.randn((1, 3, size_px, size_px), generator=torch.Generator().manual_seed(seed))
    image = (START_STD * noise).to(like)
    course = []
    with explained(model), torch.enable_grad():
        for step in range(steps + 1):
            image = image.detach().requires_grad_()
            activity = neuron_values(model, image, target=target, layer=layer, unit=unit).sum()
            objective = activity - penalty * image.square().sum()
            course.append(objective.item())
            if step < steps:
                image = image + learning_rate * torch.autograd.grad(objective, image)[0]
    return Maximised(image.detach()[0], torch.tensor(course, dtype=torch.float64))


def _check(size_px: int, steps: int, learning_rate: float, penalty: float) -> None:
    for name, value in (("size_px", size_px), ("steps", steps)):
        if value < 1:
            raise ConfigError(f"{name} is {value}: it must be 1 or more")
    if learning_rate <= 0 or penalty < 0:
        raise ConfigError(
            f"learning_rate is {learning_rate} and penalty {penalty}: they must be over 0, and"
            " 0 or more"
        )
    if learning_rate * penalty >= 1:
        raise ConfigError(
            f"learning_rate is {learning_rate} and penalty {penalty}: their product must be under"
            " 1, or the ascent does not settle"
        )
