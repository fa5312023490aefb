"""Grad-CAM and class activation maps against their formulas."""

import pytest
import torch
from small_networks import SmallAverage, SmallVgg, seeded
from torch import nn
from torch.nn import functional

from wsi_pipeline.errors import ModelError
from wsi_pipeline.explain.cam import class_activation_map, grad_cam
from wsi_pipeline.models.patchnet import PatchNet
from wsi_pipeline.models.vgg16 import VGG16

pytestmark = pytest.mark.usefixtures("one_thread")


def images(count=2, height=16, width=24, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(count, 3, height, width, dtype=dtype)


def upsampled(coarse, pixels):
    size = pixels.shape[-2:]
    return functional.interpolate(coarse[:, None].float(), size, mode="bilinear")[:, 0]


def weighted(maps, weights):
    return sum(weight * maps[:, k] for k, weight in enumerate(weights))


@torch.no_grad()
def rectified(model, pixels):
    """Output of the last convolution's ReLU, its second: functional.relu leaves its input."""
    first = functional.relu(model.features[0](pixels))
    return functional.relu(model.features[3](functional.max_pool2d(first, 2)))


def assert_equal(first, second):
    assert second.std() > 1e-3  # there is something to be equal to
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_grad_cam_of_a_max_pooled_network_is_its_closed_form():
    # Each channel's maximum passes the head's weight w_k on to one place (or parts it among equal
    # ones), so the gradient's sum over the 8 x 12 map is w_k and its mean a_k = w_k / 96.
    model, pixels = seeded(SmallVgg), images()
    weights = model.head.weight.detach()[0] / (8 * 12)
    coarse = weighted(rectified(model, pixels), weights)
    scaled = 96 * grad_cam(model, pixels, relu=False)
    assert_equal(scaled, upsampled(96 * coarse, pixels))
    positive = 96 * grad_cam(model, pixels)
    assert_equal(positive, upsampled(96 * coarse.clamp(min=0), pixels))


def test_grad_cam_of_vgg16_is_of_its_last_rectified_maps():
    torch.manual_seed(0)
    model, pixels = VGG16().eval(), images(1, 64, 64, torch.float32)
    with torch.no_grad():
        maps = model.features[:30](pixels)  # after the thirteenth ReLU: 4 x 4 places
    expected = upsampled(weighted(maps, model.head.weight.detach()[0]), pixels)
    assert_equal(16 * grad_cam(model, pixels, relu=False), expected)


def test_grad_cam_of_a_named_layer_is_of_its_own_output():
    model, pixels = seeded(SmallVgg), images()
    after_relu = grad_cam(model, pixels, relu=False)
    assert torch.equal(grad_cam(model, pixels, layer="features.4", relu=False), after_relu)
    before_relu = grad_cam(model, pixels, layer="features.3", relu=False)
    assert not torch.allclose(before_relu, after_relu)


def test_grad_cam_against_plain_autograd():
    model, pixels = seeded(SmallVgg), images()
    maps = functional.relu(model.features[0](pixels)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.head(model.features[2:](maps).amax((2, 3))).sum(), maps)
    coarse = (gradient.mean((2, 3), keepdim=True) * maps).sum(1)
    found = grad_cam(model, pixels, layer="features.1", relu=False)
    torch.testing.assert_close(found, coarse.detach().float(), rtol=1e-5, atol=1e-8)


def test_grad_cam_finds_the_relu_behind_batch_normalisation_only_in_a_sequence():
    def network(*behind):
        model = seeded(SmallAverage)
        model.features = nn.Sequential(nn.Conv2d(3, 5, 3), *behind).double()
        return model

    def scaled(model, layer=None):  # of (16 - 2) (24 - 2) = 308 places
        return 308 * grad_cam(model, images(), layer=layer, relu=False)

    normalised = network(nn.BatchNorm2d(5), nn.ReLU())
    assert torch.equal(scaled(normalised), scaled(normalised, "features.2"))
    pooled_first = network(nn.AvgPool2d(1), nn.ReLU())
    assert torch.equal(scaled(pooled_first), scaled(pooled_first, "features.0"))
    assert not torch.allclose(scaled(pooled_first), scaled(pooled_first, "features.2"))


def test_grad_cam_without_relu_is_the_class_activation_map_over_the_number_of_places():
    # The logit is mean_k w_k f_k over 4 x 6 places: its gradient is w_k / 24 everywhere.
    model, pixels = seeded(SmallAverage), images()
    expected = class_activation_map(model, pixels)
    assert_equal(24 * grad_cam(model, pixels, layer="features.5", relu=False), expected)


def test_class_activation_map_by_hand():
    # f_1 = the red channel, f_2 = the green one; the head weighs them 2 and -3: at (x, y)
    # M = 2 r - 3 g, here 2*1 - 3*0 = 2 | 2*2 - 3*1 = 1 / 2*3 - 3*5 = -9 | 2*0 - 3*2 = -6.
    model = SmallAverage()
    model.features = nn.Conv2d(3, 2, 1, bias=False)
    model.head = nn.Linear(2, 1)
    with torch.no_grad():
        model.features.weight.copy_(torch.tensor([[1, 0, 0], [0, 1, 0]])[:, :, None, None])
        model.head.weight.copy_(torch.tensor([[2, -3]]))
        model.head.bias.fill_(10)
    red, green = [[1, 2], [3, 0]], [[0, 1], [5, 2]]
    pixels = torch.tensor([[red, green, [[8, 8], [8, 8]]]], dtype=torch.float32)
    expected = torch.tensor([[[2.0, 1.0], [-9.0, -6.0]]])
    assert torch.equal(class_activation_map(model, pixels), expected)
    assert torch.equal(class_activation_map(model, pixels, target=0), -expected)
    assert model(pixels).item() == expected.mean() + 10


def test_for_class_0_the_map_is_the_negative():
    model, pixels = seeded(SmallVgg), images()
    of_1, of_0 = (grad_cam(model, pixels, target=target, relu=False) for target in (1, 0))
    assert torch.equal(of_0, -of_1)
    assert grad_cam(model, pixels, target=0).min() == 0


def test_models_without_global_average_pooling_are_refused():
    pixels = images()
    with pytest.raises(ModelError, match=r"not the mean .* needs features, then global average"):
        class_activation_map(seeded(SmallVgg), pixels)
    with pytest.raises(ModelError, match="no module named features or head"):
        class_activation_map(PatchNet(8, 8, filters=2, layers=1).double(), pixels)
    with pytest.raises(ModelError, match=r"classifier is Linear.*out_features=2.*not linear with"):
        model = seeded(SmallAverage)
        model.classifier = nn.Linear(5, 2)
        class_activation_map(model, pixels, head="classifier")
    with pytest.raises(ModelError, match="do not belong together"):
        class_activation_map(seeded(SmallAverage), pixels, features="features.0")


def test_a_logit_that_is_not_the_heads_is_refused():
    class Doubled(SmallAverage):
        def forward(self, pixels):
            return 2 * super().forward(pixels)

    with pytest.raises(ModelError, match="output is not that of 'head'"):
        class_activation_map(seeded(Doubled), images())


def test_a_class_activation_map_needs_its_modules_to_run():
    model = seeded(SmallAverage)
    model.spare = nn.Linear(5, 1)
    with pytest.raises(ModelError, match="does not run 'features' and 'spare'"):
        class_activation_map(model, images(), head="spare")


def test_layers_that_grad_cam_cannot_explain_are_refused():
    pixels = images()
    patchnet = PatchNet(8, 8, filters=2, layers=1).double()
    with pytest.raises(ModelError, match=r"\(12, 1, 8, 8\) for 2 images"):  # 2 x 3 patches each
        grad_cam(patchnet, pixels)
    with pytest.raises(ModelError, match=r"'subnet.convolutions'.*did not obtain"):
        grad_cam(patchnet, pixels, layer="subnet.convolutions")
    with pytest.raises(ModelError, match="layer 'feature' is not in the model"):
        grad_cam(seeded(SmallVgg), pixels, layer="feature")
    with pytest.raises(ModelError, match="target is 2"):
        grad_cam(seeded(SmallVgg), pixels, target=2)


METHODS = pytest.mark.parametrize(
    ("method", "network"), [(grad_cam, SmallVgg), (class_activation_map, SmallAverage)]
)


@METHODS
def test_maps_are_float32_of_the_images_size_in_any_memory_format(method, network):
    model, pixels = seeded(network, dtype=torch.float32), images(dtype=torch.float32)
    maps = method(model, pixels)
    assert maps.shape == (2, 16, 24)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    channels_last = method(model, pixels.to(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last, maps, rtol=1e-4, atol=1e-6)


@METHODS
def test_maps_do_not_depend_on_the_other_images_of_the_batch(method, network):
    model, pixels = seeded(network), images()
    torch.testing.assert_close(method(model, pixels)[1:], method(model, pixels[1:]))
