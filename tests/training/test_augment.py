import colorsys
import hashlib

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, kstest
from torchvision.transforms import v2

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.training.augment import augment

OFF = {"flips": False, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
ALL = {"flips": True, "brightness": 0.25, "contrast": 0.25, "saturation": 0.25, "hue": 0.04}
PAPER = {"rotate_180": True, "zoom": 1.2}


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


def test_turns_and_zooms_depend_on_the_draw_number_alone(images):
    together = augment(images, range(12), seed=1, **ALL, **PAPER)
    for i in range(12):
        alone = augment(images[i : i + 1], [i], seed=1, **ALL, **PAPER)
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


def by_name(transform, image, name):
    """A transform's result with the CPU's generator seeded by the hash of a name."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest, "little"))
        return transform(image)


@pytest.mark.parametrize("added", [{}, {"rotate_180": False, "zoom": 1.0}])
def test_flips_and_colours_are_drawn_as_ever(images, added):
    """Trained models depend on these draws: they must never change."""
    transform = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.ColorJitter(0.25, 0.25, 0.25, 0.04),
        ]
    )
    expected = [by_name(transform, images[i], f"7/augment/{i + 5}") for i in range(12)]
    assert torch.equal(augment(images, range(5, 17), seed=7, **ALL, **added), torch.stack(expected))


def test_half_a_turn_comes_after_the_other_draws_with_probability_one_half(images):
    copies, others = images.repeat(15, 1, 1, 1), {**OFF, "flips": True, "brightness": 0.2}
    plain = augment(copies, range(180), seed=0, **others)
    turned = augment(copies, range(180), seed=0, **others, rotate_180=True)
    as_before = (turned == plain).flatten(1).all(1)
    half_turn = (turned == torch.rot90(plain, 2, (2, 3))).flatten(1).all(1)
    assert torch.equal(as_before, ~half_turn)
    assert binomtest(int(half_turn.sum()), 180, 1 / 2).pvalue > 1e-3


def ramps(count, side):
    """Float images whose red is x / side and green y / side at each pixel's centre; blue is 0.5."""
    centres = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y, torch.full_like(x, 0.5)]).repeat(count, 1, 1, 1)


def test_zoom_shows_a_crop_of_uniform_size_at_a_uniform_place():
    """On a ramp, the crop can be read off its image: the slope is 1 / f, the middle its centre."""
    side = 100
    zoomed = augment(ramps(250, side), range(250), seed=0, **OFF, zoom=1.5)
    assert zoomed.shape == (250, 3, side, side)
    inner = slice(2, side - 2)  # antialiasing blurs nothing but the ends of a ramp
    slope_x = zoomed[:, 0, 50, inner].diff(dim=1).mean(1) * side
    slope_y = zoomed[:, 1, inner, 50].diff(dim=1).mean(1) * side
    torch.testing.assert_close(slope_x, slope_y, atol=1e-4, rtol=0)  # x and y are not distorted
    factor = 1 / slope_x
    assert kstest(factor, "uniform", (1, 0.5)).pvalue > 1e-3
    for channel in (0, 1):
        left = zoomed[:, channel].mean((1, 2)) - slope_x / 2  # upper in channel 1
        room = 1 - slope_x
        assert left.min() > -1e-3
        assert (left - room).max() < 1e-3
        wide = room > 0.1  # 10 px or more to choose from
        assert kstest((left / room)[wide], "uniform").pvalue > 1e-3
    assert torch.allclose(zoomed[:, 2], torch.tensor(0.5))


def test_zoom_leaves_the_other_draws_as_they_were():
    grey = plain(50, [0.5, 0.4, 0.3])  # a plain colour looks the same at every zoom
    expected = augment(grey, range(50), seed=3, **ALL)
    zoomed = augment(grey, range(50), seed=3, **ALL, zoom=1.2)
    torch.testing.assert_close(zoomed, expected)


def test_zoom_keeps_the_size_of_an_image_that_is_not_square(images):
    zoomed = augment(images, range(12), seed=0, **OFF, zoom=1.5)
    assert (zoomed.dtype, zoomed.shape) == (images.dtype, images.shape)
    assert not torch.equal(zoomed, images)


@pytest.mark.parametrize("zoom", [0.9, 0, float("inf"), float("nan")])
def test_an_impossible_zoom_is_refused(images, zoom):
    with pytest.raises(ConfigError, match=f"zoom is {zoom}: .* 1 or more"):
        augment(images, range(12), seed=0, **OFF, zoom=zoom)


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
    augment(images, range(12), seed=0, **ALL, **PAPER)
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
