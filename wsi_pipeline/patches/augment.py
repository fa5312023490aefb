"""Random flips and colour perturbations of training patches."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2


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
) -> Tensor:
    """Flip and perturb each image of a batch with parameters of its own.

    The lecture's augmentation: random horizontal and vertical flips and random colour
    perturbations, which it gives no ranges for. torchvision's v2 transforms draw one set of
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

    Returns
    -------
    Tensor
        As `images`, which are left unchanged.
    """
    steps = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()] if flips else []
    if brightness or contrast or saturation or hue:
        steps.append(v2.ColorJitter(brightness, contrast, saturation, hue))
    if not steps:
        return images
    transform = v2.Compose(steps)
    # The transforms take their parameters from the CPU's global generator. It alone is seeded
    # here (torch.manual_seed would reset the GPUs' as well) and given back as it was.
    with torch.random.fork_rng(devices=[]):
        return torch.stack(
            [
                _seeded(transform, image, f"{seed}/augment/{int(number)}")
                for image, number in zip(images, numbers, strict=True)
            ]
        )


def _seeded(transform: v2.Transform, image: Tensor, name: str) -> Tensor:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    torch.default_generator.manual_seed(int.from_bytes(digest, "little"))
    return transform(image)
