"""Random flips, turns, zooms and colour perturbations of training patches."""

import math
from collections.abc import Sequence
from itertools import chain, product
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

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
    and without. An image's parameters depend only on the seed and the image's draw number: not on
    the batch, the rank or the device that it comes to.

    Parameters are drawn as torchvision's v2 transforms draw them, and do what they do there;
    pixels may differ by a rounding. But those give all images of a call the same parameters, and
    called image by image they would take longer to start on a GPU than it takes to train.

    Parameters
    ----------
    images : uint8 or float (0 to 1) tensor, shape (N, 3, H, W)
        RGB, on any device; a GPU is not waited for.
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
    if not len(images):
        return images
    jitter = v2.ColorJitter(brightness, contrast, saturation, hue)
    strengths = (brightness, contrast, saturation, hue)
    # torch's own generator is the one that torchvision draws from. The CPU's alone is seeded here
    # (torch.manual_seed would reset the GPUs' as well) and given back as it was.
    with torch.random.fork_rng(devices=[]):
        drawn = [
            _draw(
                derived_seed(seed, f"augment/{int(number)}"),
                flips=flips,
                jitter=jitter if any(strengths) else None,
                rotate_180=rotate_180,
                zoom=zoom,
                size=image.shape[-2:],
            )
            for image, number in zip(images, numbers, strict=True)
        ]
    if flips or rotate_180:
        images = _mirrored(images, drawn)
    if any(strengths):
        images = _perturbed(images, drawn, [op for op in range(4) if strengths[op]])
    if zoom > 1:
        images = torch.stack(
            [_zoomed(image, *own.crop) for image, own in zip(images, drawn, strict=True)]
        )
    return images


class _Drawn(NamedTuple):
    """Parameters of one image: of the colours, the order of the four and the value of each."""

    mirror_x: bool
    mirror_y: bool
    order: list[int]
    values: list[float]
    crop: list[int]


def _draw(seed: int, *, flips: bool, jitter, rotate_180: bool, zoom: float, size) -> _Drawn:
    """What v2.Compose would draw for flips, `ColorJitter` and a turn; then the zoom's crop."""
    torch.default_generator.manual_seed(seed)
    mirror_x, mirror_y = flips and _heads(), flips and _heads()
    order, values = [], []
    if jitter:
        first, *values = jitter.make_params([]).values()
        order, values = first.tolist(), [value or 0.0 for value in values]
    turned = rotate_180 and _heads()
    crop = _crop(size, zoom) if zoom > 1 else []
    return _Drawn(mirror_x ^ turned, mirror_y ^ turned, order, values, crop)


def _heads() -> bool:
    return torch.rand(()).item() < 0.5


def _crop(size, zoom: float) -> list[int]:
    """Top, left, height and width."""
    factor = 1 + (zoom - 1) * torch.rand(()).item()
    crop = [max(1, round(side / factor)) for side in size]
    corner = [
        int(torch.randint(side - part + 1, ())) for side, part in zip(size, crop, strict=True)
    ]
    return [*corner, *crop]


def _mirrored(images: Tensor, drawn: list[_Drawn]) -> Tensor:
    for axis, which in (
        (-1, [own.mirror_x for own in drawn]),
        (-2, [own.mirror_y for own in drawn]),
    ):
        images = torch.where(_sent(which, images), images.flip(axis), images)
    return images


def _perturbed(images: Tensor, drawn: list[_Drawn], ops: list[int]) -> Tensor:
    """Images after the four perturbations, each in its own order; of them only `ops`.

    At each place of the order, those that have the same perturbation there go through it together.
    """
    images, values = (
        images.clone(memory_format=torch.contiguous_format),
        _sent([own.values for own in drawn], images),
    )
    turns = list(product(range(4), ops))
    rows = [[i for i, own in enumerate(drawn) if own.order[n] == op] for n, op in turns]
    places = _sent([*chain(*rows)], images).flatten().split([len(own) for own in rows])
    for (_, op), chosen in zip(turns, places, strict=True):
        if len(chosen):
            some, value = images.index_select(0, chosen), values.index_select(0, chosen)[:, op]
            images.index_copy_(0, chosen, PERTURBATIONS[op](some, value))
    return images


def _brightened(images: Tensor, factor: Tensor) -> Tensor:
    return _in_range(images * factor, images)


def _contrasted(images: Tensor, factor: Tensor) -> Tensor:
    grey = functional.rgb_to_grayscale(images)
    mean = grey.mean((1, 2, 3), keepdim=True, dtype=torch.float64)  # exact, of whatever batch
    return _blended(images, mean.float(), factor)


def _saturated(images: Tensor, factor: Tensor) -> Tensor:
    return _blended(images, functional.rgb_to_grayscale(images).float(), factor)


def _hue_shifted(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV: a hue of h sixths of a turn is 0 at red, 2 at green and 4 at blue.

    With value v and chroma c, a channel is ``v - c * clip(min(k, 4 - k), 0, 1)``, where k is
    h + 5 for red, h + 3 for green and h + 1 for blue, modulo 6.
    """
    rgb = functional.to_dtype(images, torch.float32, scale=True)
    red, green, blue = rgb.split(1, dim=1)
    low, value = torch.aminmax(rgb, dim=1, keepdim=True)
    chroma = value - low
    over = chroma.clamp(min=torch.finfo(rgb.dtype).tiny)  # a grey pixel has no hue, and keeps none
    hue = torch.where(
        red == value,
        (green - blue) / over,
        torch.where(green == value, 2 + (blue - red) / over, 4 + (red - green) / over),
    )
    hue = hue + 6 * shift
    channels = []
    for start in (5, 3, 1):
        k = (hue + start).remainder_(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return functional.to_dtype(torch.cat(channels, dim=1), images.dtype, scale=True)


PERTURBATIONS = (_brightened, _contrasted, _saturated, _hue_shifted)
"""In the order of torchvision's ColorJitter, which an image's `order` refers to."""


def _blended(images: Tensor, others: Tensor, factor: Tensor) -> Tensor:
    """``factor * images + (1 - factor) * others``."""
    return _in_range(torch.addcmul(images * factor, others, 1 - factor), images)


def _in_range(values: Tensor, images: Tensor) -> Tensor:
    """Values of the type of the images, uint8 (0 to 255, cut off) or float (0 to 1)."""
    return values.clamp_(0, 1 if images.is_floating_point() else 255).to(images.dtype)


def _zoomed(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    return functional.resized_crop(
        image, top, left, height, width, size=list(image.shape[-2:]), antialias=True
    )


def _sent(values: list, images: Tensor) -> Tensor:
    """Values of each image, shape (N, ..., 1, 1, 1), on the images' device."""
    column = torch.tensor(values)
    if images.is_cuda:
        column = column.pin_memory()  # else the copy could wait for the GPU
    return column.to(images.device, non_blocking=True)[..., None, None, None]
