"""PatchNet: the subnet on patches, and the mean of its probabilities."""

import math

import numpy as np
import pytest
import torch
from scipy.signal import correlate
from torch.nn.functional import binary_cross_entropy_with_logits

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.patchnet import PatchNet, Subnet, cut_patches, logit_of_mean


def subnet(patch_px, seed=0, **settings):
    torch.manual_seed(seed)
    return Subnet(patch_px, **settings).double()


def by_scipy(subnet, patch, mode):
    """Logit of Q of one patch, layer by layer, written out from the paper."""
    values = patch.numpy()
    for layer in subnet.convolutions:
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        pad = [(0, 0), (1, 1), (1, 1)] if mode == "same" else 0
        padded = np.pad(values, pad)
        filtered = [correlate(padded, kernel, mode="valid")[0] for kernel in weight]
        values = np.maximum(np.stack(filtered) + bias[:, None, None], 0)
    readout = subnet.readout_weight.detach().numpy()
    sums = [np.vdot(w, v) for w, v in zip(readout, values, strict=True)]
    outputs = np.tanh(np.array(sums) + subnet.readout_bias.detach().numpy())
    return outputs, outputs @ subnet.head.weight.detach().numpy()[0] + subnet.head.bias.item()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_layers_are_the_papers(channels):
    module = Subnet(17, channels=channels)
    assert [layer.out_channels for layer in module.convolutions] == [64] * 7
    # 3 x 3 weights and a bias a filter; a weight a pixel and a bias a filter; 64 weights, a bias
    convolutions = 64 * (9 * channels + 1) + 6 * 64 * (9 * 64 + 1)
    readout, head = 64 * (17 * 17 + 1), 65
    counted = sum(parameter.numel() for parameter in module.parameters())
    assert counted == convolutions + readout + head


@pytest.mark.parametrize(("patch_px", "channels"), [(5, 1), (8, 3)])
def test_a_patch_goes_through_the_papers_layers(patch_px, channels):
    module = subnet(patch_px, channels=channels, filters=4)
    patches = torch.randn(2, channels, patch_px, patch_px, dtype=torch.float64)
    outputs, logits = zip(*(by_scipy(module, patch, "same") for patch in patches), strict=True)
    with torch.no_grad():
        assert module.filter_outputs(patches).numpy() == pytest.approx(np.stack(outputs), abs=1e-12)
        assert module(patches).numpy() == pytest.approx(np.array(logits), abs=1e-12)


def test_the_valid_variant_pads_nowhere():
    module = subnet(17, filters=4, padding="valid")
    assert module.output_px == 3  # 17 - 2 * 7
    patch = torch.randn(3, 17, 17, dtype=torch.float64)
    with torch.no_grad():
        logit = module(patch[None]).item()
    assert logit == pytest.approx(by_scipy(module, patch, "valid")[1], abs=1e-12)


def test_weights_of_one_padding_do_not_fit_the_other():
    valid = Subnet(17, filters=4, padding="valid")
    with pytest.raises(RuntimeError, match="readout_weight"):
        valid.load_state_dict(Subnet(17, filters=4).state_dict())


def test_the_convolutions_start_kaiming_normal():
    torch.manual_seed(0)
    module = Subnet(21)
    for layer in module.convolutions:
        expected = math.sqrt(2 / (9 * layer.in_channels))  # Kaiming, fan in, ReLU
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert not layer.bias.any()
    # uniform in +-1 / sqrt(21 * 21): standard deviation 1 / 21 / sqrt(3)
    assert module.readout_weight.abs().max().item() <= 1 / 21
    assert module.readout_weight.std().item() == pytest.approx(1 / 21 / math.sqrt(3), rel=0.05)


def test_patches_are_cut_row_by_row_and_the_rest_is_left():
    image = torch.arange(20).reshape(1, 1, 4, 5)
    patches = cut_patches(image, 2, 2)
    #  0  1 |  2  3 |  4
    #  5  6 |  7  8 |  9
    # 10 11 | 12 13 | 14
    # 15 16 | 17 18 | 19
    assert patches.shape == (1, 4, 1, 2, 2)
    assert patches.flatten(2).tolist() == [
        [[0, 1, 5, 6], [2, 3, 7, 8], [10, 11, 15, 16], [12, 13, 17, 18]]
    ]
    assert cut_patches(torch.zeros(1, 1, 128, 128), 17, 17).shape[1] == 7 * 7


@pytest.mark.parametrize(
    ("side_px", "patch_px", "stride_px", "patches"),
    [(128, 17, 17, 64), (119, 17, 17, 49), (120, 17, 17, 64), (32, 15, 8, 16), (31, 15, 8, 9)],
)
def test_the_patches_of_an_image_cover_it(side_px, patch_px, stride_px, patches):
    module, seen = PatchNet(patch_px, stride_px, filters=1, layers=1), []
    module.subnet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        module(torch.ones(1, 3, side_px, side_px))
    assert len(seen[0]) == patches
    assert seen[0].sum() >= 3 * side_px**2  # each pixel in one patch or more
    assert seen[0].sum(dim=(1, 2, 3)).min() > 0  # no patch of zeros alone


def test_patches_may_overlap_and_keep_their_channels_together():
    images = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    patches = cut_patches(images, 3, 1)
    assert patches.shape == (2, 6, 3, 3, 3)
    assert torch.equal(patches[1, 4], images[1, :, 1:4, 1:4])  # 3 columns: the 5th is row 1, col 1


def test_the_images_probability_is_the_plain_mean_of_its_patches():
    torch.manual_seed(0)
    module = PatchNet(5, 3, filters=4).double()
    images = torch.randn(2, 3, 11, 9, dtype=torch.float64)
    # Columns 0 to 4 and 3 to 7 lie inside; the ninth needs patches from 6 to 10, two of it zeros.
    covered = torch.cat([images, torch.zeros(2, 3, 11, 2, dtype=torch.float64)], dim=3)
    with torch.no_grad():
        q = [
            [torch.sigmoid(module.subnet(image[None, :, y : y + 5, x : x + 5])).item()
             for y in (0, 3, 6) for x in (0, 3, 6)]
            for image in covered
        ]  # fmt: skip
        p = torch.sigmoid(module(images)).numpy()
    assert p == pytest.approx(np.mean(q, axis=1), abs=1e-12)


def test_the_logit_of_a_mean_worked_by_hand():
    # Q = 1/2 and 3/4: P = 5/8, its logit log(5/3). The mean of the logits would be log(3) / 2.
    logits = torch.tensor([0, math.log(3)], dtype=torch.float64)
    assert logit_of_mean(logits).item() == pytest.approx(math.log(5 / 3), abs=1e-12)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_the_loss_is_the_cross_entropy_of_the_mean(label):
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 9, dtype=torch.float64)
    labels = torch.full((4,), label, dtype=torch.float64)
    p = torch.sigmoid(logits).mean(dim=1)
    naive = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    loss = binary_cross_entropy_with_logits(logit_of_mean(logits), labels)
    assert loss.item() == pytest.approx(naive.item(), abs=1e-12)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_the_gradient_of_the_loss_is_right(label):
    torch.manual_seed(0)
    logits = (5 * torch.randn(2, 5, dtype=torch.float64)).requires_grad_()
    labels = torch.full((2,), label, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: binary_cross_entropy_with_logits(logit_of_mean(z), labels), logits
    )


@pytest.mark.parametrize(("sign", "label"), [(-1, 1.0), (1, 0.0)])
def test_the_loss_is_finite_where_every_q_is_saturated_on_the_wrong_side(sign, label):
    # sigmoid(-1000) rounds to 0. P = exp(-1000), so -log P = 1000, and each of the four patches
    # has an equal share of its slope: -1/4.
    logits = torch.full((4,), sign * 1000.0, requires_grad=True)
    loss = binary_cross_entropy_with_logits(logit_of_mean(logits), torch.tensor(label))
    loss.backward()
    assert loss.item() == pytest.approx(1000)
    assert logits.grad.tolist() == pytest.approx([sign / 4] * 4, rel=1e-5)


def test_the_loss_is_finite_where_saturated_q_disagree():
    # Q = 1, 0, 0: P = 1/3, -log P = log 3
    logits = torch.tensor([500.0, -500.0, -500.0], requires_grad=True)
    loss = binary_cross_entropy_with_logits(logit_of_mean(logits), torch.tensor(1.0))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3), rel=1e-5)
    assert logits.grad.isfinite().all()


def test_mixed_precision_leaves_the_linear_models_float32():
    torch.manual_seed(0)
    module = PatchNet(17, 17, filters=8)
    images = torch.randn(2, 3, 34, 34)
    with torch.no_grad():
        exact = module(images)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = module(images)
    assert mixed.dtype == torch.float32
    assert torch.allclose(mixed, exact, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_px": 0}, "patch_px is 0"),
        ({"patch_px": 17.0}, r"patch_px is 17\.0"),
        ({"stride_px": 0}, "stride_px is 0"),
        ({"stride_px": 18}, "stride_px is 18 and patch_px 17"),
        ({"channels": 0}, "channels is 0"),
        ({"filters": -1}, "filters is -1"),
        ({"layers": 0}, "layers is 0"),
        ({"padding": "reflect"}, "padding is 'reflect'"),
        ({"patch_px": 14, "padding": "valid"}, "patch_px is 14: 7 layers.*15 px"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ModelError, match=message):
        PatchNet(**({"patch_px": 17, "stride_px": 17} | settings))


def test_images_smaller_than_a_patch_are_refused():
    with pytest.raises(ModelError, match="images are 20 x 16 px: patches of 17 px"):
        PatchNet(17, 17, filters=4)(torch.zeros(1, 3, 16, 20))


def test_patches_of_another_size_are_refused():
    with pytest.raises(ModelError, match="patches are 18 x 17 px: this subnet takes 17 x 17"):
        Subnet(17, filters=4)(torch.zeros(1, 3, 17, 18))
