"""Models as functions of pixels."""

import numpy as np
import pytest
import torch

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.inference import dense_predictor
from wsi_pipeline.models.patchnet import Subnet, cut_patches

MEAN, STD = (0.7, 0.6, 0.5), (0.2, 0.1, 0.3)


@pytest.fixture(autouse=True)
def one_thread():
    """Many small operations: on a busy machine, threads would wait for each other at each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def predictor(patch_px, stride_px, mixed_precision=False):
    torch.manual_seed(0)
    subnet = Subnet(patch_px, filters=4, layers=2)
    settings = {"mean": MEAN, "std": STD, "device": "cpu", "mixed_precision": mixed_precision}
    return subnet, dense_predictor(subnet, stride_px=stride_px, **settings)


@pytest.mark.parametrize(("patch_px", "stride_px"), [(11, 1), (11, 4), (16, 3)])
def test_dense_predictions_are_q_of_each_normalised_patch(patch_px, stride_px):
    subnet, predict = predictor(patch_px, stride_px)
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
    _, predict = predictor(11, 4)
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    window = image[10:40, 20:50]
    np.testing.assert_array_equal(predict(window), predict(window.copy()))


def test_mixed_precision_is_near_single_precision_and_not_the_same():
    image = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
    single, mixed = (predictor(11, 1, mixed)[1](image) for mixed in (False, True))
    assert mixed.dtype == np.float32
    assert 0 < np.abs(single - mixed).max() < 0.05


def test_an_image_smaller_than_a_patch_is_refused():
    with pytest.raises(ModelError, match="images are 20 x 10 px: patches of 11 px"):
        predictor(11, 1)[1](np.zeros((10, 20, 3), np.uint8))
