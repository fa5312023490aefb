"""Whether a map can be trusted: it must depend on the model, and point at what the score needs.

Two checks. A map that stays the same when the model's weights are drawn anew shows the image, not
the model (`randomised`, `similarity`). A map that ranks the pixels well lets the score fall soon
when they are deleted in its order, and rise soon when they are inserted
(`deletion_and_insertion`).
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from wsi_pipeline.errors import ConfigError, ModelError
from wsi_pipeline.explain.explained_model import explained, score
from wsi_pipeline.seeds import derived_seed


@dataclass(frozen=True)
class Curves:
    """Probability of the target while N images are deleted and inserted, in S steps.

    Attributes
    ----------
    fraction : float64 array, shape (S + 1,), 0 to 1
        Of the pixels, deleted or inserted so far.
    deletion, insertion : float32 array, shape (N, S + 1), in [0, 1]
        Deletion starts at the whole image and ends at none of it, insertion the other way round.
    """

    fraction: np.ndarray
    deletion: np.ndarray
    insertion: np.ndarray

    @property
    def deletion_area(self) -> np.ndarray:
        """Area under each deletion curve (trapezoids), shape (N,), 0 to 1; lower is better."""
        return np.trapezoid(self.deletion, self.fraction, axis=1)

    @property
    def insertion_area(self) -> np.ndarray:
        """Area under each insertion curve (trapezoids), shape (N,), 0 to 1; higher is better."""
        return np.trapezoid(self.insertion, self.fraction, axis=1)


def randomised(
    model: nn.Module, seed: int = 0, *, layers: Sequence[str] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Cascading randomisation: draw the weights anew, layer by layer from the head down.

    The check of Adebayo et al. (2018, Sanity checks for saliency maps). Each parameter is drawn
    from a normal distribution about 0 with the root mean square of its own values, so that signals
    keep their scale. (The paper draws as before training. Permuting the values instead would leave
    a single bias as it is, and nearly so a layer of nearly equal weights.) What is 0 throughout
    stays 0. Buffers, such as batch normalisation's running mean and variance, are left alone.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    seed : int
        What a parameter becomes depends on this, its name and its root mean square alone. torch's
        global generator is left as it was.
    layers : sequence of str or None
        Modules with parameters of their own, as in ``model.named_modules()``, the last first. None
        for all of them in the reverse of that order, which is the order in which the modules were
        defined: right for VGG16, while PatchNet's readout, which is a parameter of its subnet
        itself, would come after the subnet's convolutions.

    Yields
    ------
    (str, nn.Module)
        A layer's name, and the model with this layer and those before it drawn anew. It is the one
        copy every time, changed in place: take what you need of it before asking for the next.

    Raises
    ------
    ModelError
        If the model has no parameters, or a layer is not there or has none of its own.
    """
    own = _layers_with_parameters(model)
    chosen = list(reversed(own)) if layers is None else list(layers)
    wrong = [name for name in chosen if name not in own]
    if wrong or not chosen:
        raise ModelError(
            f"layers {wrong or chosen}: each must be a module with parameters of its own; those of"
            f" the model are {', '.join(map(repr, own)) or 'none'}"
        )
    return _cascade(deepcopy(model), chosen, seed)


def similarity(maps: torch.Tensor, others: torch.Tensor) -> np.ndarray:
    """Spearman's rank correlation of two maps' absolute values, image by image.

    Adebayo et al. (2018) take it with and without the absolute values; with them a map that has
    merely changed its sign counts as the same, as it looks. Equal values share their mean rank.

    Parameters
    ----------
    maps, others : float tensor, shape (N, H, W)

    Returns
    -------
    float64 array, shape (N,), in [-1, 1]
        1 for the same order of pixels, about 0 for unrelated ones. NaN where one of the two is
        constant, since it ranks no pixel: a method can give a map of zeros for a randomised model
        whose units are all silent. Take means with ``numpy.nanmean`` and tell how many are missing.

    Raises
    ------
    ConfigError
        If the shapes differ or are not those of maps, or a value is NaN or infinite.
    """
    if maps.ndim != 3 or maps.shape != others.shape:
        raise ConfigError(
            f"maps of shape {tuple(maps.shape)} and {tuple(others.shape)}: both must be (N, H, W)"
        )
    _check_finite(maps)
    _check_finite(others)
    pairs = zip(_magnitudes(maps), _magnitudes(others), strict=True)
    return np.array([_rank_correlation(first, second) for first, second in pairs])


def deletion_and_insertion(
    model: nn.Module,
    images: torch.Tensor,
    maps: torch.Tensor,
    *,
    target: int = 1,
    steps: int = 20,
    fill: float = 0.0,
    batch_size: int = 16,
) -> Curves:
    """RISE's curves: the probability while pixels go or come, the most important first.

    Deletion replaces pixels of the image by `fill`; insertion puts them into an image of `fill`
    (Petsiuk et al. 2018). Deviation: the paper inserts into a blurred image, here too it is `fill`,
    so that the curves start and end at the same two probabilities. After k steps
    ``round(k H W / steps)`` pixels have gone or come. Pixels of equal value go row by row from the
    upper left: the curves of a map with few values depend on this order.

    Parameters
    ----------
    model : nn.Module
    images : float tensor, shape (N, 3, H, W)
        Normalised, on the model's device.
    maps : float tensor, shape (N, H, W)
        Higher is more important; the sign counts.
    target : {1, 0}
        Whose probability is shown.
    steps : int
        From 1 to H W.
    fill : float
        In all channels; 0 is the mean colour of the normalisation.
    batch_size : int
        Images in one run of the model.

    Returns
    -------
    Curves

    Raises
    ------
    ConfigError
        If `maps` are not one for each image, hold NaN or infinity, or a number is out of its range.
    ModelError
        By `wsi_pipeline.explain.explained_model.score`.
    """
    _check_curves(images, maps, steps, batch_size)
    pixels = maps[0].numel()
    counts = torch.tensor([round(step * pixels / steps) for step in range(steps + 1)])
    deletion, insertion = [], []
    with explained(model), torch.no_grad():
        for image, ranks in zip(images.detach(), _ranks(maps), strict=True):
            taken = ranks < counts[:, None, None]
            deletion.append(_probabilities(model, image, taken, target, fill, batch_size))
            insertion.append(_probabilities(model, image, ~taken, target, fill, batch_size))
    return Curves(counts.numpy() / pixels, np.stack(deletion), np.stack(insertion))


def _layers_with_parameters(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if list(module.parameters(False))]


def _cascade(copy: nn.Module, layers: list[str], seed: int) -> Iterator[tuple[str, nn.Module]]:
    modules = dict(copy.named_modules())
    for layer in layers:
        for name, parameter in modules[layer].named_parameters(recurse=False):
            _draw_anew(parameter, derived_seed(seed, f"{layer}.{name}"))
        yield layer, copy


@torch.no_grad()
def _draw_anew(parameter: nn.Parameter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)  # of the CPU: the same on any device
    deviation = parameter.double().square().mean().sqrt()
    parameter.copy_(deviation * torch.randn(parameter.shape, generator=generator).to(parameter))


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return np.nan
    return spearmanr(first, second).statistic


def _magnitudes(maps: torch.Tensor) -> np.ndarray:
    return maps.detach().abs().flatten(1).cpu().numpy()


def _ranks(maps: torch.Tensor) -> torch.Tensor:
    """Each pixel's place, from 0, in its map's order: int64 (N, H, W), on the CPU."""
    order = maps.detach().cpu().flatten(1).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1).view(maps.shape)


def _probabilities(
    model: nn.Module,
    image: torch.Tensor,
    covered: torch.Tensor,
    target: int,
    fill: float,
    batch_size: int,
) -> np.ndarray:
    """Of the target, for an image (3, H, W) covered in (K, H, W) ways: float32 (K,)."""
    found = []
    for part in covered.split(batch_size):
        batch = torch.where(part[:, None].to(image.device), fill, image)
        found.append(torch.sigmoid(score(model, batch, target)).float().cpu())
    return torch.cat(found).numpy()


def _check_curves(images: torch.Tensor, maps: torch.Tensor, steps: int, batch_size: int) -> None:
    wanted = (len(images), *images.shape[2:])
    if tuple(maps.shape) != wanted or not maps.numel():
        raise ConfigError(
            f"maps are of shape {tuple(maps.shape)} for images of shape {tuple(images.shape)}:"
            " there must be one map for each image, of its height and width, and one or more"
        )
    _check_finite(maps)
    if not 1 <= steps <= maps[0].numel() or batch_size < 1:
        raise ConfigError(
            f"steps is {steps} and batch_size {batch_size}: they must be from 1 to the number of"
            f" pixels, {maps[0].numel()}, and 1 or more"
        )


def _check_finite(maps: torch.Tensor) -> None:
    if not maps.isfinite().all():
        raise ConfigError(
            f"{int((~maps.isfinite()).sum())} values of the maps are NaN or infinite: pixels are"
            " ranked by numbers"
        )
