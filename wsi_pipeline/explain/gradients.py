"""Gradients of the score by pixel: plain, averaged over noise, and with other rules at ReLUs.

Every map is the largest absolute value among the colour channels (as Simonyan et al. 2013). The
sign of such a gradient says whether the pixel should become brighter or darker for a higher score,
not whether it speaks for or against the target; its size says how much the pixel matters.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.autograd.graph import Node

from wsi_pipeline.errors import ConfigError, ModelError
from wsi_pipeline.explain.explained_model import explained, score

Gradients = tuple[torch.Tensor]
Rule = Callable[[Gradients, Gradients], Gradients]
"""From the gradients by a ReLU's input and by its output: what to pass on for the former."""


def saliency(model: nn.Module, images: torch.Tensor, *, target: int = 1) -> torch.Tensor:
    """How strongly each pixel changes the score: ``max_c |d score / d x_c|`` (Simonyan et al.).

    Parameters
    ----------
    model : nn.Module
    images : float tensor, shape (N, 3, H, W)
        Normalised. The gradient is by these values, not by the slide's colours.
    target : {1, 0}
        The map is the same for both: a score and its negative change alike.

    Returns
    -------
    float32 tensor, shape (N, H, W)
        0 or more, score per unit of the image; higher is more influence.

    Raises
    ------
    ModelError
        By `score`.
    """
    return _largest_channel(_gradient(model, images, target))


def smooth_grad(
    model: nn.Module,
    images: torch.Tensor,
    *,
    target: int = 1,
    samples: int = 25,
    noise: float = 0.15,
    seed: int = 0,
    method: Callable[..., torch.Tensor] = saliency,
) -> torch.Tensor:
    """SmoothGrad: the mean of the maps of noisy copies (Lecture; Smilkov et al. 2017).

    Each copy is the image plus independent normal noise. The mean is of maps, hence of absolute
    values, as in the lecture; the paper's formula has the mean of the gradients themselves. One
    noisy copy of each image is explained at a time, in the memory that `method` takes for `images`.
    All images get the same `samples` noises, each times its own deviation, so that a map does not
    depend on the rest of the batch.

    Parameters
    ----------
    model : nn.Module
    images : float tensor, shape (N, 3, H, W)
        Normalised.
    target : {1, 0}
    samples : int
        Copies of each image.
    noise : float
        Standard deviation, as a share of the image's range (its largest value less its smallest);
        the paper advises 0.1 to 0.2.
    seed : int
        Of the noise. torch's global generator is left as it was.
    method : callable
        What is averaged: `saliency`, `guided_backpropagation` (as iterative unveiling does) or any
        other method of the form ``method(model, images, target=...)``.

    Returns
    -------
    float32 tensor, shape (N, H, W)
        In the method's units.

    Raises
    ------
    ConfigError
        If `samples` is under 1 or `noise` is negative.
    ModelError
        By `method`.
    """
    if samples < 1:
        raise ConfigError(f"samples is {samples}: it must be 1 or more")
    if not noise >= 0:
        raise ConfigError(f"noise is {noise}: it must be 0 or more")
    images = images.detach()
    extent = images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True)
    generator = torch.Generator().manual_seed(seed)  # of the CPU: the same noise on any device
    total = torch.zeros(())
    for _ in range(samples):
        normal = torch.randn(images.shape[1:], generator=generator).to(images)
        total = total + method(model, images + noise * extent * normal, target=target)
    return total / samples


def guided_backpropagation(
    model: nn.Module, images: torch.Tensor, *, target: int = 1
) -> torch.Tensor:
    """Guided backpropagation (Springenberg et al. 2015): only positive gradients pass a ReLU.

    A ReLU with input x and gradient g by its output passes back ``g [g > 0] [x > 0]``.

    Parameters
    ----------
    model : nn.Module
        With ReLUs, as modules or as functions, in place or not.
    images : float tensor, shape (N, 3, H, W)
        Normalised.
    target : {1, 0}
        The two maps differ: other gradients are positive.

    Returns
    -------
    float32 tensor, shape (N, H, W)
        0 or more; higher is more evidence for `target`, since all that arrives came through
        positive gradients alone.

    Raises
    ------
    ModelError
        If the model uses no ReLU, or by `score`.
    """
    return _largest_channel(_gradient(model, images, target, _guided))


def deconvolution(model: nn.Module, images: torch.Tensor, *, target: int = 1) -> torch.Tensor:
    """Deconvolution (Zeiler and Fergus 2014): the ReLU is applied to what goes back through it.

    A ReLU with gradient g by its output passes back ``g [g > 0]``, whatever its input was. The
    gradient of max pooling is the paper's unpooling by switches, and that of a convolution its
    transposed convolution (Simonyan et al. 2013, section 4). Other than in the paper, the start is
    the score, not one unit of a feature map.

    Parameters
    ----------
    model : nn.Module
        With ReLUs, as modules or as functions, in place or not.
    images : float tensor, shape (N, 3, H, W)
        Normalised.
    target : {1, 0}
        The two maps differ: other gradients are positive.

    Returns
    -------
    float32 tensor, shape (N, H, W)
        0 or more; higher is more evidence for `target`.

    Raises
    ------
    ModelError
        If the model uses no ReLU, or by `score`.
    """
    return _largest_channel(_gradient(model, images, target, _deconvolved))


def _guided(by_input: Gradients, by_output: Gradients) -> Gradients:
    return (by_input[0].clamp(min=0),)


def _deconvolved(by_input: Gradients, by_output: Gradients) -> Gradients:
    return (by_output[0].clamp(min=0),)


def _gradient(
    model: nn.Module, images: torch.Tensor, target: int, rule: Rule | None = None
) -> torch.Tensor:
    """Gradient of the score by the images, with a rule of its own at every ReLU."""
    with explained(model), torch.enable_grad():
        pixels = images.detach().requires_grad_()
        scores = score(model, pixels, target)
        if rule is not None and scores.grad_fn is not None:
            _set_rule(scores.grad_fn, rule)
        return torch.autograd.grad(scores.sum(), pixels)[0]


def _set_rule(last: Node, rule: Rule) -> None:
    """Put a rule on every ReLU among the steps that autograd kept.

    Unlike a hook on ``nn.ReLU`` modules (captum's way), this meets ``torch.relu`` too, which
    PatchNet uses, and a module called twice; and nothing is left on the model.
    """
    relus = [node for node in _nodes(last) if node.name() == "ReluBackward0"]
    if not relus:
        raise ModelError("the model uses no ReLU: this method would be the plain gradient")
    for node in relus:
        node.register_hook(rule)


def _nodes(last: Node) -> Iterator[Node]:
    """Every step of the graph that autograd kept, once."""
    seen, waiting = {last}, [last]
    while waiting:
        node = waiting.pop()
        yield node
        behind = {step for step, _ in node.next_functions if step is not None} - seen
        seen |= behind
        waiting.extend(behind)


def _largest_channel(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.abs().amax(dim=1).float()
