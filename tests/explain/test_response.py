"""Response maps: unpooling and projecting back by hand and against autograd, CLEAR, attentive."""

import numpy as np
import pytest
import torch
from captum.attr import Deconvolution
from small_networks import SmallAverage, SmallVgg, seeded
from torch import nn
from torch.nn import functional

from wsi_pipeline.errors import ConfigError, ModelError
from wsi_pipeline.explain.response import (
    ClearMaps,
    attentive_response_map,
    clear,
    clear_map,
    clear_picture,
    project_back,
    respond,
    unpool,
)
from wsi_pipeline.models.vgg16 import VGG16

pytestmark = pytest.mark.usefixtures("one_thread")


def images(count=2, height=16, width=24, channels=3, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(count, channels, height, width, dtype=dtype)


def pointwise(*kernels):
    """A 1 x 1 convolution with these weights (a row for each kernel) and no bias."""
    weight = torch.tensor(kernels, dtype=torch.float64)
    layer = nn.Conv2d(weight.shape[1], len(weight), 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(weight[:, :, None, None])
    return layer


def last_activations(model, pixels):
    """Of a SmallVgg's second convolution, after its ReLU; the model's ReLUs work in place."""
    with torch.no_grad():
        return model.features[:5](pixels)


def test_unpooling_by_hand():
    plane = torch.tensor([[1.0, 5, 2, 0], [3, 4, 0, 7], [0, 0, 1, 1], [9, 0, 1, 2]])[None, None]
    _, switches = functional.max_pool2d(plane, 2, return_indices=True)
    # maxima: 5 at (y 0, x 1), 7 at (1, 3), 9 at (3, 0), 2 at (3, 3)
    back = unpool(torch.tensor([[10.0, 20], [30, 40]])[None, None], switches, (4, 4))
    expected = [[0, 10, 0, 0], [0, 0, 0, 20], [0, 0, 0, 0], [30, 0, 0, 40]]
    assert back.tolist() == [[expected]]


def test_values_of_windows_with_one_maximum_are_added():
    _, switches = functional.max_pool2d(
        torch.tensor([[[[0.0, 8, 0]]]]), (1, 2), stride=1, return_indices=True
    )
    assert unpool(torch.tensor([[[[2.0, 3.0]]]]), switches, (1, 3)).tolist() == [[[[0, 5, 0]]]]


def test_projecting_back_through_one_convolution_by_hand():
    layer = nn.Conv2d(1, 1, 2, bias=True)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[[1.0, 2], [3, 4]]]]))
    with torch.no_grad():
        response = respond([layer], torch.rand(1, 1, 3, 3))
        back = project_back(response, torch.tensor([[[[5.0, 0], [0, 1]]]]))
    # 5 times the kernel at the upper left, once at the lower right; they share the centre
    assert back.tolist() == [[[[5, 10, 0], [15, 20 + 1, 2], [0, 3, 4]]]]


def test_without_relus_projecting_back_is_the_gradient():
    torch.manual_seed(3)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(4, 6, (2, 3), dilation=(1, 2), groups=2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(6, 5, 1),
    ).double()
    pixels = images(2, 33, 38).requires_grad_()
    values = layers(pixels)
    cotangent = torch.randn_like(values)
    (expected,) = torch.autograd.grad((values * cotangent).sum(), pixels)
    response = respond(layers, pixels)
    torch.testing.assert_close(response.activations, values)
    torch.testing.assert_close(project_back(response, cotangent), expected)
    assert expected.std() > 0.001


def test_many_activations_are_projected_onto_one_image():
    model, pixels = seeded(SmallVgg), images(1)
    response = respond(model.features, pixels)
    several = torch.randn(3, *response.activations.shape[1:], dtype=torch.float64)
    one_by_one = torch.cat([project_back(response, each[None]) for each in several])
    torch.testing.assert_close(project_back(response, several), one_by_one)


def test_rectifying_by_hand():
    # Up: two kernels 2 and 3, then a ReLU, then their difference. Down from 1: through the second
    # layer (1, -1); to the input 2 * 1 + 3 * -1 = -1, and with the -1 rectified 2 * 1 = 2.
    layers = [pointwise([2], [3]), nn.ReLU(), pointwise([1, -1])]
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for pixels in (one, -one):  # a gradient would be 0 for the second, where no ReLU lets through
        response = respond(layers, pixels)
        assert project_back(response, one).item() == -1
        assert project_back(response, one, rectify=True).item() == 2


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_rectified_projections_are_captums_deconvolution():
    class HalfSquares(SmallVgg):  # its gradient at the feature maps is the feature maps
        def forward(self, pixels):
            return self.features(pixels).square().sum((1, 2, 3)) / 2

    model, pixels = seeded(HalfSquares), images()
    for layer in (model.features[1], model.features[4]):
        layer.inplace = False
    response = respond(model.features, pixels)
    expected = Deconvolution(model).attribute(pixels.clone().requires_grad_())
    back = project_back(response, response.activations, rectify=True)
    torch.testing.assert_close(back, expected)
    assert not torch.allclose(project_back(response, response.activations), expected)


def level_of(model, pixels, unit):
    """Of one unit's feature map alone, projected back."""
    activations = last_activations(model, pixels)
    alone = torch.zeros_like(activations)
    alone[:, unit] = activations[:, unit]
    back = project_back(respond(model.features[:5], pixels), alone)
    return back.abs().amax(1).detach().float()


def test_attentive_map_of_one_unit_is_its_projection():
    model, pixels = seeded(SmallVgg), images(1)
    # a unit's share of the logit is its largest activation times its weight in the head
    shares = last_activations(model, pixels).amax((2, 3))[0] * model.head.weight[0]
    found = attentive_response_map(model, pixels, units=1)
    torch.testing.assert_close(found, level_of(model, pixels, shares.argmax()))
    assert found.std() > 0
    against = attentive_response_map(model, pixels, units=1, target=0)
    torch.testing.assert_close(against, level_of(model, pixels, shares.argmin()))


@pytest.mark.parametrize("network", [SmallVgg, SmallAverage])
def test_attentive_map_is_the_maximum_over_the_units_that_speak_for_the_class(network):
    model, pixels = seeded(network), images(1)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[1.0, -1, 1, -1, 1]]))
    levels = [level_of(model, pixels, unit) for unit in range(5)]
    for_1 = torch.stack([levels[0], levels[2], levels[4]]).amax(0)
    for_0 = torch.maximum(levels[1], levels[3])
    for at_once in (1, 2, 4):
        found = attentive_response_map(model, pixels, units=25, at_once=at_once)
        torch.testing.assert_close(found, for_1)
    torch.testing.assert_close(attentive_response_map(model, pixels, target=0), for_0)


def test_attentive_map_is_zero_where_no_unit_speaks_for_the_class():
    model = seeded(SmallVgg)
    with torch.no_grad():
        model.head.weight.copy_(-model.head.weight.abs())
    assert attentive_response_map(model, images()).count_nonzero() == 0
    assert attentive_response_map(model, images(), target=0).count_nonzero() > 0


def test_a_named_layer_is_taken_as_it_is():
    model, pixels = seeded(SmallVgg), images()
    default = attentive_response_map(model, pixels)
    assert torch.equal(attentive_response_map(model, pixels, layer="features.4"), default)
    before_relu = attentive_response_map(model, pixels, layer="features.3")
    assert not torch.allclose(before_relu, default)


class RedAgainstGreen(SmallVgg):
    """Kernel 0 is the red channel, with weight 2; kernel 1 the green one, with weight -3."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(pointwise([1, 0, 0], [0, 1, 0]), nn.ReLU(inplace=True))
        self.head = nn.Linear(2, 1)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[2.0, -3.0]]))


class RedAgainstGreenOnAverage(RedAgainstGreen):
    pool = SmallAverage.pool


@pytest.mark.parametrize("network", [RedAgainstGreen, RedAgainstGreenOnAverage])
def test_clear_by_hand_for_both_global_poolings(network):
    # Levels at each pixel: 2 max(red, 0) for class 1, 3 max(green, 0) for class 0.
    red, green = [[1.0, 3, 0], [0, 3, -4]], [[0.0, 1, 2], [0, 4, 0]]
    pixels = torch.tensor([[red, green, [[5.0] * 3] * 2]], dtype=torch.float64)
    maps = clear(seeded(network), pixels)
    assert maps.dominant_class.tolist() == [[[1, 1, 0], [0, 0, 0]]]  # 6 against 3, 6 against 12
    assert maps.level.tolist() == [[[2, 6, 6], [0, 12, 0]]]
    assert maps.level.dtype == torch.float32
    of_1 = clear_map(seeded(network), pixels)
    assert of_1.tolist() == [[[2, 6, 0], [0, 0, 0]]]
    assert clear_map(seeded(network), pixels, target=0).tolist() == [[[0, 0, 6], [0, 12, 0]]]


def test_clear_projects_each_classs_feature_maps():
    model, pixels = seeded(SmallVgg), images()
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[3.0, -1, 1, -2, 2]]))
        response = respond(model.features[:5], pixels)
    levels = []
    for weights in ([0, 1, 0, 2, 0], [3, 0, 1, 0, 2]):  # of class 0, of class 1
        evidence = torch.tensor(weights)[:, None, None] * response.activations
        levels.append(project_back(response, evidence).detach().abs().amax(1).float())
    maps = clear(model, pixels)
    torch.testing.assert_close(maps.level, torch.maximum(*levels))
    assert torch.equal(maps.dominant_class, (levels[1] > levels[0]).long())
    assert 0.1 < maps.dominant_class.double().mean() < 0.9


def test_clear_picture_by_hand():
    classes = torch.tensor([[[1, 0, 0]], [[0, 1, 0]]])
    level = torch.tensor([[[2.0, 0.4, 0.0]], [[0.0, 0.0, 0.0]]])
    picture = clear_picture(ClearMaps(classes, level))
    # hue 0 is red, 2/3 blue; 0.4 of 2 is a fifth of 255
    assert picture.tolist() == [[[[255, 0, 0], [0, 0, 51], [0, 0, 0]]], [[[0, 0, 0]] * 3]]
    assert picture.dtype == np.uint8


def test_a_relu_that_is_used_twice():
    model, shared = seeded(SmallVgg), seeded(SmallVgg)
    relu = nn.ReLU(inplace=True)
    shared.features[1] = shared.features[4] = relu
    pixels = images()
    assert torch.equal(
        attentive_response_map(shared, pixels), attentive_response_map(model, pixels)
    )


def test_vgg16_is_projected_back_from_its_thirteenth_relu():
    torch.manual_seed(0)
    model, pixels = VGG16(), images(1, 32, 40, dtype=torch.float32)
    found = attentive_response_map(model, pixels, units=2)
    assert found.shape == (1, 32, 40)
    assert found.count_nonzero() > 0
    assert torch.equal(found, attentive_response_map(model, pixels, units=2, layer="features.29"))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm2d(4), r"BatchNorm2d\(4.*Conv2d, ReLU and MaxPool2d layers only"),
        (nn.Conv2d(4, 4, 3, padding="same"), "needs zero padding given in pixels"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "needs zero padding"),
    ],
)
def test_layers_of_other_kinds_are_refused(layer, message):
    model = seeded(SmallVgg)
    model.features[1] = layer.double()
    with pytest.raises(ModelError, match=message):
        clear(model, images())


def test_models_of_another_form_are_refused():
    class Normalising(SmallVgg):
        def forward(self, pixels):
            return super().forward(pixels / 2)

    class Elsewhere(SmallVgg):
        def forward(self, pixels):
            return pixels.mean((1, 2, 3))

    with pytest.raises(ModelError, match="changes its images"):
        clear(seeded(Normalising), images())
    with pytest.raises(ModelError, match="does not depend on its stack"):
        clear(seeded(Elsewhere), images())
    with pytest.raises(ModelError, match=r"no nn.Sequential named 'body'"):
        clear(seeded(SmallVgg), images(), features="body")
    with pytest.raises(ModelError, match="layer 'head' is not one of the layers of 'features'"):
        clear(seeded(SmallVgg), images(), layer="head")


@pytest.mark.parametrize("name", ["units", "at_once"])
def test_numbers_under_1_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is 0: it must be 1 or more"):
        attentive_response_map(seeded(SmallVgg), images(), **{name: 0})


METHODS = pytest.mark.parametrize("method", [attentive_response_map, clear_map])


@METHODS
def test_an_unknown_target_is_refused(method):
    with pytest.raises(ModelError, match="target is 2"):
        method(seeded(SmallVgg), images(), target=2)


@METHODS
def test_maps_are_float32_of_the_images_size(method):
    model = seeded(SmallVgg, dtype=torch.float32)
    pixels = images(dtype=torch.float32)
    maps = method(model, pixels)
    assert maps.shape == (2, 16, 24)
    assert maps.dtype == torch.float32
    channels_last = method(model, pixels.to(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last, maps, rtol=1e-4, atol=1e-6)
    alone = method(model, pixels[1:])
    torch.testing.assert_close(maps[1:], alone, rtol=1e-4, atol=1e-6)
