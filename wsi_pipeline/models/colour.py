"""Gamma and illuminant of images: PatchNet's preprocessing of dermoscopic pictures."""

import math

import torch
from torch.linalg import vector_norm
from torch.nn.functional import normalize

from wsi_pipeline.errors import ModelError


def correct_gamma(images: torch.Tensor, gamma: float) -> torch.Tensor:
    """Raise pixel values to the power 1 / gamma: a gamma over 1 makes them brighter.

    The PatchNet paper applies "gamma correction with a gamma value of 2.2", after Matsunaga et
    al. (Image classification of melanoma, nevus and seborrheic keratosis by deep neural network
    ensemble, 2017), and does not say in which direction. Public implementations of the
    preprocessing of that challenge's entries take 1 / gamma, and so does this one.

    Parameters
    ----------
    images : float tensor, shape (N, 3, H, W)
        In 0..1: not checked, a GPU would have to be waited for. A negative value becomes NaN.
    gamma : float
        Over 0; 1 changes nothing.

    Returns
    -------
    tensor, shape (N, 3, H, W)
        In 0..1.

    Raises
    ------
    ModelError
        If gamma is not over 0 and finite, or the images are of another shape or type.
    """
    _check_images(images)
    if not 0 < gamma < math.inf:
        raise ModelError(f"gamma is {gamma}: it must be over 0 and finite")
    return images ** (1 / gamma)


def shades_of_gray(images: torch.Tensor, p: float = 6) -> torch.Tensor:
    """Take each image's illuminant out of it: the paper's colour constancy.

    Barata et al., Improving dermoscopy image classification using color constancy, IEEE JBHI
    2015: channel c of the illuminant is e_c = (mean I_c^p)^(1/p), the mean over the image's
    pixels. With e scaled to unit length, channel c becomes I_c / (sqrt(3) e_c), so that a grey
    illuminant changes nothing. p = 1 is the gray world assumption, p to infinity max-RGB.

    Clipped to 0..1, which the formula can exceed. A channel that is 0 everywhere has no
    illuminant and stays 0, and so does a black image.

    Each image has its illuminant of its own: in a slide, a patch's colours then depend on all
    of the patch, and patches that overlap show the same tissue in different colours.

    Parameters
    ----------
    images : float tensor, shape (N, 3, H, W)
        In 0..1 (not checked).
    p : float
        1 or more; 6 in Barata et al.

    Returns
    -------
    tensor, shape (N, 3, H, W)
        In 0..1.

    Raises
    ------
    ModelError
        If p is not finite or under 1, or the images are of another shape or type.
    """
    _check_images(images)
    if not 1 <= p < math.inf:
        raise ModelError(f"p is {p}: shades of gray need a finite p of 1 or more")
    # By each channel's largest value, since dark values to the power p would underflow. The number
    # of pixels under the mean is the same for the three channels: unit length takes it out.
    peak = images.amax(dim=(2, 3), keepdim=True)
    scaled = images / peak.clamp(min=torch.finfo(images.dtype).tiny)
    illuminant = normalize(peak * vector_norm(scaled, p, dim=(2, 3), keepdim=True), dim=1)
    gain = torch.where(illuminant > 0, 1 / (math.sqrt(3) * illuminant), 1)
    return (images * gain).clamp(0, 1)


def _check_images(images: torch.Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ModelError(
            f"images are {images.dtype} of shape {tuple(images.shape)}:"
            " colours are corrected in float tensors of shape (N, 3, H, W)"
        )
