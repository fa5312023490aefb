"""PatchNet's heatmaps, each against loops over pixels."""

import numpy as np
import pytest
import torch

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.patchnet import Subnet
from wsi_pipeline.models.patchnet_heatmaps import (
    filter_heatmaps,
    global_heatmap,
    patch_average_heatmap,
)


@pytest.fixture(params=[4, 5, 15], ids=lambda patch_px: f"patch {patch_px}")
def subnet(request):
    torch.manual_seed(0)
    return Subnet(request.param, filters=3).double()


@pytest.fixture
def image():
    torch.manual_seed(1)
    return torch.randn(3, 7, 10, dtype=torch.float64)


def centred_patches(image, patch_px):
    """The patch around each pixel, row by row, from an image in a wide frame of zeros."""
    channels, height, width = image.shape
    frame = torch.zeros(channels, height + 40, width + 40, dtype=image.dtype)
    frame[:, 20 : 20 + height, 20 : 20 + width] = image
    first = 20 - patch_px // 2
    return torch.stack([
        frame[:, y + first : y + first + patch_px, x + first : x + first + patch_px]
        for y in range(height) for x in range(width)
    ])  # fmt: skip


def q_of_each_pixel(subnet, image):
    with torch.no_grad():
        q = torch.sigmoid(subnet(centred_patches(image, subnet.patch_px)))
    return q.reshape(image.shape[1:]).numpy()


def test_the_global_heatmap_is_q_of_the_patch_centred_at_each_pixel(subnet, image):
    heatmap = global_heatmap(subnet, image).numpy()
    assert heatmap == pytest.approx(q_of_each_pixel(subnet, image), abs=1e-12)


@pytest.mark.parametrize("stride_px", [2, 3, 4, 8])
def test_a_stride_takes_every_nth_pixel_from_the_first(subnet, image, stride_px):
    heatmap = global_heatmap(subnet, image, stride_px=stride_px).numpy()
    expected = q_of_each_pixel(subnet, image)[::stride_px, ::stride_px]
    assert heatmap == pytest.approx(expected, abs=1e-12)


def test_filter_heatmaps_are_the_filters_values_of_the_same_patches(subnet, image):
    with torch.no_grad():
        outputs = subnet.filter_outputs(centred_patches(image, subnet.patch_px))
    expected = outputs.T.reshape(3, 7, 10).numpy()
    assert filter_heatmaps(subnet, image).numpy() == pytest.approx(expected, abs=1e-12)
    strided = filter_heatmaps(subnet, image, stride_px=2).numpy()
    assert strided == pytest.approx(expected[:, ::2, ::2], abs=1e-12)


def test_the_average_is_over_all_patches_that_contain_the_pixel(subnet, image):
    q = q_of_each_pixel(subnet, image)
    total, count = np.zeros_like(q), np.zeros_like(q)
    for (y, x), value in np.ndenumerate(q):
        top, left = y - subnet.patch_px // 2, x - subnet.patch_px // 2
        rows = slice(max(top, 0), max(top + subnet.patch_px, 0))
        cols = slice(max(left, 0), max(left + subnet.patch_px, 0))
        total[rows, cols] += value
        count[rows, cols] += 1
    heatmap = patch_average_heatmap(subnet, image).numpy()
    assert heatmap == pytest.approx(total / count, abs=1e-12)


def test_the_valid_variant_has_the_same_heatmaps():
    torch.manual_seed(0)
    subnet = Subnet(15, filters=3, padding="valid").double()
    image = torch.randn(3, 9, 8, dtype=torch.float64)
    heatmap = global_heatmap(subnet, image).numpy()
    assert heatmap == pytest.approx(q_of_each_pixel(subnet, image), abs=1e-12)


def test_a_stride_under_1_is_refused(subnet, image):
    with pytest.raises(ModelError, match="stride_px is 0"):
        global_heatmap(subnet, image, stride_px=0)
