"""PatchNet's heatmaps of an image (the paper's appendix B).

The patch centred at pixel i covers pixels ``i - patch_px // 2`` to
``i - patch_px // 2 + patch_px - 1`` along each axis: with an even side, which has no central pixel,
one more before the centre than after it. Outside of the image patches hold zeros. These are zeros
of the model's input, so after normalisation: the colour of `mean`, not black.
"""

import torch
from torch.nn import functional

from wsi_pipeline.models.dense import dense_filter_outputs, dense_logits
from wsi_pipeline.models.patchnet import Subnet


def global_heatmap(subnet: Subnet, image: torch.Tensor, *, stride_px: int = 1) -> torch.Tensor:
    """Q of the patch centred at each pixel: the paper's heatmap.

    Parameters
    ----------
    subnet : Subnet
    image : float tensor, shape (channels, H, W)
        As the model takes it, on the subnet's device.
    stride_px : int
        Step between the pixels evaluated, from the upper left one on.

    Returns
    -------
    tensor, shape (ceil(H / stride_px), ceil(W / stride_px)), in [0, 1]
        1 (white) for class 1.

    Raises
    ------
    ModelError
        If `stride_px` is under 1.
    """
    return torch.sigmoid(dense_logits(subnet, _padded(image, subnet.patch_px), stride_px))


def filter_heatmaps(subnet: Subnet, image: torch.Tensor, *, stride_px: int = 1) -> torch.Tensor:
    """Each filter's value (tanh of its linear model) for the patch centred at each pixel.

    Parameters and errors as for `global_heatmap`.

    Returns
    -------
    tensor, shape (filters, ceil(H / stride_px), ceil(W / stride_px)), in [-1, 1]
    """
    return dense_filter_outputs(subnet, _padded(image, subnet.patch_px), stride_px)


def patch_average_heatmap(subnet: Subnet, image: torch.Tensor) -> torch.Tensor:
    """Mean of Q over the patches that contain the pixel: the paper's alternative, less sharp.

    The patches are those of `global_heatmap` at stride 1, one centred at each pixel of the image.
    A pixel further than a patch from the image's border is in ``patch_px ** 2`` of them, one at
    the border in fewer; the mean is over those.

    Parameters
    ----------
    subnet, image
        As for `global_heatmap`.

    Returns
    -------
    tensor, shape (H, W), in [0, 1]
    """
    q = global_heatmap(subnet, image)
    return _box_sum(q, subnet.patch_px) / _box_sum(torch.ones_like(q), subnet.patch_px)


def _padded(image: torch.Tensor, patch_px: int) -> torch.Tensor:
    before = patch_px // 2
    after = patch_px - 1 - before
    return functional.pad(image, (before, after, before, after))


def _box_sum(q: torch.Tensor, patch_px: int) -> torch.Tensor:
    """Sum of q over the centres of the patches that contain a pixel, at each pixel."""
    after = patch_px // 2  # a patch that reaches so far before its centre has it so far after
    before = patch_px - 1 - after
    padded = functional.pad(q, (before, after, before, after))[None]
    rows = functional.avg_pool2d(padded, (patch_px, 1), stride=1, divisor_override=1)
    return functional.avg_pool2d(rows, (1, patch_px), stride=1, divisor_override=1)[0]
