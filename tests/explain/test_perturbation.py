"""Occlusion and LIME on models whose answer is known, and LIME against captum's."""

import functools

import numpy as np
import pytest
import torch
from captum._utils.models.linear_model import SkLearnLasso
from captum.attr import Lime
from small_networks import PixelWeights, SmallVgg, seeded
from torch import nn

from wsi_pipeline.errors import ConfigError, ModelError
from wsi_pipeline.explain.perturbation import cut_superpixels, lime, occlusion

pytestmark = pytest.mark.usefixtures("one_thread")

small_windows = functools.partial(occlusion, window_px=4, stride_px=3)
few_superpixels = functools.partial(lime, superpixels=12, samples=60)
METHODS = pytest.mark.parametrize("method", [small_windows, few_superpixels])


def mosaic(count=2, dtype=torch.float64):
    """Images of 24 x 36 px: 2 x 3 squares of 12 px of clear colours, with some noise."""
    torch.manual_seed(1)
    colours = torch.randn(count, 3, 2, 3, dtype=dtype)
    squares = colours.repeat_interleave(12, dim=2).repeat_interleave(12, dim=3)
    return squares + 0.05 * torch.randn(count, 3, 24, 36, dtype=dtype)


def linear(seed=2):
    torch.manual_seed(seed)
    return PixelWeights(torch.randn(3, 24, 36, dtype=torch.float64))


def contributions(model, image, baseline=0.0):
    """Of each superpixel to a linear model's score: its sum of weight times value above covered."""
    labels = cut_superpixels(image, 6)
    by_pixel = (model.weights.detach() * (image - baseline)).sum(dim=0).numpy()
    return np.array([by_pixel[labels == label].sum() for label in range(labels.max() + 1)]), labels


def test_occlusion_of_squares_side_by_side_by_hand():
    # Values 1 to 8 in two rows, every weight 1: covering a square of 2 x 2 px by 0 takes away its
    # sum, 1 + 2 + 5 + 6 = 14 or 3 + 4 + 7 + 8 = 22.
    pixels = torch.zeros(1, 3, 2, 4)
    pixels[0, 0] = torch.arange(1.0, 9.0).view(2, 4)
    model = PixelWeights(torch.ones(3, 2, 4))
    settings = {"window_px": 2, "stride_px": 2}
    assert occlusion(model, pixels, **settings).tolist() == [[[14, 14, 22, 22]] * 2]
    assert occlusion(model, pixels, target=0, **settings).tolist() == [[[-14, -14, -22, -22]] * 2]
    # covered by 1, each square has 4 in each of three channels instead
    found = occlusion(model, pixels, baseline=1, **settings)
    assert found.tolist() == [[[14 - 12, 14 - 12, 22 - 12, 22 - 12]] * 2]


def test_overlapping_squares_are_averaged_and_the_last_is_cut_off():
    # One row of values 1 .. 5 (in one channel of 2 rows), squares of 2 px each px: sums 3, 5, 7, 9.
    pixels = torch.zeros(1, 3, 2, 5)
    pixels[0, 1, 0] = torch.arange(1.0, 6.0)
    model = PixelWeights(torch.ones(3, 2, 5))
    found = occlusion(model, pixels, window_px=2, stride_px=1)
    assert found.tolist() == [[[3, 4, 6, 8, 9]] * 2]
    # Steps of 2 px: 1 + 2, 3 + 4, and the last square holds the value 5 alone.
    found = occlusion(model, pixels, window_px=2, stride_px=2)
    assert found.tolist() == [[[3, 3, 7, 7, 5]] * 2]


def test_occlusion_finds_exactly_the_pixels_that_matter():
    class Planted(nn.Module):
        def forward(self, pixels):
            return pixels[:, 1, 4, 7].abs() + 2 * pixels[:, 0, 20, 30] ** 2

    pixels = mosaic()
    found = occlusion(Planted(), pixels, window_px=1, stride_px=1, batch_size=256)
    expected = torch.zeros(2, 24, 36)
    expected[:, 4, 7] = pixels[:, 1, 4, 7].abs()
    expected[:, 20, 30] = 2 * pixels[:, 0, 20, 30] ** 2
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (found != 0).sum() == 4


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_the_batch_size_changes_no_map_and_bounds_each_run(batch_size):
    model, pixels, sizes = seeded(SmallVgg), mosaic(1), []
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    for method in (small_windows, few_superpixels):
        sizes.clear()
        found = method(model, pixels, batch_size=batch_size)
        assert max(sizes) <= batch_size
        torch.testing.assert_close(found, method(model, pixels), atol=1e-6, rtol=1e-4)


def test_lime_recovers_a_linear_models_weights():
    # The score is linear in the superpixels' presence, so that without sparsity each weight is the
    # superpixel's contribution exactly.
    model, pixels = linear(), mosaic()
    for image, found in zip(pixels, lime(model, pixels, superpixels=6, sparsity=1e-6), strict=True):
        expected, labels = contributions(model, image)
        assert len(expected) == 6
        assert np.abs(expected).min() > 0.1
        np.testing.assert_allclose(found, expected[labels], rtol=1e-3)


def test_lime_covers_by_the_baseline_and_negates_for_class_0():
    model, pixels = linear(), mosaic(1)
    expected, labels = contributions(model, pixels[0], baseline=3)
    found = lime(model, pixels, superpixels=6, sparsity=1e-6, baseline=3, target=0)[0]
    np.testing.assert_allclose(found, -expected[labels], rtol=1e-3)


def test_sparsity_takes_the_small_weights_away():
    # Nearly independent superpixels: each weight loses about sparsity times the largest.
    model, pixels = linear(), mosaic(1)
    expected, labels = contributions(model, pixels[0])
    threshold = 0.4 * np.abs(expected).max()
    soft = np.sign(expected) * np.clip(np.abs(expected) - threshold, 0, None)
    assert 0 < (soft == 0).sum() < len(soft)
    found = lime(model, pixels, superpixels=6, sparsity=0.4, samples=5000)[0].numpy()
    np.testing.assert_allclose(found, soft[labels], atol=0.1 * np.abs(expected).max())
    assert ((found == 0) == (soft == 0)[labels]).all()
    none = lime(model, pixels, superpixels=6, sparsity=1)
    assert none.abs().max() < 1e-9 * found.max()


def test_sparsity_does_not_depend_on_the_scale_of_the_logits():
    model, pixels = linear(), mosaic(1)
    found = lime(model, pixels, superpixels=6, sparsity=0.3)
    assert found.any()
    model.weights.data *= 1e-6
    torch.testing.assert_close(1e6 * lime(model, pixels, superpixels=6, sparsity=0.3), found)


def test_lime_is_captums_for_the_same_vectors_and_penalty():
    model, pixels = seeded(SmallVgg), mosaic(1)
    labels = torch.from_numpy(cut_superpixels(pixels[0], 6))
    vectors = torch.randint(2, (200, 6), generator=torch.Generator().manual_seed(5))

    def drawn(image, **_):
        yield from vectors[:, None]

    def closeness(image, covered, vector, **_):
        distance = 1 - torch.cosine_similarity(vector[0].float(), torch.ones(6), dim=0)
        return torch.exp(-(distance**2) / (2 * 0.25**2))

    def captums(alpha):
        method = Lime(model, SkLearnLasso(alpha=alpha, tol=1e-6), closeness, drawn)
        settings = {"n_samples": 200, "perturbations_per_eval": 50}
        with torch.no_grad():
            return method.attribute(pixels, feature_mask=labels[None, None], **settings)[0, 0]

    # the penalty that leaves no weight, by halving the range that it is in
    low, high = 1e-3, 1.0
    for _ in range(12):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if captums(middle).any() else (low, middle)
    found = lime(model, pixels, superpixels=6, samples=200, sparsity=0.2, seed=5)[0]
    assert len(found.unique()) == 4  # three superpixels with a weight, and 0
    torch.testing.assert_close(found, captums(0.2 * high).float(), atol=1e-4, rtol=0)


def test_lime_of_a_constant_score_is_zero():
    model = PixelWeights(torch.zeros(3, 24, 36, dtype=torch.float64))
    assert not few_superpixels(model, mosaic()).any()


def test_lime_draws_from_its_seed():
    model, pixels = seeded(SmallVgg), mosaic()
    first = few_superpixels(model, pixels)
    assert torch.equal(few_superpixels(model, pixels), first)
    assert not torch.equal(few_superpixels(model, pixels, seed=1), first)


def test_superpixels_follow_the_colours():
    squares = np.arange(6).reshape(2, 3).repeat(12, axis=0).repeat(12, axis=1)
    labels = cut_superpixels(mosaic(1)[0], 6)
    assert labels.dtype == np.int64
    assert np.array_equal(labels, squares)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (occlusion, {"window_px": 25, "stride_px": 1}, "window_px is 25.*image of 36 x 24 px"),
        (occlusion, {"window_px": 4, "stride_px": 5}, "stride_px 5.*the stride into the window"),
        (occlusion, {"window_px": 0}, "window_px is 0"),
        (occlusion, {"stride_px": 0}, "stride_px is 0"),
        (occlusion, {"batch_size": 0}, "batch_size is 0"),
        (lime, {"superpixels": 0}, "superpixels is 0"),
        (lime, {"samples": 0}, "samples is 0"),
        (lime, {"batch_size": 0}, "batch_size is 0"),
        (lime, {"sparsity": 0}, "sparsity is 0"),
        (lime, {"sparsity": 1.5}, "sparsity is 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(method, settings, message):
    with pytest.raises(ConfigError, match=message):
        method(seeded(SmallVgg), mosaic(), **settings)


@METHODS
def test_an_unknown_target_is_refused(method):
    with pytest.raises(ModelError, match="target is 2"):
        method(seeded(SmallVgg), mosaic(), target=2)


@METHODS
def test_maps_are_float32_of_the_images_size_in_any_memory_format(method):
    model, pixels = seeded(SmallVgg, dtype=torch.float32), mosaic(dtype=torch.float32)
    maps = method(model, pixels)
    assert maps.shape == (2, 24, 36)
    assert maps.dtype == torch.float32
    channels_last = method(model, pixels.to(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last, maps, rtol=1e-4, atol=1e-6)


@METHODS
def test_maps_do_not_depend_on_the_other_images_of_the_batch(method):
    model, pixels = seeded(SmallVgg), mosaic()
    torch.testing.assert_close(method(model, pixels)[1:], method(model, pixels[1:]))
