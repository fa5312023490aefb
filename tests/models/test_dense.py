"""The subnet on every patch of a lattice: equal to patches run alone, and cheaper."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.dense import dense_filter_outputs, dense_logits
from wsi_pipeline.models.patchnet import Subnet, cut_patches

pytestmark = pytest.mark.usefixtures("one_thread")


def subnet(patch_px, dtype=torch.float64, **settings):
    torch.manual_seed(patch_px)
    return Subnet(patch_px, **({"filters": 4} | settings)).to(dtype)


def image(height, width, channels=3, dtype=torch.float64):
    return torch.randn(channels, height, width, dtype=dtype)


def alone(module, pixels, stride_px):
    """Filter outputs and logits of the same patches, cut and run as one batch."""
    patches = cut_patches(pixels[None], module.patch_px, stride_px)[0]
    with torch.no_grad():
        outputs = module.filter_outputs(patches)
        return outputs.T, module.logits(outputs)


def assert_equal_to_patches_alone(module, pixels, stride_px, tolerance, **settings):
    outputs, logits = alone(module, pixels, stride_px)
    dense = dense_filter_outputs(module, pixels, stride_px, **settings)
    steps = [(size - module.patch_px) // stride_px + 1 for size in pixels.shape[1:]]
    assert list(dense.shape[1:]) == steps
    assert (dense.flatten(1) - outputs).abs().max() <= tolerance
    assert outputs.std() > 100 * tolerance  # there is something to be equal to
    of_logits = dense_logits(module, pixels, stride_px, **settings).flatten()
    assert (of_logits - logits).abs().max() <= tolerance


@pytest.mark.parametrize("stride_px", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("patch_px", [1, 2, 3, 4, 11, 14, 15, 16, 17, 21, 31])
def test_every_value_is_that_of_the_patch_alone(patch_px, stride_px):
    module = subnet(patch_px)
    pixels = image(patch_px + 10, patch_px + 17)  # both odd and even sizes, by the patch's
    assert_equal_to_patches_alone(module, pixels, stride_px, 1e-12, block=5)


@pytest.mark.parametrize("stride_px", [1, 2, 4, 8])
@pytest.mark.parametrize("patch_px", [11, 14, 15, 17, 21, 31])
def test_every_value_is_that_of_the_patch_alone_in_float32(patch_px, stride_px):
    module = subnet(patch_px, torch.float32, channels=1, filters=8)
    pixels = image(patch_px + 9, patch_px + 12, 1, torch.float32)
    assert_equal_to_patches_alone(module, pixels, stride_px, 1e-5)


@pytest.mark.parametrize("stride_px", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("patch_px", [15, 16, 17, 22, 31])
def test_the_valid_variant_is_evaluated_densely_too(patch_px, stride_px):
    module = subnet(patch_px, padding="valid")
    pixels = image(patch_px + 13, patch_px + 22)
    assert_equal_to_patches_alone(module, pixels, stride_px, 1e-12, block=4)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_other_numbers_of_layers(layers):
    module = subnet(9, layers=layers)
    assert_equal_to_patches_alone(module, image(15, 16), 1, 1e-12)


@pytest.mark.parametrize("size", [(17, 17), (17, 24), (24, 17)])
def test_images_of_one_patch_or_one_row_of_patches(size):
    assert_equal_to_patches_alone(subnet(17), image(*size), 1, 1e-12)


@pytest.mark.parametrize(("patch_px", "stride_px"), [(17, 1), (21, 4), (11, 1)])
def test_blocks_leave_no_seams(patch_px, stride_px):
    module, pixels = subnet(patch_px), image(patch_px + 12, patch_px + 14)
    whole = dense_filter_outputs(module, pixels, stride_px, block=1000)
    for block in (2, 5):
        blocks = dense_filter_outputs(module, pixels, stride_px, block=block)
        assert (blocks - whole).abs().max() <= 1e-12


def test_a_value_depends_on_its_patch_alone():
    """The same patch in a larger image: what a slab of a slide holds around it changes nothing."""
    module, pixels = subnet(17), image(60, 50)
    whole = dense_logits(module, pixels, 4)
    part = dense_logits(module, pixels[:, 8:, 12:40], 4)
    assert (whole[2:, 3:6] - part).abs().max() <= 1e-12


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.untyped_storage().nbytes() // result.itemsize)
        return result


def test_memory_does_not_grow_with_the_image():
    module = subnet(17, torch.float32)
    largest = []
    for size in (34, 52):
        pixels = image(size, size, 1, torch.float32).expand(3, -1, -1)
        with LargestTensor() as mode:
            dense_logits(module, pixels, 1, block=9)
        largest.append(mode.size)
    # 36 x 36 values of 4 filters, the result, are still under a block's 9 x 9 with halo
    assert largest[0] == largest[1] > 4 * 36 * 36


def test_bfloat16_convolutions_stay_near_float32():
    module, pixels = subnet(17, torch.float32, filters=16), image(27, 27, 3, torch.float32)
    exact = dense_filter_outputs(module, pixels, 1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = dense_filter_outputs(module, pixels, 1)
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - exact).abs().max() < 0.03


def operations(compute, *arguments, **settings):
    """Multiplications and additions as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        compute(*arguments, **settings)
    return counter.get_total_flops()


def shared_and_alone(module, rows, cols, stride_px, **settings):
    """Operations on a lattice of patches, dense and one by one."""
    side = module.patch_px
    pixels = torch.zeros(3, (rows - 1) * stride_px + side, (cols - 1) * stride_px + side)
    shared = operations(dense_logits, module, pixels, stride_px, **settings)
    return shared, rows * cols * operations(module, torch.zeros(1, 3, side, side))


@pytest.mark.parametrize(
    ("patch_px", "stride_px", "expected"), [(17, 1, 2.6), (21, 1, 4.0), (31, 1, 8.7), (31, 4, 5.4)]
)
def test_the_cost_of_sharing_against_patches_alone(patch_px, stride_px, expected):
    """The ratios of a large image without blocks, counted on paper beforehand.

    In the six 64-to-64 layers at patch 17: 6 * 17^2 = 1734 pixels a patch against
    5^2 + 7^2 + 9^2 + 11^2 + 13^2 + 15^2 = 670, 2.59 times fewer.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):  # which computes nothing
        shared, alone = shared_and_alone(Subnet(patch_px), 1000, 1000, stride_px, block=1000)
    assert alone / shared == pytest.approx(expected, rel=0.02)


def test_blocks_cost_little():
    module = Subnet(31)
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole, _ = shared_and_alone(module, 64, 64, 1, block=64)
        blocks, _ = shared_and_alone(module, 64, 64, 1)
    assert 1 < blocks / whole < 1.15


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("patch_px", [15, 16, 21, 33])
def test_sharing_never_costs_more_than_patches_alone(padding, patch_px):
    module = Subnet(patch_px, filters=2, padding=padding)
    # Torch counts the filters' linear models where they are convolutions, not where they are
    # plain products, as they are of patches alone.
    readout = 2 * 6 * 4 * module.readout_weight.numel()
    for stride_px in (1, 2, 5, 16, 40):
        shared, alone = shared_and_alone(module, 6, 4, stride_px, block=3)
        assert shared <= alone + readout


def test_an_image_smaller_than_a_patch_is_refused():
    with pytest.raises(ModelError, match="images are 20 x 16 px: patches of 17 px"):
        dense_logits(subnet(17), image(16, 20), 1)


@pytest.mark.parametrize(("stride_px", "block", "name"), [(0, 1, "stride_px"), (1, 0, "block")])
def test_steps_under_1_are_refused(stride_px, block, name):
    with pytest.raises(ModelError, match=f"{name} is 0: it must be 1 or more"):
        dense_logits(subnet(17), image(20, 20), stride_px, block=block)
