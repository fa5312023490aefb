"""What the score does when parts of the image are covered: occlusion and LIME.

Both run the model on hundreds of covered copies of each image: minutes for a VGG16 patch of 512 px
on a CPU, seconds on a GPU.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from captum.attr import Occlusion
from skimage.segmentation import slic
from sklearn.linear_model import Lasso
from torch import nn

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.explain.explained_model import explained, score

KERNEL_WIDTH = 0.25
"""Of LIME's kernel, in cosine distance."""


def occlusion(
    model: nn.Module,
    images: torch.Tensor,
    *,
    target: int = 1,
    window_px: int = 32,
    stride_px: int = 16,
    baseline: float = 0.0,
    batch_size: int = 16,
) -> torch.Tensor:
    """Occlusion: by how much the score falls when a square is covered (Lecture).

    A pixel's value is the mean over the squares that cover it of ``score(image) - score(covered)``
    (Zeiler and Fergus, 2014, show the score itself, at each square's centre). Squares start at the
    upper left corner; the last of a row or column is cut off at the edge.

    Parameters
    ----------
    model : nn.Module
    images : float tensor, shape (N, 3, H, W)
        Normalised.
    target : {1, 0}
        0 gives the negative map.
    window_px, stride_px : int
        Side of the square and its step, px.
    baseline : float
        Value, in all channels, of what is covered; 0 is the mean colour of the normalisation.
    batch_size : int
        Covered images in one run of the model (N if that is more).

    Returns
    -------
    float32 tensor, shape (N, H, W)
        In units of the logit, of both signs; higher is more evidence for `target`.

    Raises
    ------
    ConfigError
        If the window is larger than the image, the stride larger than the window, or a number
        under 1.
    ModelError
        By `score`.
    """
    _check_positive(window_px=window_px, stride_px=stride_px, batch_size=batch_size)
    if window_px > min(images.shape[-2:]) or stride_px > window_px:
        raise ConfigError(
            f"window_px is {window_px} and stride_px {stride_px}: the window must fit into the"
            f" image of {images.shape[-1]} x {images.shape[-2]} px and the stride into the window"
        )
    with explained(model), torch.no_grad():
        drops = Occlusion(partial(score, model, target=target)).attribute(
            images.detach(),
            sliding_window_shapes=(images.shape[1], window_px, window_px),
            strides=(images.shape[1], stride_px, stride_px),
            baselines=baseline,
            perturbations_per_eval=max(1, batch_size // len(images)),
        )
    return drops[:, 0].float()  # the squares cover all channels, which are therefore equal


def lime(
    model: nn.Module,
    images: torch.Tensor,
    *,
    target: int = 1,
    superpixels: int = 100,
    samples: int = 1000,
    sparsity: float = 0.1,
    baseline: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
) -> torch.Tensor:
    """LIME: the weights of a sparse linear model of the score, by superpixel (Lecture).

    For random binary vectors z (each superpixel is there or covered, with probability 1/2), the
    model scores the image with the superpixels of z alone. Every pixel of the map holds the weight
    w of its superpixel that minimises

        sum_z p(z) (score(z) - w_0 - w z)^2 / (2 sum_z p(z)) + alpha |w|_1,
        p(z) = exp(-D(z)^2 / (2 * 0.25^2)),

    D the cosine distance of z from all ones: kernel and distance are those of the authors' code
    for images (Ribeiro et al. 2016; in the paper D is an L2 distance). The Lasso makes w sparse,
    where the paper selects a number of superpixels first. `alpha` is a share of the one that
    leaves no weight at all: a fixed one would leave none for a model whose logits are small.

    Parameters
    ----------
    model : nn.Module
    images : float tensor, shape (N, 3, H, W)
        Normalised.
    target : {1, 0}
        0 gives the negative map.
    superpixels : int
        How many to aim at, see `cut_superpixels`.
    samples : int
        Random vectors; several times `superpixels`.
    sparsity : float
        `alpha` over the one that leaves no weight, above 0 and up to 1. Were the score linear in
        z, weights would come out nearer to 0 by about `sparsity` times the largest, and those
        under that as 0.
    baseline : float
        Value, in all channels, of what is covered; 0 is the mean colour of the normalisation.
    seed : int
        Of the random vectors, image by image the same. torch's global generator is left as it was.
    batch_size : int
        Covered images in one run of the model.

    Returns
    -------
    float32 tensor, shape (N, H, W)
        In units of the logit, of both signs: by how much the score rises when the whole superpixel
        is there; higher is more evidence for `target`.

    Raises
    ------
    ConfigError
        If a number is out of its range.
    ModelError
        By `score`.
    """
    _check_positive(superpixels=superpixels, samples=samples, batch_size=batch_size)
    if not 0 < sparsity <= 1:
        raise ConfigError(f"sparsity is {sparsity}: it must be above 0 and up to 1")
    maps = []
    with explained(model), torch.no_grad():
        for image in images.detach():
            labels = cut_superpixels(image, superpixels)
            present = _presence(samples, labels.max() + 1, seed)
            covered = _covered(image, torch.from_numpy(labels), present, batch_size, baseline)
            scores = torch.cat([score(model, batch, target) for batch in covered])
            weights = _sparse_weights(present.numpy(), scores.double().cpu().numpy(), sparsity)
            maps.append(torch.from_numpy(weights[labels]))
    return torch.stack(maps).to(images.device, torch.float32)


def cut_superpixels(image: torch.Tensor, superpixels: int) -> np.ndarray:
    """Superpixels of an image by SLIC (scikit-image's).

    The values are scaled to 0..1 and taken for RGB, which undoes the normalisation well enough.
    Compactness is 40: at scikit-image's 10, regions of stained tissue are so ragged that half of
    them are lost to the others when each is made connected.

    Parameters
    ----------
    image : float tensor, shape (3, H, W)
    superpixels : int
        How many to aim at; SLIC gives about as many.

    Returns
    -------
    int64 array, shape (H, W)
        Labels from 0, each a connected region.
    """
    pixels = image.float().permute(1, 2, 0).cpu().numpy()
    return slic(pixels, n_segments=superpixels, compactness=40, start_label=0).astype(np.int64)


def _presence(samples: int, superpixels: int, seed: int) -> torch.Tensor:
    """Which superpixels are there, bool (samples, superpixels): any with probability 1/2."""
    generator = torch.Generator().manual_seed(seed)  # of the CPU: the same on any device
    return torch.randint(2, (samples, superpixels), generator=generator).bool()


def _covered(
    image: torch.Tensor, labels: torch.Tensor, present: torch.Tensor, batch_size: int, fill: float
) -> Iterator[torch.Tensor]:
    """The image (3, H, W) with the present superpixels alone, in batches (B, 3, H, W)."""
    for rows in present.split(batch_size):
        there = rows[:, labels].to(image.device)
        yield torch.where(there[:, None], image, fill)


def _sparse_weights(present: np.ndarray, scores: np.ndarray, sparsity: float) -> np.ndarray:
    """The Lasso's weights (superpixels,), by presence (samples, superpixels) and scores."""
    distance = 1 - np.sqrt(present.mean(axis=1))  # the cosine of z and all ones is a root of a mean
    closeness = np.exp(-(distance**2) / (2 * KERNEL_WIDTH**2))
    share = closeness / closeness.sum()
    by_weight = share * (scores - share @ scores) @ (present - share @ present)
    alpha = sparsity * np.abs(by_weight).max()  # at sparsity 1, w = 0 is the minimum
    if alpha == 0:  # the score is always the same
        return np.zeros(present.shape[1])
    return Lasso(alpha=alpha).fit(present, scores, sample_weight=closeness).coef_


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name} is {number}: it must be 1 or more")
