"""Iterative unveiling (Bordes et al.): hide what was found, and look again."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.explain.explained_model import explained, score
from wsi_pipeline.explain.gradients import guided_backpropagation, smooth_grad

guided_smooth_grad = partial(smooth_grad, method=guided_backpropagation)
"""The paper's saliency: the mean of guided backpropagation's maps over noisy copies."""


@dataclass(frozen=True)
class Round:
    """One round over N images. An image that has ended before it has no mask and stays as it was.

    Attributes
    ----------
    maps : float32 tensor, shape (N, H, W)
        Saliency of the images as the round before left them; 0 for images that have ended.
    masks : bool tensor, shape (N, H, W)
        The region found in this round.
    images : float tensor, shape (N, 3, H, W)
        The images with the regions of this and all earlier rounds filled.
    before, after : float tensor, shape (N,), in [0, 1]
        Probability of the target before and after this round's regions were filled.
    """

    maps: torch.Tensor
    masks: torch.Tensor
    images: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor


def unveil(
    model: nn.Module,
    images: torch.Tensor,
    *,
    target: int = 1,
    rounds: int = 5,
    until: float = 0.5,
    fill: float | str = 0.0,
    saliency: Callable[..., torch.Tensor] = guided_smooth_grad,
    kernel_px: int = 11,
    passes: int = 3,
    threshold: float = 0.25,
) -> list[Round]:
    """Find the regions that speak for a class, one after another.

    Each round takes a saliency map of the images, smooths it to a region (`smooth_to_region`),
    fills that region in the images and predicts again. An image ends when the probability of the
    target falls under `until`, and is left alone from there on; one that starts under it has no
    round.

    Parameters
    ----------
    model : nn.Module
    images : float tensor, shape (N, 3, H, W)
        Normalised, on the model's device.
    target : {1, 0}
    rounds : int
        The largest number of rounds; the paper's 5.
    until : float
        Probability in [0, 1]. The paper leaves it open.
    fill : float or "mean"
        What hides a region: a value in normalised colours (0 is the mean colour that the model was
        normalised by), or the mean colour of each image, from before the first round. The paper
        does not say what it fills with.
    saliency : callable
        A method of the form ``saliency(model, images, target=target) -> maps``, of shape
        (N, H, W).
    kernel_px, passes, threshold
        As for `smooth_to_region`.

    Returns
    -------
    list of Round
        Empty if no image starts with a probability of `until` or more.

    Raises
    ------
    ConfigError
        If a setting is outside of its range.
    ModelError
        By `saliency`, or as `wsi_pipeline.explain.explained_model.score`.
    """
    if rounds < 1 or not 0 <= until <= 1:
        raise ConfigError(
            f"rounds is {rounds} and until {until}: they must be 1 or more, and a probability"
        )
    images = images.detach()
    colour = _fill_colour(images, fill)
    found: list[Round] = []
    before = _probability(model, images, target)
    while len(found) < rounds and (goes_on := before >= until).any():
        maps = images.new_zeros((len(images), *images.shape[2:]), dtype=torch.float32)
        maps[goes_on] = saliency(model, images[goes_on], target=target).float()
        masks = smooth_to_region(maps, kernel_px=kernel_px, passes=passes, threshold=threshold)
        images = torch.where(masks[:, None], colour, images)
        after = _probability(model, images, target)
        found.append(Round(maps, masks, images, before, after))
        before = after
    return found


def unveiled_regions(
    model: nn.Module, images: torch.Tensor, *, target: int = 1, **settings
) -> torch.Tensor:
    """The union of all rounds' regions: unveiling in the common call form.

    Parameters
    ----------
    model, images, target
        As for `unveil`.
    **settings
        The other arguments of `unveil`.

    Returns
    -------
    float32 tensor, shape (N, H, W), 0 or 1
        1 in the regions that speak for `target`.
    """
    union = torch.zeros((len(images), *images.shape[2:]), dtype=torch.bool, device=images.device)
    for each in unveil(model, images, target=target, **settings):
        union |= each.masks
    return union.float()


def smooth_to_region(
    maps: torch.Tensor, *, kernel_px: int = 11, passes: int = 3, threshold: float = 0.25
) -> torch.Tensor:
    """Smooth saliency maps to regions: convolve with ones, threshold, and again.

    A pass replaces each pixel by the mean over the square around it, then by 1 where that is over
    `threshold` times the map's largest such mean, and by 0 elsewhere. The first pass works on the
    saliency, the others on zeros and ones. The paper convolves three times with 11 x 11 ones and
    gives no threshold. It says that more passes make larger regions, which holds under 1/2: at 1/2
    a pixel takes the value of most of its neighbours, and a straight border stays where it is.

    Parameters
    ----------
    maps : float tensor, shape (N, H, W)
        What is negative counts as 0.
    kernel_px : int
        Side of the square, odd. At the border, the mean is over what lies within the map.
    passes : int
        1 or more.
    threshold : float
        In [0, 1).

    Returns
    -------
    bool tensor, shape (N, H, W)
        All False where a map has nothing positive.

    Raises
    ------
    ConfigError
        If a number is outside of its range.
    """
    if kernel_px < 1 or kernel_px % 2 == 0 or passes < 1 or not 0 <= threshold < 1:
        raise ConfigError(
            f"kernel_px is {kernel_px}, passes {passes} and threshold {threshold}: they must be"
            " odd, 1 or more, and in [0, 1)"
        )
    region = maps.clamp(min=0)
    for _ in range(passes):
        means = functional.avg_pool2d(
            region[:, None], kernel_px, stride=1, padding=kernel_px // 2, count_include_pad=False
        )[:, 0]
        region = (means > threshold * means.amax((1, 2), keepdim=True)).to(maps)
    return region.bool()


def _fill_colour(images: torch.Tensor, fill: float | str) -> torch.Tensor:
    if fill == "mean":
        return images.mean((2, 3), keepdim=True)
    if isinstance(fill, str):
        raise ConfigError(f"fill is {fill!r}: it must be a number or 'mean'")
    return images.new_tensor(fill)


def _probability(model: nn.Module, images: torch.Tensor, target: int) -> torch.Tensor:
    with explained(model), torch.no_grad():
        return torch.sigmoid(score(model, images, target))
