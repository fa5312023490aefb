"""Pixels to a network's input, and a network as a function of pixels."""

import numpy as np
import pytest
import torch
from torch import nn

from wsi_pipeline.models.checkpoint import ModelCard
from wsi_pipeline.models.inference import normalise, predictor

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


class Brightness(nn.Module):
    """The logit is the mean of an image's input."""

    def forward(self, images):
        return images.mean(dim=(1, 2, 3))


@pytest.fixture
def pixels():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), np.uint8))


def standardised(values):
    """(values - MEAN) / STD in numpy."""
    mean, std = (np.reshape(c, (3, 1, 1)) for c in (MEAN, STD))
    return (values - mean) / std


def constant_colours(values, p):
    """Shades of gray in numpy: an image's channels over sqrt(3) times the unit illuminant."""
    illuminant = np.mean(values**p, axis=(2, 3), keepdims=True) ** (1 / p)
    illuminant /= np.linalg.norm(illuminant, axis=1, keepdims=True)
    return np.clip(values / (np.sqrt(3) * illuminant), 0, 1)


def assert_near(tensor, expected):
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor.numpy(), expected, atol=1e-5)


def test_without_corrections_values_are_scaled_and_standardised(pixels):
    assert_near(normalise(pixels, MEAN, STD), standardised(pixels.numpy() / 255))


def test_gamma_comes_first_then_colour_constancy_then_standardisation(pixels):
    scaled = pixels.numpy() / 255
    brighter = scaled ** (1 / 2.2)
    assert_near(normalise(pixels, MEAN, STD, gamma=2.2), standardised(brighter))
    assert_near(
        normalise(pixels, MEAN, STD, shades_of_gray=6), standardised(constant_colours(scaled, 6))
    )
    both = normalise(pixels, MEAN, STD, gamma=2.2, shades_of_gray=6)
    assert_near(both, standardised(constant_colours(brighter, 6)))
    other_order = standardised(constant_colours(scaled, 6) ** (1 / 2.2))
    assert np.abs(both.numpy() - other_order).max() > 0.01


def test_the_memory_format_is_kept(pixels):
    images = pixels.to(memory_format=torch.channels_last)
    corrected = normalise(images, MEAN, STD, gamma=2.2, shades_of_gray=6)
    assert corrected.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("corrections", [{}, {"gamma": 2.2, "shades_of_gray": 6.0}])
def test_a_predictor_normalises_as_the_card_says(pixels, corrections):
    card = ModelCard(architecture="vgg16", mean=MEAN, std=STD, patch_px=4, mpp=0.5, **corrections)
    predict = predictor(Brightness(), **card.normalisation, device="cpu", mixed_precision=False)
    probabilities = predict(pixels.permute(0, 2, 3, 1).numpy())
    logits = normalise(pixels, MEAN, STD, **corrections).mean(dim=(1, 2, 3))
    np.testing.assert_allclose(probabilities, torch.sigmoid(logits).numpy(), atol=1e-6)
    assert card.normalisation == {
        "mean": MEAN, "std": STD, "gamma": None, "shades_of_gray": None, **corrections,
    }  # fmt: skip
