"""Networks by name: timm's with the lecture's head, and anybody's functions."""

import pytest
import torch
from own_networks import Colours

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.architectures import build_network, plan_network
from wsi_pipeline.models.card import ModelCard, NetworkOutput
from wsi_pipeline.models.checkpoint import load_model, save_model
from wsi_pipeline.models.vgg16 import IMAGENET_MEAN

PX = 64


def images(count=3, side=PX):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def saved(folder, architecture, **options):
    """A model of random weights in a folder, and the network that was saved."""
    plan = plan_network(architecture, patch_px=PX, **options)
    network = build_network(plan.architecture, plan.arguments, plan.output).eval()
    card = ModelCard(
        architecture=plan.architecture, arguments=plan.arguments, output=plan.output,
        mean=plan.mean, std=plan.std, patch_px=PX, mpp=0.5,
    )  # fmt: skip
    save_model(folder, network, card)
    return network


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("timm:test_resnet", {}),
        ("timm:test_vit", {"arguments": {"pooling": "average"}}),
        ("timm:test_mambaout", {}),
        ("timm:test_vit_relpos", {}),
        ("own_networks:flat_logit", {}),
        ("own_networks:classes", {"arguments": {"count": 4}, "tumour_class": 2}),
        ("own_networks:tied", {}),
    ],
)
@torch.no_grad()
def test_a_network_comes_back_from_its_card(tmp_path, architecture, options):
    if architecture.startswith("timm:"):
        pytest.importorskip("timm")
    network = saved(tmp_path / "m", architecture, **options)
    loaded, _ = load_model(tmp_path / "m")
    assert not loaded.training
    found = loaded(images())
    assert found.shape == (3,)
    assert torch.equal(found, network(images()))


@torch.no_grad()
def test_the_head_of_feature_maps_takes_their_maximum_or_mean():
    pytest.importorskip("timm")
    for pooling, pooled in (("max", torch.amax), ("average", torch.mean)):
        network = build_network("timm:test_resnet", {"pooling": pooling}).eval()
        maps = network.features(images())
        assert maps.shape == (3, 96, 2, 2)
        expected = pooled(maps, dim=(2, 3)) @ network.head.weight[0] + network.head.bias
        torch.testing.assert_close(network(images()), expected)


@torch.no_grad()
def test_the_head_of_tokens_passes_over_the_class_token_and_that_of_channels_last_over_nothing():
    pytest.importorskip("timm")
    network = build_network("timm:test_vit", {"dynamic_img_size": True}).eval()
    tokens = network.features(images())
    assert tokens.shape == (3, 1 + 16, 64)  # a class token, 4 x 4 patches of 16 px
    expected = tokens[:, 1:].amax(1) @ network.head.weight[0] + network.head.bias
    torch.testing.assert_close(network(images()), expected)
    network = build_network("timm:test_mambaout", {}).eval()
    maps = network.features(images())
    assert maps.shape == (3, 2, 2, 256)
    expected = maps.amax((1, 2)) @ network.head.weight[0] + network.head.bias
    torch.testing.assert_close(network(images()), expected)


def test_a_transformer_is_made_for_the_size_of_the_patches():
    pytest.importorskip("timm")
    for name, argument in (
        ("test_vit", {"dynamic_img_size": True}),
        ("test_vit_relpos", {"img_size": PX}),
    ):
        assert plan_network(f"timm:{name}", patch_px=PX).arguments == argument
    own = plan_network("timm:test_vit", patch_px=PX, arguments={"img_size": PX})
    assert own.arguments == {"img_size": PX}


def test_normalisation_is_timms_or_imagenets():
    pytest.importorskip("timm")
    assert plan_network("timm:test_resnet", patch_px=PX).mean == (0.5, 0.5, 0.5)
    assert plan_network("own_networks:one_logit", patch_px=PX).mean == IMAGENET_MEAN


def test_the_names_of_weights_are_the_functions_own():
    network = build_network("own_networks:classes", {"count": 2}, NetworkOutput(tumour_class=1))
    assert network.state_dict().keys() == Colours(2).state_dict().keys()


@pytest.mark.parametrize(
    ("architecture", "arguments", "message"),
    [
        (
            "no_such_module:net",
            {},
            "no_such_module:net cannot be imported: No module named.*PYTHON",
        ),
        ("own_networks:absent", {}, "own_networks:absent cannot be imported.*absent"),
        ("own_networks:fails", {}, "own_networks:fails fails when it is called: no licence found$"),
        ("own_networks:classes", {}, "fails when it is called.*count"),
        ("own_networks:no_module", {}, r"returns a dict, not a torch\.nn\.Module"),
        ("own_networks:feature_maps", {}, r"shape \(2, 4, 62, 62\) for 2 patches of 64 x 64 px"),
        ("own_networks:classes", {"count": 3}, r"shape \(2, 3\).*Say which column is tumour"),
        ("own_networks:not_a_number", {}, "not all finite"),
        ("own_networks:large_images_only", {}, "cannot be run on 2 patches of 64 x 64 px: "),
        ("vgg16", {"depth": 3}, "vgg16 cannot be built.*depth"),
        ("onnx", {}, "only opened"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_in_a_line(architecture, arguments, message):
    with pytest.raises(ModelError, match=message) as raised:
        plan = plan_network(architecture, patch_px=PX, arguments=arguments)
        build_network(plan.architecture, plan.arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("test_resnt", {}, "timm does not know a network 'test_resnt'. Did you mean test_resnet"),
        ("qqqqqqq", {}, r"does not know a network 'qqqqqqq'. See timm\.list_models"),
        ("crossvit_9_240", {}, "timm cannot make crossvit_9_240: Only token or avg pooling"),
        ("test_resnet", {"depth": 3}, "timm cannot make test_resnet.*depth"),
        ("test_resnet", {"num_classes": 3}, "num_classes.*cannot be set"),
        ("test_resnet", {"pooling": "sum"}, "pooling is 'sum'"),
        ("vit_tiny_patch16_224", {"patch_size": 48}, r"64 x 64 px: .*divisible by patch size \(48"),
    ],
)
def test_a_network_that_timm_cannot_make_is_refused_in_a_line(name, arguments, message):
    pytest.importorskip("timm")
    with pytest.raises(ModelError, match=message) as raised:
        plan_network(f"timm:{name}", patch_px=PX, arguments=arguments)
    assert "\n" not in str(raised.value)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ModelError, match=r'pip install "wsi_pipeline\[timm\]"'):
        plan_network("timm:test_resnet", patch_px=PX)


def test_a_hubs_network_is_known_by_its_architecture_afterwards(monkeypatch):
    timm = pytest.importorskip("timm")
    described = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    monkeypatch.setattr(
        timm.models,
        "load_model_config_from_hf",
        lambda name: (described, "test_vit", {"init_values": 1e-5}),
    )
    plan = plan_network("timm:hf-hub:somebody/pathology", patch_px=PX)
    assert plan.architecture == "timm:test_vit"
    assert plan.arguments == {"dynamic_img_size": True, "init_values": 1e-5}
    assert (plan.mean, plan.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_what_a_hub_says_of_the_size_of_images_does_not_count(monkeypatch):
    timm = pytest.importorskip("timm")
    described = {"mean": [0.5] * 3, "std": [0.5] * 3}
    of_hub = {"img_size": 160, "dynamic_img_size": False}
    monkeypatch.setattr(
        timm.models, "load_model_config_from_hf", lambda name: (described, "test_vit", of_hub)
    )
    plan = plan_network("timm:hf-hub:somebody/pathology", patch_px=PX)
    assert plan.arguments == {"img_size": 160, "dynamic_img_size": True}


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch):
    timm = pytest.importorskip("timm")

    def refuse(name):
        raise OSError("no route to host")

    monkeypatch.setattr(timm.models, "load_model_config_from_hf", refuse)
    with pytest.raises(ModelError, match="cannot make hf-hub:somebody/pathology: no route to host"):
        plan_network("timm:hf-hub:somebody/pathology", patch_px=PX)
