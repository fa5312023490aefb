"""What a path holds that should be a model, and what is refused."""

import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.card import ModelCard, read_card
from wsi_pipeline.models.checkpoint import copy_model, load_model, save_model
from wsi_pipeline.models.model_folder import file_kind, find_model
from wsi_pipeline.models.vgg16 import VGG16


def network():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 1, 3), torch.nn.Flatten())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of each kind, by a name that tells nothing."""
    folder = tmp_path_factory.mktemp("files")
    module = network()
    save_file(module.state_dict(), folder / "safetensors")
    torch.save(module.state_dict(), folder / "state")
    torch.save(module, folder / "whole")
    torch.save(module.state_dict(), folder / "legacy", _use_new_zipfile_serialization=False)
    (folder / "protocol_0").write_bytes(pickle.dumps({"weights": [1.5]}, protocol=0))
    torch.jit.trace(module, torch.zeros(1, 3, 8, 8)).save(folder / "torchscript")
    program = torch.export.export(module, (torch.zeros(1, 3, 8, 8),))
    with (folder / "pt2").open("wb") as out:
        torch.export.save(program, out)
    (folder / "net.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    (folder / "text").write_text("hello")
    (folder / "empty").touch()
    with zipfile.ZipFile(folder / "zip", "w") as archive:
        archive.writestr("a.txt", "a")
    return folder


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("safetensors", "safetensors"),
        ("state", "pickle"),
        ("whole", "pickle"),
        ("legacy", "pickle"),
        ("protocol_0", "pickle"),
        ("torchscript", "torchscript"),
        ("pt2", "pt2"),
        ("net.onnx", "onnx"),
        ("text", "other"),
        ("empty", "other"),
        ("zip", "other"),
    ],
)
def test_files_are_known_by_their_content(files, name, kind):
    assert file_kind(files / name) == kind


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "absent does not exist. A model is a folder with model.json and its weights"),
        ("", "is not a model folder: it has no model.json. `wsi train` writes"),
        ("whole", "whole is a pickle. Loading a pickle can run code.*safetensors.*model import"),
        ("torchscript", r"is a TorchScript file.*torch\.export\.save \(\.pt2\)"),
        (
            "pt2",
            "pt2 is a file of the format pt2 without a card. `wsi model import FILE FOLDER` makes",
        ),
        ("net.onnx", "is a file of the format onnx without a card. `wsi model import"),
        ("safetensors", "is a file of the format safetensors without a card"),
        ("text", "text is a file. A model is a folder"),
    ],
)
def test_what_is_no_model_folder_is_refused_in_a_line(files, name, message):
    with pytest.raises(ModelError, match=message) as raised:
        find_model(files / name)
    assert "\n" not in str(raised.value)


@pytest.fixture
def folder(tmp_path):
    card = ModelCard(
        architecture="vgg16", mean=(0.5,) * 3, std=(0.25,) * 3, patch_px=32, mpp=0.5, name="net"
    )
    save_model(tmp_path / "runs/one/models/net", VGG16(), card)
    return tmp_path / "runs/one/models/net"


def test_a_model_folder_is_found_and_what_lies_beside_it_is_told(folder):
    assert find_model(folder) == folder
    for name in ("model.safetensors", "model.json"):
        with pytest.raises(ModelError, match=f"Give its folder, {folder}"):
            find_model(folder / name)
    with pytest.raises(ModelError, match=f"is a run directory.*{folder}"):
        find_model(folder.parents[1])


def test_a_card_without_resolution_says_how_to_add_it(folder):
    path = folder / "model.json"
    path.write_text(path.read_text().replace('"mpp": 0.5,', ""))
    with pytest.raises(ModelError, match=r'mpp: it is missing.*um per px.*as in "mpp": 0\.5'):
        read_card(folder)


def test_a_pickle_under_the_weights_name_is_not_loaded(folder):
    torch.save(VGG16(), folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors is a pickle"):
        load_model(folder)


def test_a_copy_has_the_weights_and_the_card_alone(folder, tmp_path):
    for extra in ("state.pt", "history.csv", "best/3/model.safetensors"):
        (folder / extra).parent.mkdir(parents=True, exist_ok=True)
        (folder / extra).write_text("x")
    copy_model(folder, tmp_path / "copy")
    names = sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert names == ["model.json", "model.safetensors"]
    assert load_model(tmp_path / "copy")[1] == read_card(folder)
