import colorsys

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, kstest

from wsi_pipeline.patches.augment import augment

OFF = {"flips": False, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
ALL = {"flips": True, "brightness": 0.25, "contrast": 0.25, "saturation": 0.25, "hue": 0.04}


@pytest.fixture
def images():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 3, 8, 10), np.uint8))


def plain(count, rgb):
    """Float images of one colour."""
    return torch.tensor(rgb).reshape(1, 3, 1, 1).repeat(count, 1, 4, 4)


def test_an_image_depends_on_its_draw_number_not_on_its_batch(images):
    numbers = torch.arange(100, 112)
    together = augment(images, numbers, seed=1, **ALL)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = augment(images[order], numbers[order], seed=1, **ALL)
    assert torch.equal(shuffled, together[order])
    for i in range(12):
        alone = augment(images[i : i + 1], [100 + i], seed=1, **ALL)
        assert torch.equal(alone[0], together[i])


def test_other_seed_or_number_is_another_augmentation(images):
    first = augment(images, range(12), seed=1, **ALL)
    assert not torch.equal(augment(images, range(12), seed=2, **ALL), first)
    assert not torch.equal(augment(images, range(12, 24), seed=1, **ALL), first)


def test_copies_of_an_image_in_one_batch_come_out_different(images):
    copies = images[:1].repeat(50, 1, 1, 1)
    augmented = augment(copies, range(50), seed=0, **ALL)
    assert len(torch.unique(augmented.flatten(1), dim=0)) == 50


def test_flips_alone_give_the_four_mirror_images_equally_often(images):
    image = images[0]
    flipped = augment(image.repeat(800, 1, 1, 1), range(800), seed=0, **{**OFF, "flips": True})
    mirrored = [image, image.flip(-1), image.flip(-2), image.flip(-1, -2)]
    counts = [int((flipped == m).flatten(1).all(1).sum()) for m in mirrored]
    assert sum(counts) == 800
    assert all(binomtest(count, 800, 1 / 4).pvalue > 1e-3 for count in counts)


@pytest.mark.parametrize(("strength", "lowest"), [(0.3, 0.7), (1.5, 0.0)])
def test_brightness_factor_is_uniform_around_one(strength, lowest):
    grey = plain(500, [0.4, 0.4, 0.4])
    augmented = augment(grey, range(500), seed=0, **{**OFF, "brightness": strength})
    factor = augmented[:, 0, 0, 0] / 0.4
    seen = factor[factor < 2.5 - 1e-4]  # 0.4 * 2.5 is white, where factors are cut off
    assert lowest <= seen.min()
    assert seen.max() <= 1 + strength
    assert kstest(seen, "uniform", (lowest, 1 + strength - lowest)).pvalue > 1e-3


def test_hue_shift_is_uniform_and_keeps_saturation_and_value():
    red = plain(150, [0.8, 0.2, 0.2])
    augmented = augment(red, range(150), seed=0, **{**OFF, "hue": 0.1})
    hue, saturation, value = np.array(
        [colorsys.rgb_to_hsv(*image[:, 0, 0].tolist()) for image in augmented]
    ).T
    np.testing.assert_allclose(saturation, 0.75, atol=1e-5)
    np.testing.assert_allclose(value, 0.8, atol=1e-5)
    shift = (hue + 0.5) % 1 - 0.5
    assert kstest(shift, "uniform", (-0.1, 0.2)).pvalue > 1e-3


@pytest.mark.parametrize("name", ["contrast", "saturation"])
def test_contrast_and_saturation_move_pixels_from_or_to_grey(images, name):
    """A blend with grey by a factor from 1 - s to 1 + s: the grey mean stays, the spread scales."""
    soft = images / 255 * 0.4 + 0.3  # far enough from black and white for a factor of 1.5
    augmented = augment(soft, range(12), seed=0, **{**OFF, name: 0.5})
    axes = (1, 2, 3) if name == "contrast" else (1,)
    luma = torch.tensor([0.2989, 0.587, 0.114]).reshape(1, 3, 1, 1)
    grey = (soft * luma).sum(1, keepdim=True)
    if name == "contrast":
        grey = grey.mean((2, 3), keepdim=True)
    factors = ((augmented - grey).square().sum(axes) / (soft - grey).square().sum(axes)).sqrt()
    factors = factors.flatten(1) if name == "saturation" else factors[:, None]
    per_image = factors.mean(1)
    assert (factors - per_image[:, None]).abs().max() < 1e-2  # one factor for a whole image
    assert 0.5 <= per_image.min() < 0.8
    assert 1.2 < per_image.max() <= 1.5


def test_all_off_changes_nothing(images):
    assert torch.equal(augment(images, range(12), seed=0, **OFF), images)


@pytest.mark.parametrize("scale", [1, 255])
def test_shape_and_type_are_kept_and_the_input_unchanged(images, scale):
    images = images if scale == 1 else images / 255
    before = images.clone()
    augmented = augment(images, range(12), seed=0, **ALL)
    assert (augmented.dtype, augmented.shape) == (images.dtype, images.shape)
    assert torch.equal(images, before)


def test_global_generator_is_given_back_as_it_was(images):
    before = torch.get_rng_state()
    augment(images, range(12), seed=0, **ALL)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_image_needs_its_number(images):
    with pytest.raises(ValueError, match="shorter"):
        augment(images, range(11), seed=0, **ALL)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_gives_the_cpus_augmentation_and_keeps_its_generator(images):
    soft = images / 255
    before = torch.cuda.get_rng_state()
    on_gpu = augment(soft.cuda(), range(12), seed=0, **ALL)
    torch.testing.assert_close(on_gpu.cpu(), augment(soft, range(12), seed=0, **ALL))
    assert torch.equal(torch.cuda.get_rng_state(), before)
