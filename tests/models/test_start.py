"""Where the weights come from that a training starts with."""

from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.start import start_model
from wsi_pipeline.models.vgg16 import VGG16


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


def test_random_weights_depend_on_the_seed_alone():
    first, state = start_model("vgg16", "none", seed=3), torch.get_rng_state()
    torch.manual_seed(9)
    assert same(start_model("vgg16", "none", seed=3), first)
    assert not same(start_model("vgg16", "none", seed=4), first)
    torch.set_rng_state(state)
    start_model("vgg16", "none", seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_torchvisions_file_gives_the_convolutions_and_no_top(module, tmp_path):
    torch.save(torchvision_state(module), tmp_path / "vgg16.pth")
    built = start_model("vgg16", str(tmp_path / "vgg16.pth"))
    assert same(built.features, module.features)
    assert not torch.equal(built.head.weight, module.head.weight)


@pytest.mark.parametrize("name", ["features.pt", "features.safetensors"])
def test_a_file_of_the_convolutions_alone_will_do(module, tmp_path, name):
    save = save_file if name.endswith(".safetensors") else torch.save
    save(module.features.state_dict(), tmp_path / name)
    assert same(start_model("vgg16", tmp_path / name).features, module.features)


def test_a_model_of_ours_is_taken_whole(module, tmp_path):
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    assert same(start_model("vgg16", tmp_path / "model.safetensors"), module)


def test_imagenet_weights_are_torchvisions(module, monkeypatch):
    state = torchvision_state(module)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    assert same(start_model("vgg16", "imagenet").features, module.features)


def test_an_impossible_download_says_how_to_supply_a_file(monkeypatch):
    def refuse(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(ModelError, match=r"no route to host.*vgg16-397923af\.pth.*train\.weights"):
        start_model("vgg16", "imagenet")


def test_missing_keys_are_named(module, tmp_path):
    state = torchvision_state(module)
    del state["features.28.bias"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(ModelError, match=r"(?s)cut\.pth.*Missing.*features\.28\.bias"):
        start_model("vgg16", tmp_path / "cut.pth")


def test_another_networks_keys_and_shapes_are_named(module, tmp_path):
    state = torchvision_state(module) | {"features.30.weight": torch.zeros(1)}
    state["features.0.weight"] = torch.zeros(64, 4, 3, 3)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"(?s)other\.pth.*features\.30\.weight.*\[64, 4, 3, 3\]"):
        start_model("vgg16", tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_damaged_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(ModelError, match=name):
        start_model("vgg16", tmp_path / name)


@pytest.mark.parametrize("name", ["absent.pth", "imagnet"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(ModelError, match=f"{name}: no such file"):
        start_model("vgg16", tmp_path / name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "weights.h5").touch()
    with pytest.raises(ModelError, match=r"weights\.h5.*\.safetensors, \.pth or \.pt"):
        start_model("vgg16", tmp_path / "weights.h5")


def test_something_else_in_a_pth_file_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ModelError, match=r"list\.pth: holds list"):
        start_model("vgg16", tmp_path / "list.pth")


PATCHNET = {"patch_px": 5, "stride_px": 5, "filters": 2, "layers": 2}


def test_other_architectures_start_from_the_seed_or_a_file_of_ours(tmp_path):
    first = start_model("patchnet", "none", arguments=PATCHNET, seed=3)
    assert same(start_model("patchnet", "none", arguments=PATCHNET, seed=3), first)
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    assert same(start_model("patchnet", path, arguments=PATCHNET, seed=4), first)


def test_a_file_of_another_architecture_is_refused(module, tmp_path):
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors: does not fit patchnet"):
        start_model("patchnet", tmp_path / "model.safetensors", arguments=PATCHNET)


def test_imagenet_weights_are_vgg16s_alone():
    with pytest.raises(ModelError, match=r"imagenet.*for patchnet it must be none or a file"):
        start_model("patchnet", "imagenet", arguments=PATCHNET)


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


RESNET = "timm:test_resnet"


@pytest.fixture
def timms_state(timm):
    """State dict of timm's whole network, with its classifier of 1000 classes."""
    torch.manual_seed(4)
    return timm.create_model("test_resnet").state_dict()


@pytest.mark.parametrize("name", ["resnet.safetensors", "pytorch_model.bin"])
def test_timms_file_gives_the_features_and_no_classifier(timms_state, tmp_path, name):
    save = save_file if name.endswith(".safetensors") else torch.save
    save(timms_state, tmp_path / name)
    built = start_model(RESNET, tmp_path / name, seed=2)
    found = built.features.state_dict()
    assert all(torch.equal(found[key], timms_state[key]) for key in found)
    assert "fc.weight" in timms_state and "fc.weight" not in found
    assert torch.equal(built.head.weight, start_model(RESNET, "none", seed=2).head.weight)


def test_a_file_of_a_training_holds_the_state_dict(timms_state, tmp_path):
    torch.save({"epoch": 3, "state_dict": timms_state}, tmp_path / "checkpoint.pth")
    built = start_model(RESNET, tmp_path / "checkpoint.pth")
    assert torch.equal(built.features.state_dict()["layer1.0.conv1.weight"],
                       timms_state["layer1.0.conv1.weight"])  # fmt: skip


def test_a_transformers_file_is_taken_whatever_the_patches_size(timm, tmp_path):
    state = timm.create_model("test_vit").state_dict()
    save_file(state, tmp_path / "vit.safetensors")
    arguments = {"dynamic_img_size": True}
    built = start_model("timm:test_vit", tmp_path / "vit.safetensors", arguments=arguments)
    assert torch.equal(built.features.pos_embed, state["pos_embed"])
    with torch.no_grad():
        assert built(torch.zeros(1, 3, 64, 64)).shape == (1,)


def test_a_model_of_ours_is_taken_whole_for_timm_too(timm, tmp_path):
    first = start_model(RESNET, "none", seed=3)
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    assert same(start_model(RESNET, tmp_path / "model.safetensors"), first)


def test_a_file_of_another_network_names_what_is_missing(timm, tmp_path):
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    message = r"vit\.safetensors: does not fit timm:test_resnet: its weights are not those of the"
    with pytest.raises(ModelError, match=message + r".*\d+ are missing \(bn1\..*are unknown"):
        start_model(RESNET, tmp_path / "vit.safetensors")


def test_pretrained_weights_are_timms(timm, timms_state, monkeypatch):
    create = timm.create_model

    def downloaded(name, pretrained=False, **arguments):
        network = create(name, **arguments)
        if pretrained:
            network.load_state_dict(timms_state, strict=False)
        return network

    monkeypatch.setattr(timm, "create_model", downloaded)
    built = start_model(RESNET, "pretrained", arguments={"pooling": "average"}, seed=2)
    found = built.features.state_dict()
    assert all(torch.equal(found[key], timms_state[key]) for key in found)
    assert torch.equal(built.head.weight, start_model(RESNET, "none", seed=2).head.weight)


def test_an_impossible_download_of_timms_says_which_file_to_put_where(timm, monkeypatch):
    create = timm.create_model

    def refuse(name, pretrained=False, **arguments):
        if pretrained:
            raise OSError("no route to host\nretry later")
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", refuse)
    message = r"no route to host\). On a machine.*huggingface\.co/timm/test_resnet.*train\.weights"
    with pytest.raises(ModelError, match=message) as raised:
        start_model(RESNET, "pretrained")
    assert "\n" not in str(raised.value)


def test_pretrained_weights_are_for_networks_of_timm():
    with pytest.raises(ModelError, match=r"train\.weights is pretrained.*timm:NAME.*cam"):
        start_model("cam", "pretrained")


@pytest.mark.parametrize("architecture", ["vgg16", "cam", "own_networks:one_logit"])
def test_all_but_the_head_is_frozen(architecture):
    module = start_model(architecture, "none", freeze=True)
    trained = {name for name, of in module.named_parameters() if of.requires_grad}
    assert trained == {"head.weight", "head.bias"}


@pytest.mark.parametrize("architecture", ["vgg11", "own_networks:headless"])
def test_a_network_without_a_head_cannot_be_frozen(architecture):
    with pytest.raises(ModelError, match=f"train.freeze: {architecture} has no module named head"):
        start_model(architecture, "none", freeze=True)
