"""The lecture's network."""

import math

import pytest
import torch
from torch import nn

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.vgg16 import IMAGENET_MEAN, IMAGENET_STD, VGG16

CONV_CHANNELS = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return VGG16().eval()


def test_the_layers_are_vgg16s(module):
    convolutions = [layer for layer in module.features if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == CONV_CHANNELS
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in module.features) == 5
    # 14,714,688 in VGG16's convolutions (Simonyan and Zisserman) and 513 in the dense unit
    assert sum(parameter.numel() for parameter in module.parameters()) == 14_714_688 + 513


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 95), (64, 32)])
def test_one_logit_for_a_patch_of_any_size(module, height, width):
    with torch.inference_mode():
        assert module(torch.randn(3, 3, height, width)).shape == (3,)


def test_the_logit_is_the_dense_unit_of_the_largest_value_of_each_channel(module):
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        values = module.features(images).numpy()
        logits = module(images).numpy()
    assert values.shape == (2, 512, 2, 3)
    weight, bias = module.head.weight.detach().numpy()[0], module.head.bias.item()
    expected = values.reshape(2, 512, 6).max(axis=2) @ weight + bias
    assert logits == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (1, 3, 64, 31)])
def test_a_patch_under_32_px_is_refused(module, shape):
    with pytest.raises(ModelError, match=r"31.*32 px or more"):
        module(torch.zeros(shape))


def test_random_weights_start_as_torchvisions(module):
    for layer in module.features:
        if isinstance(layer, nn.Conv2d):
            expected = math.sqrt(2 / (layer.out_channels * 9))  # Kaiming, fan out, ReLU
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.1)
            assert not layer.bias.any()
    assert module.head.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert not module.head.bias.any()


def test_mixed_precision_leaves_the_logits_float32(module):
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        exact = module(images)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = module(images)
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, mixed.bfloat16().float())  # not bfloat16 values in disguise
    assert torch.allclose(mixed, exact, atol=0.02 * exact.abs().max().item())


def test_imagenet_normalisation():
    assert IMAGENET_MEAN == (0.485, 0.456, 0.406)
    assert IMAGENET_STD == (0.229, 0.224, 0.225)
