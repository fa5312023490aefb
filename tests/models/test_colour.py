"""Gamma and colour constancy, against values worked by hand and a plain transcription in numpy."""

import numpy as np
import pytest
import torch

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.colour import correct_gamma, shades_of_gray


@pytest.fixture
def images():
    """Three images of other colours: warm, dark and cold."""
    values = np.random.default_rng(0).random((3, 3, 6, 5))
    tints = np.array([[0.9, 0.6, 0.5], [0.2, 0.2, 0.1], [0.3, 0.6, 0.9]])
    return torch.from_numpy(values * tints[:, :, None, None])


def transcribed(image, p):
    """Barata et al.'s formula, channel by channel, of one image (3, H, W)."""
    illuminant = np.array([np.mean(channel**p) ** (1 / p) for channel in image])
    illuminant /= np.sqrt(np.sum(illuminant**2))
    corrected = [c / (np.sqrt(3) * e) for c, e in zip(image, illuminant, strict=True)]
    return np.clip(np.stack(corrected), 0, 1)


@pytest.mark.parametrize("p", [1, 2, 6, 6.5])
def test_shades_of_gray_is_the_formula_of_each_image_by_itself(images, p):
    expected = np.stack([transcribed(image, p) for image in images.numpy()])
    np.testing.assert_allclose(shades_of_gray(images, p).numpy(), expected, rtol=1e-12)
    in_float32 = shades_of_gray(images.float(), p)
    assert in_float32.dtype == torch.float32
    np.testing.assert_allclose(in_float32.numpy(), expected, rtol=1e-5)


def test_a_plain_colour_becomes_grey_of_the_same_length():
    # e is the colour (0.1, 0.2, 0.2) / 0.3, so each channel becomes 0.3 / sqrt(3)
    image = torch.tensor([0.1, 0.2, 0.2]).reshape(1, 3, 1, 1).repeat(1, 1, 4, 4)
    corrected = shades_of_gray(image)
    torch.testing.assert_close(corrected, torch.full_like(image, 0.3 / 3**0.5))


def test_a_grey_illuminant_changes_nothing():
    grey = torch.linspace(0, 1, 16).reshape(1, 1, 4, 4).repeat(1, 3, 1, 1)
    torch.testing.assert_close(shades_of_gray(grey), grey)


def test_what_exceeds_1_is_clipped():
    # Left red (1, 0, 0), right white. p = 1: means 1, 1/2, 1/2, length sqrt(3/2), so
    # sqrt(3) e = (sqrt 2, 1/sqrt 2, 1/sqrt 2): green and blue of white become sqrt 2, clipped.
    image = torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]], [[0.0, 1.0]]])[None]
    expected = torch.tensor([[[0.5**0.5, 0.5**0.5]], [[0.0, 1.0]], [[0.0, 1.0]]])[None]
    torch.testing.assert_close(shades_of_gray(image, 1), expected)


def test_a_black_image_and_a_black_channel_stay_black():
    black = torch.zeros(1, 3, 4, 4)
    assert torch.equal(shades_of_gray(black), black)
    red = black.clone()
    red[:, 0] = 0.6  # e = (1, 0, 0): red becomes 0.6 / sqrt(3)
    expected = black.clone()
    expected[:, 0] = 0.6 / 3**0.5
    torch.testing.assert_close(shades_of_gray(red), expected)


def test_dark_values_do_not_vanish_under_a_high_power():
    """(1 / 255)^40 is 0 in float32; the transcription runs in float64."""
    image = torch.tensor([1, 2, 4]).reshape(1, 3, 1, 1).repeat(1, 1, 4, 4) / 255
    expected = transcribed(image[0].double().numpy(), 40)
    np.testing.assert_allclose(shades_of_gray(image, 40)[0].numpy(), expected, rtol=1e-5)


def test_gamma_is_the_power_of_one_over_it():
    # 0.25^(1/2) = 0.5; black and white stay
    image = torch.tensor([0.0, 0.25, 1.0]).reshape(1, 3, 1, 1)
    expected = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(correct_gamma(image, 2), expected)
    assert correct_gamma(image, 2.2)[0, 1] == pytest.approx(0.5325205447)  # 0.25^0.4545...


@pytest.mark.parametrize("gamma", [0, -2.2, float("inf"), float("nan")])
def test_an_impossible_gamma_is_refused(images, gamma):
    with pytest.raises(ModelError, match=f"gamma is {gamma}: it must be over 0"):
        correct_gamma(images, gamma)


@pytest.mark.parametrize("p", [0, 0.5, float("inf"), float("nan")])
def test_an_impossible_power_is_refused(images, p):
    with pytest.raises(ModelError, match=f"p is {p}: .* 1 or more"):
        shades_of_gray(images, p)


@pytest.mark.parametrize("correct", [lambda x: correct_gamma(x, 2), shades_of_gray])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), r"torch\.uint8"),
        (torch.zeros(2, 4, 4, 3), r"\(2, 4, 4, 3\)"),
        (torch.zeros(3, 4, 4), r"\(3, 4, 4\)"),
    ],
)
def test_other_types_and_shapes_are_refused(correct, wrong, message):
    with pytest.raises(ModelError, match=message):
        correct(wrong)
