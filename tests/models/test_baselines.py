"""The comparison's networks, held against torchvision's."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate
from torchvision.models import vgg11, vgg19

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.architectures import CLASSES
from wsi_pipeline.models.baselines import CAMNet, GradCAMNet
from wsi_pipeline.models.vgg16 import IMAGENET_MEAN, IMAGENET_STD

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cam():
    torch.manual_seed(0)
    return CAMNet().eval()


@pytest.fixture(scope="module")
def grad_cam():
    torch.manual_seed(0)
    return GradCAMNet().eval()


def on_meta(network, **arguments):
    """Shapes without memory."""
    with torch.device("meta"):
        return network(**arguments)


def shapes(modules):
    return [
        tuple(parameter.shape)
        for layer in modules
        if isinstance(layer, nn.Conv2d | nn.Linear)
        for parameter in layer.parameters()
    ]


def test_the_cam_networks_convolutions_are_vgg19s(cam):
    assert shapes(cam.features) == shapes(on_meta(vgg19).features)
    # 20,024,384 in VGG-19's convolutions and 513 in the linear unit
    assert sum(parameter.numel() for parameter in cam.parameters()) == 20_024_384 + 513


def test_the_cam_network_keeps_the_first_three_poolings(cam):
    layers = [type(layer) for layer in cam.features]
    expected = []
    for count, pooled in ((2, True), (2, True), (4, True), (4, False), (4, False)):
        expected += [nn.Conv2d, nn.ReLU] * count + [nn.MaxPool2d] * pooled
    assert layers == expected


@pytest.mark.parametrize(("height", "width"), [(8, 8), (31, 40)])
def test_the_mean_of_the_class_activation_map_and_the_bias_are_the_logit(cam, height, width):
    trained = copy.deepcopy(cam).requires_grad_(False).double()
    trained.head.weight.normal_(std=10)  # at the start, the logits are all but 0
    trained.head.bias.fill_(0.5)
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    features, logits = trained.features(images), trained(images)
    assert features.shape == (2, 512, height // 8, width // 8)
    maps = torch.einsum("k,nkyx->nyx", trained.head.weight[0], features)
    torch.testing.assert_close(maps.mean(dim=(1, 2)) + 0.5, logits, rtol=0, atol=1e-12)
    assert logits.std() > 1e-5  # there is something to be equal to


def test_the_grad_cam_network_is_vgg11_with_one_output():
    ours, theirs = on_meta(GradCAMNet), on_meta(vgg11, num_classes=1)
    assert str(ours.classifier) == str(theirs.classifier)  # dropout's probability included
    assert [(name, p.shape) for name, p in ours.named_parameters()] == [
        (name, p.shape) for name, p in theirs.named_parameters()
    ]
    # 132,863,336 in VGG-11 (torchvision), less a top of 1,000 outputs, and one of one output
    expected = 132_863_336 - 1000 * 4097 + 4097
    assert sum(parameter.numel() for parameter in ours.parameters()) == expected


def test_its_logit_is_vgg11s_of_the_resized_image(grad_cam):
    images = torch.randn(2, 3, 300, 64)  # shrunk in one direction, enlarged in the other
    theirs = on_meta(vgg11, num_classes=1).eval()
    theirs.load_state_dict(grad_cam.state_dict(), assign=True)
    resized = interpolate(images, (224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(grad_cam(images), theirs(resized).squeeze(1))


def test_dropout_draws_in_training_alone(grad_cam):
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(grad_cam(images), grad_cam(images))
        grad_cam.train()
        drawn = [(torch.manual_seed(seed), grad_cam(images))[1] for seed in (1, 2, 1)]
    grad_cam.eval()
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("name", ["cam", "grad_cam"])
def test_convolutions_start_kaiming_normal_of_their_inputs(name, request):
    for layer in request.getfixturevalue(name).features:
        if isinstance(layer, nn.Conv2d):
            expected = math.sqrt(2 / (layer.in_channels * 9))  # fan in, ReLU
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.1)
            assert not layer.bias.any()


@pytest.mark.parametrize("name", ["cam", "grad_cam"])
def test_logits_start_near_0_on_noise_black_and_white(name, request):
    module = request.getfixturevalue(name)
    mean, std = (torch.tensor(c).reshape(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 64, 64, generator=generator), torch.zeros(3, 64, 64)]
    with torch.no_grad():
        logits = module((torch.stack([*images, torch.ones(3, 64, 64)]) - mean) / std)
    assert 0 < logits.abs().max() < 0.5


def test_mixed_precision_leaves_the_logits_float32(cam):
    """Of the other network, whose last unit runs by the same function, it would take a minute."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = cam(torch.randn(2, 3, 32, 32))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())  # not bfloat16 in disguise


@pytest.mark.parametrize(
    ("network", "shape", "message"),
    [
        (CAMNet, (1, 3, 7, 64), "patches are 64 x 7 px: the CAM network needs 8 px"),
        (CAMNet, (1, 3, 64, 7), "patches are 7 x 64 px: the CAM network needs 8 px"),
        (GradCAMNet, (1, 3, 31, 64), "patches are 64 x 31 px: VGG-11 needs 32 px"),
    ],
)
def test_smaller_images_are_refused(network, shape, message):
    with pytest.raises(ModelError, match=message):
        on_meta(network)(torch.empty(shape, device="meta"))


def test_they_can_be_saved_under_their_names():
    assert (CLASSES["cam"], CLASSES["vgg11"]) == (CAMNet, GradCAMNet)
