"""Models for other programs and of their files: export, import, and equal probabilities."""

import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from own_networks import Colours
from safetensors.torch import save_file

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.card import ModelCard, NetworkOutput, Thresholds, read_card
from wsi_pipeline.models.checkpoint import copy_model, load_model, save_model
from wsi_pipeline.models.convert import export_model, import_model
from wsi_pipeline.models.inference import predictor
from wsi_pipeline.models.start import start_model

PX = 32


def card(architecture, **values):
    return ModelCard(
        architecture=architecture, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), patch_px=PX, mpp=0.5,
        **values,
    )  # fmt: skip


def saved(folder, architecture, arguments=None, output=None, **values):
    """A model of random weights whose probabilities differ from patch to patch."""
    network = start_model(architecture, "none", arguments=arguments, output=output, seed=1)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name == "head.weight":
                value.mul_(20)
    output = output or NetworkOutput()
    described = card(architecture, arguments=arguments or {}, output=output, **values)
    return save_model(folder, network, described)


def probabilities(folder, count=5):
    module, described = load_model(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (count, PX, PX, 3), np.uint8)
    predict = predictor(module, **described.normalisation, device="cpu", precision="float32")
    return predict(pixels)


@pytest.fixture(params=["pt2", "onnx"])
def kind(request):
    if request.param == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)
    return request.param


def test_an_exported_vgg16_gives_the_same_probabilities_to_1e_5(tmp_path, kind):
    saved(tmp_path / "vgg16", "vgg16")
    export_model(tmp_path / "vgg16", tmp_path / "out", kind)
    expected = probabilities(tmp_path / "vgg16")
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(probabilities(tmp_path / "out"), expected, atol=1e-5, rtol=0)


PATCHNET = {"patch_px": 9, "stride_px": 9, "filters": 3, "layers": 2}


@pytest.mark.parametrize(
    ("architecture", "arguments", "output"),
    [
        ("patchnet", PATCHNET, None),
        ("timm:test_vit", {"dynamic_img_size": True}, None),
        ("own_networks:classes", {"count": 3}, NetworkOutput(tumour_class=2)),
    ],
)
def test_other_networks_are_exported_alike(tmp_path, kind, architecture, arguments, output):
    if architecture.startswith("timm:"):
        pytest.importorskip("timm")
    saved(tmp_path / "model", architecture, arguments, output)
    export_model(tmp_path / "model", tmp_path / "out", kind)
    expected = probabilities(tmp_path / "model")
    np.testing.assert_allclose(probabilities(tmp_path / "out"), expected, atol=1e-5, rtol=0)


def test_the_card_keeps_what_is_not_the_networks(tmp_path, kind):
    before = saved(
        tmp_path / "m", "patchnet", PATCHNET, name="net", gamma=2.2, tiling={"stride_px": 16},
        thresholds=Thresholds(slide=0.4, patch=0.6), training={"slides": {"train": ["a"]}},
    )  # fmt: skip
    after = export_model(tmp_path / "m", tmp_path / "out", kind)
    assert after == read_card(tmp_path / "out")
    assert after.weights_file == f"model.{kind}" and after.weights_sha256 != before.weights_sha256
    assert after.training["slides"] == {"train": ["a"]}
    assert after.training["exported_from"]["weights_sha256"] == before.weights_sha256
    same = replace(
        after, architecture="patchnet", arguments=PATCHNET, training=before.training,
        weights_sha256=before.weights_sha256,
    )  # fmt: skip
    assert same == before
    copy_model(tmp_path / "out", tmp_path / "copy")
    names = sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert names == sorted([f"model.{kind}", "model.json"])


def test_an_export_holds_no_pickle_and_no_path_of_this_machine(tmp_path):
    saved(tmp_path / "m", "patchnet", PATCHNET)
    export_model(tmp_path / "m", tmp_path / "out", "pt2")
    with zipfile.ZipFile(tmp_path / "out/model.pt2") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    assert not any(b".py" in content or b"\x80\x02" in content[:2] for content in parts.values())


def test_an_export_into_a_folder_that_holds_something_is_refused(tmp_path):
    saved(tmp_path / "m", "patchnet", PATCHNET)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(ModelError, match="out is there already, and not empty"):
        export_model(tmp_path / "m", tmp_path / "out", "pt2")
    assert [path.name for path in tmp_path.iterdir() if path.name != "m"] == ["out"]


def test_an_export_cannot_be_exported_and_formats_are_named(tmp_path):
    saved(tmp_path / "m", "patchnet", PATCHNET)
    export_model(tmp_path / "m", tmp_path / "pt2", "pt2")
    with pytest.raises(ModelError, match="is a model of the format pt2 already"):
        export_model(tmp_path / "pt2", tmp_path / "again", "pt2")
    with pytest.raises(ModelError, match="'tflite' is not one of pt2, onnx"):
        export_model(tmp_path / "m", tmp_path / "again", "tflite")


def test_an_archive_is_imported_at_the_size_that_it_has_fixed(tmp_path, kind):
    saved(tmp_path / "m", "patchnet", PATCHNET)
    export_model(tmp_path / "m", tmp_path / "out", kind)
    file = tmp_path / "out" / f"model.{kind}"
    found = import_model(
        file, tmp_path / "in", mpp=0.5, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), name="theirs"
    )
    assert (found.architecture, found.patch_px, found.name) == (kind, PX, "theirs")
    np.testing.assert_array_equal(probabilities(tmp_path / "in"), probabilities(tmp_path / "out"))
    with pytest.raises(ModelError, match=f"cannot be run on 2 patches of 64 x 64 px.*{PX} x {PX}"):
        import_model(file, tmp_path / "64", mpp=0.5, patch_px=64)
    assert not (tmp_path / "64").exists()


def test_weights_of_a_function_are_imported_as_the_function_names_them(tmp_path):
    network = Colours(2).eval()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    found = import_model(
        tmp_path / "w.safetensors", tmp_path / "in", architecture="own_networks:classes",
        arguments={"count": 2}, patch_px=PX, mpp=1.0,
    )  # fmt: skip
    assert found.output == NetworkOutput(tumour_class=1)
    module, _ = load_model(tmp_path / "in")
    images = torch.randn(3, 3, PX, PX)
    with torch.no_grad():
        expected = network(images).softmax(1)[:, 1]
        torch.testing.assert_close(torch.sigmoid(module(images)), expected)


def test_probabilities_are_imported_as_such(tmp_path):
    network = start_model("own_networks:probabilities", "none", arguments={"count": 2})
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    import_model(
        tmp_path / "w.safetensors", tmp_path / "in", architecture="own_networks:probabilities",
        output="probability", tumour_class=0, patch_px=PX, mpp=1.0,
    )  # fmt: skip
    module, _ = load_model(tmp_path / "in")
    images = torch.randn(3, 3, PX, PX)
    with torch.no_grad():
        torch.testing.assert_close(torch.sigmoid(module(images)), network.eval()(images)[:, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "holds weights alone. Say of which network"),
        ({"architecture": "onnx"}, "architecture 'onnx' is not one of vgg16"),
        ({"architecture": "own_networks:one_logit"}, "does not state the size of its patches"),
        ({"architecture": "own_networks:headless", "patch_px": PX}, "does not fit own_networks:he"),
        ({"architecture": "own_networks:no_module", "patch_px": PX}, "returns a dict"),
        (
            {"architecture": "own_networks:one_logit", "patch_px": PX, "output": "probability"},
            "They are no probabilities",
        ),
    ],
)
def test_weights_that_cannot_be_imported_are_refused(tmp_path, options, message):
    torch.manual_seed(3)
    state = Colours(1).state_dict()
    state["head.bias"] += 5
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=message):
        import_model(tmp_path / "w.safetensors", tmp_path / "in", mpp=1.0, **options)
    assert not (tmp_path / "in").exists()


def test_files_that_are_no_models_are_not_imported(tmp_path):
    torch.save(Colours(1), tmp_path / "whole.pt")
    (tmp_path / "text.onx").write_text("hello")
    for name, message in (
        ("whole.pt", "whole.pt is a pickle"),
        ("text.onx", "is none of .pt2"),
        ("absent", "no such file"),
    ):
        with pytest.raises(ModelError, match=message):
            import_model(tmp_path / name, tmp_path / "in", mpp=1.0)
