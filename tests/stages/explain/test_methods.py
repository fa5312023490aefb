"""Which methods fit which of our models, and PatchNet's heatmap as one of them."""

import pytest
import torch
from small_networks import SmallAverage, SmallVgg, seeded
from torch import nn

from wsi_pipeline.errors import ConfigError, ModelError
from wsi_pipeline.models.architectures import CLASSES, build_network
from wsi_pipeline.models.baselines import CAMNet, GradCAMNet
from wsi_pipeline.models.card import ModelCard, NetworkOutput
from wsi_pipeline.models.checkpoint import load_model, save_model
from wsi_pipeline.models.convert import export_model
from wsi_pipeline.models.patchnet import PatchNet
from wsi_pipeline.models.patchnet_heatmaps import global_heatmap
from wsi_pipeline.models.vgg16 import VGG16
from wsi_pipeline.stages.explain.checks import cascade_layers
from wsi_pipeline.stages.explain.methods import (
    ALL_METHODS,
    LACKS,
    choose_methods,
    unfit_by_name,
    unfit_by_trial,
    why_unfit,
)


def images(count=2, side=32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def small_patchnet():
    return PatchNet(9, 9, filters=3, layers=2)


def small(architecture):
    """A network of the form of ours."""
    network = {"patchnet": small_patchnet, "cam": SmallAverage}.get(architecture, SmallVgg)
    return seeded(network, dtype=torch.float32)


@pytest.mark.parametrize("architecture", ["vgg16", "cam", "patchnet"])
def test_every_method_that_fits_gives_one_finite_map_for_each_image(architecture):
    model = small(architecture)
    for name in choose_methods(None, architecture):
        maps = ALL_METHODS[name](model, images(), target=1)
        assert (maps.shape, maps.dtype) == ((2, 32, 32), torch.float32), name
        assert maps.isfinite().all(), name


@pytest.mark.parametrize("network", [VGG16, small_patchnet, CAMNet], ids=lambda n: n.__name__)
def test_what_is_called_unfit_for_our_models_is_and_nothing_else(network):
    """LIME and the like run any model; here those that look inside of it.

    At 32 px VGG16's last feature maps have one pixel, whose mean is its maximum: CAM would fit.
    """
    architecture = next(k for k, v in CLASSES.items() if isinstance(network(), v))
    model = seeded(network, dtype=torch.float32)
    for name in ("saliency", "deconvolution", "grad_cam", "cam", "clear", "attentive_response_map"):
        if why_unfit(name, architecture):
            with pytest.raises(ModelError):
                ALL_METHODS[name](model, images(1, 64))
        else:
            assert ALL_METHODS[name](model, images(1, 64)).shape == (1, 64, 64)


def test_what_is_called_unfit_for_vgg11_is():
    model = GradCAMNet().eval()
    assert ALL_METHODS["grad_cam"](model, images(1)).shape == (1, 32, 32)
    for name in ALL_METHODS.keys() - set(choose_methods(None, "vgg11")):
        with pytest.raises(ModelError):
            ALL_METHODS[name](model, images(1))


def test_every_method_is_told_in_words_and_every_architecture_known():
    assert all(method.legend.endswith(".") for method in ALL_METHODS.values())
    assert LACKS.keys() == CLASSES.keys()
    needed = {need for method in ALL_METHODS.values() for need in method.needs}
    assert {lack for lacks in LACKS.values() for lack in lacks} <= needed


@pytest.mark.parametrize(
    ("architecture", "unfit"),
    [
        ("vgg16", {"patchnet", "cam"}),
        ("cam", {"patchnet"}),
        ("vgg11", {"patchnet", "cam", "clear", "attentive_response_map"}),
        ("patchnet", {"grad_cam", "cam", "clear", "attentive_response_map"}),
    ],
)
def test_what_does_not_fit_is_left_out_by_default(architecture, unfit):
    assert set(choose_methods(None, architecture)) == ALL_METHODS.keys() - unfit


def test_fast_methods_come_first_and_the_slowest_are_there():
    chosen = choose_methods(None, "vgg16")
    assert chosen[0] == "saliency"
    assert chosen[-2:] == ("occlusion", "lime")
    assert not {"cam", "patchnet"} & set(chosen)
    assert choose_methods(None, "patchnet")[0] == "patchnet"
    assert choose_methods(["lime", "saliency", "lime"], "cam") == ("lime", "saliency")


@pytest.mark.parametrize(
    ("names", "architecture", "error", "message"),
    [
        (["salience"], "vgg16", ConfigError, "'salience' is not known; there are patchnet, sal"),
        ([], "vgg16", ConfigError, "no method of explanation is named"),
        (["cam"], "vgg16", ModelError, "cam is not for a model 'vgg16'.*global average pooling"),
        (["grad_cam"], "patchnet", ModelError, "grad_cam is not for a model 'patchnet'"),
        (["patchnet"], "vgg16", ModelError, "only a PatchNet has one"),
    ],
)
def test_a_method_that_cannot_be_is_refused(names, architecture, error, message):
    with pytest.raises(error, match=message):
        choose_methods(names, architecture)


def test_patchnets_method_is_its_heatmap():
    model = seeded(small_patchnet, dtype=torch.float32)
    found = ALL_METHODS["patchnet"](model, images(), seed=5, layer="none")
    with torch.no_grad():
        expected = torch.stack([global_heatmap(model.subnet, image) for image in images()])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ALL_METHODS["patchnet"](model, images(), target=0), 1 - expected)
    with pytest.raises(ModelError, match="Identity has no subnet"):
        ALL_METHODS["patchnet"](nn.Identity(), images())


@pytest.mark.parametrize("network", [VGG16, small_patchnet, CAMNet], ids=lambda n: n.__name__)
def test_trying_our_models_finds_what_their_names_say(network):
    architecture = next(k for k, v in CLASSES.items() if isinstance(network(), v))
    model = seeded(network, dtype=torch.float32)
    assert unfit_by_trial(model, 64).keys() == unfit_by_name(architecture).keys()


LAYERS_OF_VGG = {"clear", "attentive_response_map"}
RULES_OF_RELU = {"guided_backpropagation", "deconvolution", "unveiling"}


@pytest.mark.parametrize(
    ("architecture", "arguments", "unfit"),
    [
        ("timm:test_resnet", {"pooling": "average"}, LAYERS_OF_VGG),
        ("timm:test_resnet", {}, LAYERS_OF_VGG | {"cam"}),
        # GELU in place of ReLU; tokens in place of feature maps.
        (
            "timm:test_vit",
            {"dynamic_img_size": True},
            LAYERS_OF_VGG | RULES_OF_RELU | {"cam", "grad_cam"},
        ),
        ("own_networks:one_logit", {}, set()),
    ],
)
def test_methods_that_fit_other_networks_are_found_by_trying(architecture, arguments, unfit):
    if architecture.startswith("timm:"):
        pytest.importorskip("timm")
    model = build_network(architecture, arguments, NetworkOutput())
    found = unfit_by_trial(model.eval(), 64)
    assert found.keys() == unfit | {"patchnet"}
    assert not any("\n" in reason for reason in found.values())
    for name, reason in found.items():
        with pytest.raises(ModelError) as raised:
            choose_methods([name], "theirs", found)
        assert str(raised.value) == f"method {name} is not for a model 'theirs': {reason}"
    assert "lime" in choose_methods(None, "x", found)


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_archives_have_no_layers_and_onnx_no_gradients(kind, tmp_path):
    if kind == "onnx":
        for name in ("onnxscript", "onnxruntime"):
            pytest.importorskip(name)
    arguments = {"patch_px": 9, "stride_px": 9, "filters": 3, "layers": 2}
    card = ModelCard(
        architecture="patchnet", arguments=arguments, mean=(0.5,) * 3, std=(0.5,) * 3, patch_px=32,
        mpp=1.0,
    )  # fmt: skip
    save_model(tmp_path / "m", small_patchnet(), card)
    export_model(tmp_path / "m", tmp_path / kind, kind)
    model, _ = load_model(tmp_path / kind)
    unfit = unfit_by_trial(model, 32)
    fits = [name for name in ALL_METHODS if name not in unfit]
    gradients = ["saliency", "guided_backpropagation", "deconvolution", "smooth_grad", "unveiling"]
    assert fits == [*(gradients if kind == "pt2" else []), "occlusion", "lime"]
    assert cascade_layers(model) == []
    for name in fits:
        if name not in ("unveiling", "lime"):
            maps = ALL_METHODS[name](model, images(1))
            expected = ALL_METHODS[name](load_model(tmp_path / "m")[0], images(1))
            torch.testing.assert_close(maps, expected, atol=1e-5, rtol=1e-4)
