"""Networks in a file of their own format: what they take and give, and which files are refused."""

import io
import json
import os
import pickle
import zipfile
from contextlib import suppress

import pytest
import torch
from torch import nn

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.archive import open_archive
from wsi_pipeline.models.card import NetworkOutput

PX = 16
ANY_NUMBER = ({0: torch.export.Dim("batch")},)


class Small(nn.Module):
    """Mean colours to `outputs` values; a view, which a change of the memory format would break."""

    def __init__(self, outputs=1):
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, outputs)

    def forward(self, images):
        return self.head(self.conv(images).flatten(2).mean(2))


def images(count, side=PX):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def write(path, network, *, batch=None, sizes=True):
    """A network in a file; any number of patches unless a batch is given."""
    example = (images(batch or 2),)
    shapes = None if batch else ANY_NUMBER
    if not sizes:
        shapes = ({0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")},)
    if path.suffix == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
        torch.onnx.export(
            network.eval(), example, str(path), dynamo=True, dynamic_shapes=shapes, verbose=False,
            external_data=False,
        )  # fmt: skip
    else:
        torch.export.save(torch.export.export(network.eval(), example, dynamic_shapes=shapes), path)
    return path


@pytest.fixture(scope="module", params=["pt2", "onnx"])
def kind(request):
    if request.param == "onnx":
        pytest.importorskip("onnxruntime")
    return request.param


@pytest.fixture(scope="module")
def flexible(kind, tmp_path_factory):
    return write(tmp_path_factory.mktemp(kind) / f"net.{kind}", Small())


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 5])
def test_it_gives_the_networks_values_for_any_number_of_patches(kind, flexible, count):
    archive = open_archive(flexible, kind, patch_px=PX, output=NetworkOutput())
    batch = images(count).to(memory_format=torch.channels_last)
    torch.testing.assert_close(archive(batch), Small()(images(count))[:, 0])
    assert not archive.training and list(archive.parameters()) == []


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 4, 7])
def test_a_fixed_number_of_patches_is_cut_and_filled_up(kind, tmp_path, count):
    path = write(tmp_path / f"net.{kind}", Small(3), batch=4)
    archive = open_archive(path, kind, output=NetworkOutput(tumour_class=2))
    expected = Small(3)(images(count)).softmax(1)[:, 2]
    torch.testing.assert_close(torch.sigmoid(archive(images(count))), expected)


def test_patches_of_another_size_are_refused_when_it_is_opened_and_when_it_runs(kind, flexible):
    message = rf"net\.{kind} takes patches of 16 x 16 px, the card says 32"
    with pytest.raises(ModelError, match=message):
        open_archive(flexible, kind, patch_px=32)
    archive = open_archive(flexible, kind, patch_px=PX)
    with pytest.raises(ModelError, match="takes patches of 16 x 16 px, but patches are 8 x 8 px"):
        archive(images(2, side=8))


@torch.no_grad()
def test_any_size_may_do(kind, tmp_path):
    archive = open_archive(write(tmp_path / f"n.{kind}", Small(), sizes=False), kind, patch_px=40)
    torch.testing.assert_close(archive(images(2, side=40)), Small()(images(2, side=40)))


def test_gradients_pass_through_a_pt2_and_are_refused_by_onnx(kind, flexible):
    archive = open_archive(flexible, kind, output=NetworkOutput())
    batch = images(2).requires_grad_()
    if kind == "onnx":
        with pytest.raises(ModelError, match="computes without gradients"):
            archive(batch)
        return
    archive(batch).sum().backward()
    expected = images(2).requires_grad_()
    Small()(expected).sum().backward()
    torch.testing.assert_close(batch.grad, expected.grad)


class Two(nn.Module):
    def forward(self, images):
        return images.mean((1, 2, 3)), images.amax((1, 2, 3))


class Grey(nn.Module):
    def forward(self, images):
        return images[:, 0].mean((1, 2))


def test_other_outputs_and_inputs_are_refused(kind, tmp_path):
    with pytest.raises(ModelError, match="returns 2 values: it must be one"):
        open_archive(write(tmp_path / f"two.{kind}", Two()), kind)
    path, grey = tmp_path / f"grey.{kind}", (torch.zeros(2, 1, PX, PX),)
    if kind == "onnx":
        torch.onnx.export(Grey().eval(), grey, str(path), dynamo=True, verbose=False)
    else:
        torch.export.save(torch.export.export(Grey(), grey), path)
    with pytest.raises(ModelError, match=r"shape \(2, 1, 16, 16\): it must be \(N, 3, H, W\)"):
        open_archive(path, kind)


def test_a_file_of_another_format_is_refused(kind, flexible, tmp_path):
    other = {"pt2": "onnx", "onnx": "pt2"}[kind]
    with pytest.raises(ModelError, match=f"not a file of the format {other}"):
        open_archive(flexible, other)
    (tmp_path / f"cut.{kind}").write_bytes(flexible.read_bytes()[:300])
    with pytest.raises(ModelError, match=rf"cut\.{kind}"):
        open_archive(tmp_path / f"cut.{kind}", kind)
    with pytest.raises(ModelError, match="cannot be read"):
        open_archive(tmp_path / f"absent.{kind}", kind)


def test_without_onnxruntime_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "net.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r'pip install "wsi_pipeline\[onnx\]"'):
        open_archive(tmp_path / "net.onnx", "onnx")


# Archives that would run code: each makes a folder when torch loads or runs it.


class MakesFolder:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def members(tmp_path):
    """The parts of a harmless archive, without the folder that all are in."""
    program = torch.export.export(Small(), (images(2),), dynamic_shapes=ANY_NUMBER)
    program.example_inputs = None
    torch.export.save(program, tmp_path / "good.pt2")
    with zipfile.ZipFile(tmp_path / "good.pt2") as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def rewritten(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(f"net/{name}", content)
    return path


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def edited(members, name, edit):
    values = json.loads(members[name])
    edit(values)
    return members | {name: json.dumps(values).encode()}


def nodes(values):
    return values["graph_module"]["graph"]["nodes"]


WEIGHTS = "data/weights/model_weights_config.json"


def pickled_weight(members, evil):
    def edit(values):
        values["config"]["conv.bias"] |= {"use_pickle": True, "path_name": "weight_9"}

    return edited(members, WEIGHTS, edit) | {"data/weights/weight_9": saved(evil)}


def old_weights(members, evil):
    return members | {"data/weights/model.pt": saved({"conv.bias": evil})}


def example_inputs(members, evil):
    return members | {"data/sample_inputs/model.pt": saved(((evil,), {}))}


def custom_object(members, evil):
    return members | {"data/constants/opaque_obj_0": pickle.dumps(evil)}


def compiled_code(members, evil):
    return members | {"data/aotinductor/model/net.so": b"\x7fELF"}


def operator(members, evil):
    def edit(values):
        nodes(values)[0] |= {
            "target": "torch.os.mkdir",
            "inputs": [{"name": "path", "arg": {"as_string": evil.path}, "kind": 1}],
        }

    return edited(members, "models/model.json", edit)


def expression(members, evil):
    def edit(values):
        text = json.dumps(values)
        assert "expr_str" in text
        evil_text = f"__import__('os').mkdir('{evil.path}')"
        for tensor in values["graph_module"]["graph"]["tensor_values"].values():
            for size in tensor["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = evil_text

    return edited(members, "models/model.json", edit)


def argument_name(members, evil):
    def edit(values):
        graph = values["graph_module"]["graph"]
        graph["inputs"][-1]["as_tensor"]["name"] = "x=__import__('os')"

    return edited(members, "models/model.json", edit)


def import_in_a_structure(members, evil):
    def edit(values):
        [call] = values["graph_module"]["module_call_graph"][:1]
        call["signature"]["in_spec"] = (
            '[1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]'
        )

    return edited(members, "models/model.json", edit)


ATTACKS = [
    pickled_weight, old_weights, example_inputs, custom_object, compiled_code, operator, expression,
    argument_name, import_in_a_structure,
]  # fmt: skip


def test_the_archive_that_the_attacks_start_from_is_opened(members, tmp_path):
    archive = open_archive(rewritten(tmp_path / "net.pt2", members), "pt2", patch_px=PX)
    torch.testing.assert_close(archive(images(2)), Small()(images(2)))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_an_archive_that_could_run_code_is_refused_and_does_not(members, tmp_path, attack):
    made = tmp_path / "made"
    path = rewritten(tmp_path / "net.pt2", attack(members, MakesFolder(made)))
    with pytest.raises(ModelError, match=r"net\.pt2 holds .*by which loading it could run code"):
        open_archive(path, "pt2")
    assert not made.exists()


@pytest.mark.parametrize(
    "attack", [pickled_weight, example_inputs, expression], ids=lambda a: a.__name__
)
def test_these_attacks_are_real_torch_alone_falls_for_them(members, tmp_path, attack):
    made = tmp_path / "made"
    path = rewritten(tmp_path / "net.pt2", attack(members, MakesFolder(made)))
    with suppress(Exception):  # after the harm, or elsewhere
        torch.export.load(path)
    assert made.exists()


def test_conditions_that_an_archive_states_as_python_are_not_run(members, tmp_path):
    made = tmp_path / "made"

    def edit(values):
        values["guards_code"] = [f"__import__('os').mkdir({str(made)!r}) is None"]

    path = rewritten(tmp_path / "net.pt2", edited(members, "models/model.json", edit))
    open_archive(path, "pt2")(images(2))
    assert not made.exists()


def test_two_parts_of_one_name_are_refused(members, tmp_path):
    path = rewritten(tmp_path / "net.pt2", members)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("net/MODELS/model.json", b"{}")
    with pytest.raises(ModelError, match="two parts of one name"):
        open_archive(path, "pt2")
