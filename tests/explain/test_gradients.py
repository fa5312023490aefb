"""Gradients by pixel against finite differences, hand-worked ReLUs and captum."""

import functools

import pytest
import torch
from captum.attr import Deconvolution, GuidedBackprop, Saliency
from small_networks import PixelWeights, SmallVgg, seeded
from torch import nn
from torch.nn import functional

from wsi_pipeline.errors import ConfigError, ModelError
from wsi_pipeline.explain.cam import grad_cam
from wsi_pipeline.explain.gradients import (
    deconvolution,
    guided_backpropagation,
    saliency,
    smooth_grad,
)
from wsi_pipeline.models.patchnet import PatchNet

pytestmark = pytest.mark.usefixtures("one_thread")

few_copies = functools.partial(smooth_grad, samples=3)
METHODS = pytest.mark.parametrize(
    "method", [saliency, few_copies, guided_backpropagation, deconvolution]
)


def images(count=2, height=8, width=12, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(count, 3, height, width, dtype=dtype)


def assert_equal(first, second):
    assert second.std() > 1e-3  # there is something to be equal to
    torch.testing.assert_close(first, second.float(), rtol=1e-5, atol=1e-6)


class OneLayer(nn.Module):
    """Logit: -2 ReLU(r - g) + 3 ReLU(g - r) - ReLU(r + g), summed over the places.

    `relu` is any spelling of a ReLU; it may work in place.
    """

    def __init__(self, relu):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 1, bias=False)
        weights = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [1, 1, 0]])
        self.convolution.weight.data = weights[:, :, None, None]
        self.relu = relu

    def forward(self, pixels):
        signs = torch.tensor([-2.0, 3, -1])
        return self.relu(self.convolution(pixels)).sum((2, 3)) @ signs


SPELLINGS = pytest.mark.parametrize(
    "relu",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        torch.relu,
        functional.relu,
        torch.relu_,
        lambda x: functional.relu(x, inplace=True),
        lambda x: x.relu(),
    ],
)
PLACES = torch.tensor([[[2.0, 1.0, -4.0]], [[1.0, 5.0, 1.0]], [[9.0, 9.0, 9.0]]])[None]
"""Three places (r, g): (2, 1), (1, 5), (-4, 1)."""


@SPELLINGS
def test_saliency_by_hand(relu):
    # (2, 1): active r - g and r + g: by r -2 - 1, by g 2 - 1: (-3, 1), largest 3
    # (1, 5): active g - r and r + g: by r -3 - 1, by g 3 - 1: (-4, 2), largest 4
    # (-4, 1): active g - r alone: (-3, 3), largest 3
    assert saliency(OneLayer(relu), PLACES).tolist() == [[[3, 4, 3]]]


@SPELLINGS
def test_guided_backpropagation_by_hand(relu):
    # Of the gradients by the ReLUs' outputs, (-2, 3, -1), the 3 of g - r is positive and passes
    # where g - r is: not at (2, 1); at the others (-3, 3). For class 0 they are (2, -3, 1): at
    # (2, 1) r - g and r + g pass, (2 + 1, -2 + 1), largest 3; at (1, 5) r + g alone, (1, 1);
    # at (-4, 1) both are negative.
    model = OneLayer(relu)
    assert guided_backpropagation(model, PLACES).tolist() == [[[0, 3, 3]]]
    assert guided_backpropagation(model, PLACES, target=0).tolist() == [[[3, 1, 0]]]


@SPELLINGS
def test_deconvolution_by_hand(relu):
    # As guided, without regard to the ReLUs' inputs: everywhere 3 by g - r, (-3, 3); for class 0
    # everywhere 2 by r - g and 1 by r + g, (2 + 1, -2 + 1).
    model = OneLayer(relu)
    assert deconvolution(model, PLACES).tolist() == [[[3, 3, 3]]]
    assert deconvolution(model, PLACES, target=0).tolist() == [[[3, 3, 3]]]


def test_saliency_is_the_finite_difference():
    model, pixels, step = seeded(SmallVgg), images(1, 4, 4), 1e-6
    differences = torch.empty_like(pixels).flatten()
    with torch.no_grad():
        for index in range(differences.numel()):
            shift = torch.zeros_like(differences)
            shift[index] = step
            shift = shift.view_as(pixels)
            rise = model(pixels + shift) - model(pixels - shift)
            differences[index] = rise.item() / (2 * step)
    expected = differences.view_as(pixels).abs().amax(dim=1)
    assert_equal(saliency(model, pixels), expected)


@pytest.mark.parametrize(
    ("method", "reference"),
    [
        (saliency, Saliency),
        (guided_backpropagation, GuidedBackprop),
        (deconvolution, Deconvolution),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting backward hooks", "ignore:Input Tensor")
def test_maps_are_captums_on_a_network_of_relu_modules(method, reference):
    # captum asks for ReLUs that do not work in place
    model, pixels = seeded(SmallVgg), images()
    model.features[1], model.features[4] = nn.ReLU(), nn.ReLU()
    for target, sign in ((1, 1), (0, -1)):
        scores = nn.Sequential(model, PlusMinus(sign))
        expected = reference(scores).attribute(pixels).abs().amax(dim=1)
        assert_equal(method(model, pixels, target=target), expected)


class PlusMinus(nn.Module):
    def __init__(self, sign):
        super().__init__()
        self.sign = sign

    def forward(self, logits):
        return self.sign * logits


@pytest.mark.parametrize("method", [guided_backpropagation, deconvolution])
def test_patchnets_functional_relus_follow_the_rule(method):
    # One patch: PatchNet is then its subnet, written here with ReLU modules for captum.
    torch.manual_seed(0)
    model, pixels = PatchNet(8, 8, filters=3, layers=2).double(), images(2, 8, 8)
    subnet = model.subnet

    class Modules(nn.Module):
        def __init__(self):
            super().__init__()
            first, second = subnet.convolutions
            self.layers = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

        def forward(self, patches):
            return subnet.logits(subnet.read_out(self.layers(patches)))

    reference = {guided_backpropagation: GuidedBackprop, deconvolution: Deconvolution}[method]
    with pytest.warns(UserWarning, match="Setting backward hooks"):
        expected = reference(Modules()).attribute(pixels.clone().requires_grad_())
    found = method(model, pixels)
    assert_equal(found, expected.abs().amax(dim=1).detach())
    assert not torch.allclose(found, saliency(model, pixels))


def test_a_relu_module_called_twice_follows_the_rule_both_times():
    relu = nn.ReLU()
    twice, once = OneLayer(lambda x: relu(relu(x) - 0.5)), OneLayer(relu)
    # ReLU(x) - 1/2 is above 0 wherever x is in these places (whole numbers): the same maps
    for target in (1, 0):
        expected = guided_backpropagation(once, PLACES, target=target)
        assert torch.equal(guided_backpropagation(twice, PLACES, target=target), expected)


@pytest.mark.parametrize("method", [guided_backpropagation, deconvolution])
def test_a_model_without_relus_is_refused(method):
    with pytest.raises(ModelError, match="uses no ReLU"):
        method(OneLayer(functional.gelu), PLACES)


@pytest.mark.parametrize("method", [saliency, guided_backpropagation, deconvolution])
def test_smooth_grad_without_noise_is_the_methods_map(method):
    model, pixels = seeded(SmallVgg), images()
    smooth = smooth_grad(model, pixels, samples=4, noise=0, method=method)
    assert torch.equal(smooth, method(model, pixels))  # four equal numbers over 4: no rounding


def test_smooth_grad_of_a_linear_model_is_exact():
    weights = images(1)[0]
    expected = weights.abs().amax(dim=0).float().expand(2, -1, -1)
    smooth = smooth_grad(PixelWeights(weights), images(), samples=4, noise=0.5)
    assert torch.equal(smooth, expected)


def test_smooth_grads_noise_is_a_share_of_each_images_range():
    # The logit (sum of red^2) / 2 has the gradient red + noise, red 100 and the noise small: the
    # mean of 4 maps deviates from 100 by 1/2 of the noise's deviation. Ranges are 110 and 120.
    class Squares(nn.Module):
        def forward(self, pixels):
            return (pixels[:, 0] ** 2).sum((1, 2)) / 2

    pixels = torch.full((2, 3, 100, 100), 100.0, dtype=torch.float64)
    pixels[:, 1], pixels[:, 2] = 0, torch.tensor([110.0, 120.0])[:, None, None]
    smooth = smooth_grad(Squares(), pixels, samples=4, noise=0.1) - 100
    # of 10,000 values: the deviation is uncertain by 1 / sqrt(20,000) = 0.7 %, the mean by 0.06
    assert smooth[0].std().item() == pytest.approx(5.5, rel=0.03)
    assert smooth[1].std().item() == pytest.approx(6.0, rel=0.03)
    assert smooth.mean().item() == pytest.approx(0, abs=0.2)


def test_smooth_grad_is_the_mean_over_the_copies():
    model, pixels = seeded(SmallVgg), images()
    seen = []

    def remembered(model, noisy, *, target):
        seen.append(noisy)
        return saliency(model, noisy, target=target)

    smooth = smooth_grad(model, pixels, samples=3, method=remembered)
    assert len(seen) == 3
    assert not any(torch.equal(seen[0], other) for other in seen[1:])
    expected = torch.stack([saliency(model, noisy) for noisy in seen]).mean(0)
    assert_equal(smooth, expected)


def test_smooth_grads_noise_is_drawn_from_its_seed():
    model, pixels = seeded(SmallVgg), images()
    first = few_copies(model, pixels)
    assert torch.equal(few_copies(model, pixels), first)
    assert not torch.equal(few_copies(model, pixels, seed=1), first)


def test_smooth_grad_averages_any_method():
    model, pixels = seeded(SmallVgg), images()
    smooth = smooth_grad(model, pixels, samples=2, noise=0, target=0, method=grad_cam)
    assert torch.equal(smooth, grad_cam(model, pixels, target=0))


@pytest.mark.parametrize(
    ("settings", "message"), [({"samples": 0}, "samples is 0"), ({"noise": -0.1}, "noise is -0.1")]
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        smooth_grad(seeded(SmallVgg), images(), **settings)


def test_plain_gradients_are_alike_for_both_classes_and_guided_ones_are_not():
    model, pixels = seeded(SmallVgg), images()
    assert torch.equal(saliency(model, pixels), saliency(model, pixels, target=0))
    for method in (guided_backpropagation, deconvolution):
        assert not torch.allclose(method(model, pixels), method(model, pixels, target=0))
    with pytest.raises(ModelError, match="target is -1"):
        saliency(model, pixels, target=-1)


@METHODS
def test_maps_are_float32_of_the_images_size_in_any_memory_format(method):
    model, pixels = seeded(SmallVgg, dtype=torch.float32), images(dtype=torch.float32)
    maps = method(model, pixels)
    assert maps.shape == (2, 8, 12)
    assert maps.dtype == torch.float32
    assert maps.min() >= 0
    channels_last = method(model, pixels.to(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last, maps, rtol=1e-4, atol=1e-6)


@METHODS
def test_maps_do_not_depend_on_the_other_images_of_the_batch(method):
    model, pixels = seeded(SmallVgg), images()
    torch.testing.assert_close(method(model, pixels)[1:], method(model, pixels[1:]))


@METHODS
def test_gradients_are_taken_where_the_caller_wants_none(method):
    model, pixels = seeded(SmallVgg), images()
    expected = method(model, pixels)
    with torch.no_grad():
        assert torch.equal(method(model, pixels), expected)
        assert not torch.is_grad_enabled()
