"""The lecture's network, and where its weights come from."""

import math
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models import vgg16 as vgg16_module
from wsi_pipeline.models.inference import use_mixed_precision
from wsi_pipeline.models.vgg16 import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VGG16,
    build_vgg16,
)

CONV_CHANNELS = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return VGG16().eval()


def torchvision_state(module):
    """A stand-in for torchvision's file: its keys and shapes, the fully connected top cut short."""
    state = {f"features.{key}": value for key, value in module.features.state_dict().items()}
    return state | {"classifier.6.weight": torch.zeros(1000, 8), "classifier.6.bias": torch.ones(8)}


def same(first, second):
    return all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


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


def test_random_weights_depend_on_the_seed_alone():
    first, state = build_vgg16("none", seed=3), torch.get_rng_state()
    torch.manual_seed(9)
    assert same(build_vgg16("none", seed=3), first)
    assert not same(build_vgg16("none", seed=4), first)
    torch.set_rng_state(state)
    build_vgg16("none", seed=5)
    assert torch.equal(torch.get_rng_state(), state)


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


def test_torchvisions_file_gives_the_convolutions_and_no_top(module, tmp_path):
    torch.save(torchvision_state(module), tmp_path / "vgg16.pth")
    built = build_vgg16(str(tmp_path / "vgg16.pth"))
    assert same(built.features, module.features)
    assert not torch.equal(built.head.weight, module.head.weight)


@pytest.mark.parametrize("name", ["features.pt", "features.safetensors"])
def test_a_file_of_the_convolutions_alone_will_do(module, tmp_path, name):
    save = save_file if name.endswith(".safetensors") else torch.save
    save(module.features.state_dict(), tmp_path / name)
    assert same(build_vgg16(tmp_path / name).features, module.features)


def test_a_model_of_ours_is_taken_whole(module, tmp_path):
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    assert same(build_vgg16(tmp_path / "model.safetensors"), module)


def test_imagenet_weights_are_torchvisions(module, monkeypatch):
    state = torchvision_state(module)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    assert same(build_vgg16("imagenet").features, module.features)


def test_an_impossible_download_says_how_to_supply_a_file(monkeypatch):
    def refuse(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(ModelError, match=r"no route to host.*vgg16-397923af\.pth.*train\.weights"):
        build_vgg16("imagenet")


def test_missing_keys_are_named(module, tmp_path):
    state = torchvision_state(module)
    del state["features.28.bias"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(ModelError, match=r"(?s)cut\.pth.*Missing.*features\.28\.bias"):
        build_vgg16(tmp_path / "cut.pth")


def test_another_networks_keys_and_shapes_are_named(module, tmp_path):
    state = torchvision_state(module) | {"features.30.weight": torch.zeros(1)}
    state["features.0.weight"] = torch.zeros(64, 4, 3, 3)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"(?s)other\.pth.*features\.30\.weight.*\[64, 4, 3, 3\]"):
        build_vgg16(tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_damaged_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(ModelError, match=name):
        build_vgg16(tmp_path / name)


@pytest.mark.parametrize("name", ["absent.pth", "imagnet"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(ModelError, match=f"{name}: no such file"):
        build_vgg16(tmp_path / name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "weights.h5").touch()
    with pytest.raises(ModelError, match=r"weights\.h5.*\.safetensors, \.pth or \.pt"):
        build_vgg16(tmp_path / "weights.h5")


def test_something_else_in_a_pth_file_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ModelError, match=r"list\.pth: holds list"):
        build_vgg16(tmp_path / "list.pth")


def test_mixed_precision_follows_the_setting_or_else_the_cpu(monkeypatch):
    capabilities = {}
    monkeypatch.setattr(vgg16_module.torch.cpu, "get_capabilities", lambda: capabilities)
    assert use_mixed_precision("cpu", True)
    assert not use_mixed_precision("cpu", None)
    capabilities["avx512_bf16"] = True
    assert use_mixed_precision(torch.device("cpu"), None)
    assert not use_mixed_precision("cpu", False)
