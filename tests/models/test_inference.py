"""Pixels to a network's input, and a network as a function of pixels."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models import inference
from wsi_pipeline.models.card import ModelCard
from wsi_pipeline.models.inference import dense_predictor, normalise, predictor, use_batch_size
from wsi_pipeline.models.patchnet import Subnet, cut_patches

pytestmark = pytest.mark.usefixtures("one_thread")

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
    predict = predictor(Brightness(), **card.normalisation, device="cpu", precision="float32")
    probabilities = predict(pixels.permute(0, 2, 3, 1).numpy())
    logits = normalise(pixels, MEAN, STD, **corrections).mean(dim=(1, 2, 3))
    np.testing.assert_allclose(probabilities, torch.sigmoid(logits).numpy(), atol=1e-6)
    assert card.normalisation == {
        "mean": MEAN, "std": STD, "gamma": None, "shades_of_gray": None, **corrections,
    }  # fmt: skip


def dense(patch_px, stride_px, precision="float32"):
    torch.manual_seed(0)
    subnet = Subnet(patch_px, filters=4, layers=2)
    settings = {"mean": MEAN, "std": STD, "device": "cpu", "precision": precision}
    return subnet, dense_predictor(subnet, stride_px=stride_px, **settings)


@pytest.mark.parametrize(("patch_px", "stride_px"), [(11, 1), (11, 4), (16, 3)])
def test_dense_predictions_are_q_of_each_normalised_patch(patch_px, stride_px):
    subnet, predict = dense(patch_px, stride_px)
    image = np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8)
    normalised = ((image / 255 - MEAN) / STD).astype(np.float32)
    patches = cut_patches(torch.tensor(normalised).permute(2, 0, 1)[None], patch_px, stride_px)
    with torch.no_grad():
        expected = torch.sigmoid(subnet(patches[0])).numpy()

    found = predict(image)

    assert found.dtype == np.float32
    assert found.shape == tuple((n - patch_px) // stride_px + 1 for n in (30, 41))
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-6)
    assert found.std() > 1e-3  # there is something to be equal to


def test_a_window_of_a_larger_array_is_taken_as_it_is():
    _, predict = dense(11, 4)
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    window = image[10:40, 20:50]
    np.testing.assert_array_equal(predict(window), predict(window.copy()))


def test_bfloat16_is_near_float32_and_not_the_same():
    image = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
    single, mixed = (dense(11, 1, precision)[1](image) for precision in ("float32", "bfloat16"))
    assert mixed.dtype == np.float32
    assert 0 < np.abs(single - mixed).max() < 0.05


def test_an_image_smaller_than_a_patch_is_refused():
    with pytest.raises(ModelError, match="images are 20 x 10 px: patches of 11 px"):
        dense(11, 1)[1](np.zeros((10, 20, 3), np.uint8))


def test_dense_predictions_have_the_cards_gamma():
    subnet, _ = dense(11, 4)
    image = np.random.default_rng(0).integers(0, 256, (11, 11, 3), np.uint8)
    predict = dense_predictor(
        subnet, stride_px=4, mean=MEAN, std=STD, gamma=2.2, device="cpu", precision="float32"
    )
    corrected = (((image / 255) ** (1 / 2.2) - MEAN) / STD).astype(np.float32)
    with torch.no_grad():
        expected = torch.sigmoid(subnet(torch.from_numpy(corrected).permute(2, 0, 1)[None]))
    np.testing.assert_allclose(predict(image), expected.numpy()[None], atol=1e-6)


def test_images_of_many_sizes_are_evaluated_in_few(monkeypatch):
    """Else what libraries of convolutions keep for each size would fill a worker's memory."""
    seen, evaluate = set(), inference.dense_logits

    def dense_logits(subnet, image, stride_px):
        seen.add(tuple((n - subnet.patch_px) // stride_px + 1 for n in image.shape[1:]))
        return evaluate(subnet, image, stride_px)

    _, predict = dense(11, 4)
    monkeypatch.setattr(inference, "dense_logits", dense_logits)
    for rows, cols in [(1, 1), (3, 8), (8, 2), (9, 16), (13, 5), (16, 16)]:
        image = np.zeros((4 * rows + 7, 4 * cols + 7 + 3, 3), np.uint8)  # 3 px are in no patch
        assert predict(image).shape == (rows, cols)
    assert seen == {(8, 8), (16, 16), (16, 8)}


@pytest.mark.parametrize(
    ("device", "setting", "patch_px", "size"),
    [
        ("cpu", None, 512, 4), ("cpu", None, 128, 8), ("cpu", None, 32, 64),
        ("cuda:1", None, 512, 32), ("cuda:1", None, 256, 128), ("cuda:1", None, 32, 512),
        ("cpu", 7, 32, 7),
    ],
)  # fmt: skip
def test_the_batch_size_is_the_settings_else_the_devices(device, setting, patch_px, size):
    assert use_batch_size(device, setting, patch_px) == size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_threads_that_share_a_gpu_get_what_a_cpu_gives():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Brightness())
    options = {"mean": MEAN, "std": STD, "precision": "float32"}
    on_cpu = predictor(deepcopy(module), device="cpu", **options)
    on_gpu = predictor(module, device="cuda", **options)
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, 256, (4, 256, 256, 3), np.uint8) for _ in range(40)]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(on_gpu, batches))
    for values, batch in zip(found, batches, strict=True):
        np.testing.assert_allclose(values, on_cpu(batch), atol=1e-3)  # TF32
