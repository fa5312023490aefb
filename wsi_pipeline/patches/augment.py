"""Random flips, turns, zooms and colour perturbations of training patches."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms import v2

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.seeds import derived_seed


def augment(
    images: Tensor,
    numbers: Sequence[int] | Tensor,
    *,
    seed: int,
    flips: bool,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    rotate_180: bool = False,
    zoom: float = 1.0,
) -> Tensor:
    """Flip, turn, zoom and perturb each image of a batch with parameters of its own.

    The lecture's augmentation: random horizontal and vertical flips and random colour
    perturbations, which it gives no ranges for. The PatchNet paper's: 180-degree rotations and
    zooms of up to 120 %, here drawn after the lecture's, whose parameters are the same with them
    and without. torchvision's v2 transforms draw one set of
    parameters for all the images they are given together, so they are called image by image. An
    image's parameters depend only on the seed and the image's draw number: not on the batch, the
    rank or the device that it comes to.

    Parameters
    ----------
    images : uint8 or float (0 to 1) tensor, shape (N, 3, H, W)
        RGB, on any device.
    numbers : sequence of int, length N
        Their draw numbers.
    seed : int
    flips : bool
        Horizontal and vertical, each with probability 1/2.
    brightness, contrast, saturation : float
        Strength s, 0 or more: the factor is uniform from max(0, 1 - s) to 1 + s.
    hue : float
        Strength h, 0 to 0.5: the shift is uniform from -h to h, in turns of the colour circle.
    rotate_180 : bool
        Half a turn, with probability 1/2. Beside `flips` it changes nothing but the draws: the
        two flips together are half a turn.
    zoom : float
        Largest zoom z, 1 (none) or more: a factor f is uniform from 1 to z, and a crop of 1 / f
        of the image's height and width (to the nearest px), anywhere in it, is resized back
        (bilinear, antialiased).

    Returns
    -------
    Tensor
        As `images`, which are left unchanged.

    Raises
    ------
    ConfigError
        If `zoom` is not finite or under 1.
    """
    if not 1 <= zoom < math.inf:
        raise ConfigError(f"zoom is {zoom}: it must be a finite factor of 1 or more")
    steps = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()] if flips else []
    if brightness or contrast or saturation or hue:
        steps.append(v2.ColorJitter(brightness, contrast, saturation, hue))
    if rotate_180:
        steps.append(v2.RandomApply([v2.Lambda(_half_turn)], p=0.5))
    if zoom > 1:
        steps.append(v2.Lambda(partial(_zoom_in, largest=zoom)))
    if not steps:
        return images
    transform = v2.Compose(steps)
    # The transforms take their parameters from the CPU's global generator. It alone is seeded
    # here (torch.manual_seed would reset the GPUs' as well) and given back as it was.
    with torch.random.fork_rng(devices=[]):
        return torch.stack(
            [
                _seeded(transform, image, derived_seed(seed, f"augment/{int(number)}"))
                for image, number in zip(images, numbers, strict=True)
            ]
        )


def _seeded(transform: v2.Transform, image: Tensor, seed: int) -> Tensor:
    torch.default_generator.manual_seed(seed)
    return transform(image)


def _half_turn(image: Tensor) -> Tensor:
    return image.flip(-2, -1)


def _zoom_in(image: Tensor, *, largest: float) -> Tensor:
    factor = 1 + (largest - 1) * torch.rand(()).item()
    size = list(image.shape[-2:])
    crop = [max(1, round(side / factor)) for side in size]
    corner = [
        int(torch.randint(side - part + 1, ())) for side, part in zip(size, crop, strict=True)
    ]
    return v2.functional.resized_crop(image, *corner, *crop, size=size, antialias=True)
