"""A trained model on disk, and back."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from wsi_pipeline.config import Config
from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.baselines import CAMNet
from wsi_pipeline.models.card import ModelCard, read_card
from wsi_pipeline.models.checkpoint import load_model, save_model
from wsi_pipeline.models.patchnet import PatchNet
from wsi_pipeline.models.vgg16 import IMAGENET_MEAN, IMAGENET_STD, VGG16


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return VGG16().to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def card():
    return ModelCard(
        architecture="vgg16",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        patch_px=512,
        mpp=0.243,
        training={"best_epoch": 3, "validation_roc_auc": 0.97, "seed": 1},
    )


@pytest.fixture
def folder(module, card, tmp_path):
    save_model(tmp_path / "model", module, card)
    return tmp_path / "model"


def change_card(folder, **values):
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_model_comes_back_with_the_same_output_in_evaluation_mode(module, folder):
    loaded, _ = load_model(folder)
    assert not loaded.training
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded.to(memory_format=torch.channels_last)(images), module(images))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_the_card_comes_back(module, card, tmp_path):
    saved = save_model(tmp_path, module, card)
    _, loaded = load_model(tmp_path)
    assert loaded == saved == read_card(tmp_path)
    assert loaded.mean == IMAGENET_MEAN
    assert (loaded.patch_px, loaded.mpp) == (512, 0.243)
    assert loaded.training == {"best_epoch": 3, "validation_roc_auc": 0.97, "seed": 1}
    assert set(loaded.versions) == {"wsi_pipeline", "torch", "torchvision"}


def test_a_patchnet_comes_back_by_its_cards_arguments(card, tmp_path):
    arguments = {"patch_px": 17, "stride_px": 8, "channels": 1, "filters": 4, "padding": "valid"}
    module = PatchNet(**arguments)
    save_model(tmp_path, module, replace(card, architecture="patchnet", arguments=arguments))
    loaded, _ = load_model(tmp_path)
    images = torch.randn(2, 1, 40, 33)
    with torch.inference_mode():
        assert torch.equal(loaded(images), module(images))


def test_the_cam_network_comes_back(card, tmp_path):
    module = CAMNet().eval()
    save_model(tmp_path, module, replace(card, architecture="cam"))
    loaded, _ = load_model(tmp_path)
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(loaded(images), module(images))


def test_corrections_of_colour_come_back(module, card, tmp_path):
    save_model(tmp_path, module, replace(card, gamma=2.2, shades_of_gray=6.0))
    loaded = read_card(tmp_path)
    assert (loaded.gamma, loaded.shades_of_gray) == (2.2, 6.0)
    assert loaded.normalisation == {
        "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "gamma": 2.2, "shades_of_gray": 6.0,
    }  # fmt: skip


def test_a_card_from_before_these_corrections_has_none(card, folder):
    path = folder / "model.json"
    values = json.loads(path.read_text())
    del values["gamma"], values["shades_of_gray"]
    path.write_text(json.dumps(values))
    loaded = read_card(folder)
    assert loaded == replace(card, weights_sha256=loaded.weights_sha256)
    assert (loaded.gamma, loaded.shades_of_gray) == (None, None)


def test_saving_again_replaces_and_leaves_nothing_else(card, folder):
    other = VGG16()
    save_model(folder, other, card)
    loaded, _ = load_model(folder)
    assert torch.equal(loaded.head.weight, other.head.weight)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name):
        load_model(folder)


def test_truncated_weights_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors: not the weights"):
        load_model(folder)


def test_weights_of_another_save_are_refused(card, folder, tmp_path):
    save_model(tmp_path / "other", VGG16(), card)
    (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"not the weights that .*model\.json describes"):
        load_model(folder)


def test_without_a_card_it_is_said_how_to_get_one(tmp_path):
    with pytest.raises(ModelError, match=r"model\.json does not exist: run `wsi train` first"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"architecture": "vgg16"}'])
def test_a_damaged_card_is_refused(folder, text):
    (folder / "model.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.json: no readable model description"):
        load_model(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "vgg99"}, "'vgg99' is not one of vgg16"),
        ({"arguments": {"depth": 3}}, "depth"),
        ({"format_version": 2}, "format_version"),
        ({"patch_px": "wide"}, "patch_px"),
        ({"gamma": "bright"}, "gamma"),
        ({"colour": "red"}, "colour"),
        ({"std": [0.2, 0.0, 0.2]}, "std"),
    ],
)
def test_a_card_that_cannot_be_followed_is_refused(folder, values, message):
    change_card(folder, **values)
    with pytest.raises(ModelError, match=message):
        load_model(folder)


def test_weights_of_another_network_are_refused(card, tmp_path):
    save_model(tmp_path, torch.nn.Linear(2, 1), card)
    with pytest.raises(ModelError, match=r"(?s)cannot be loaded as vgg16.*head\.weight"):
        load_model(tmp_path)


def code_blocks(language):
    text = (Path(__file__).parents[2] / "docs/models.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_documented_card_is_one(tmp_path):
    [example] = code_blocks("json")
    (tmp_path / "model.json").write_text(example)
    found = read_card(tmp_path)
    assert (found.architecture, found.patch_px, found.mpp) == ("onnx", 256, 0.5)
    assert found.output.tumour_class == 1


def test_the_documented_settings_are_some():
    for example in code_blocks("yaml"):
        Config.model_validate({"out": "run", "catalog": {"csv": "a"}, **yaml.safe_load(example)})
