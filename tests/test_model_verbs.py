"""The verbs of `wsi model`, and what `wsi predict` refuses as a model."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from wsi_pipeline.cli import main
from wsi_pipeline.models.card import ModelCard, Thresholds, read_card
from wsi_pipeline.models.checkpoint import load_model, save_model
from wsi_pipeline.models.inference import predictor
from wsi_pipeline.models.start import start_model


def wsi(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "vgg16"
    card = ModelCard(
        architecture="vgg16", name="vgg16", mean=(0.5,) * 3, std=(0.25,) * 3, patch_px=48, mpp=0.5,
        thresholds=Thresholds(slide=0.9), training={"slides": {"train": ["a", "b"]}},
    )  # fmt: skip
    save_model(folder, start_model("vgg16", "none", seed=1), card)
    (folder / "state.pt").write_bytes(b"of a training")
    return folder


def test_a_card_is_shown_in_words(model):
    done = wsi("model", "show", model)
    assert done.exit_code == 0
    for text in ("vgg16", "48 x 48 px", "0.5 um per px", "probability >= 0.9", "2: a, b"):
        assert text in done.output


def test_a_copy_holds_the_card_and_the_weights_and_nothing_else(model, tmp_path):
    assert wsi("model", "copy", model, tmp_path / "sent").exit_code == 0
    assert {path.name for path in (tmp_path / "sent").iterdir()} == {
        "model.json", "model.safetensors",
    }  # fmt: skip
    assert load_model(tmp_path / "sent")[1] == read_card(model)


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_an_exported_model_gives_the_same_probabilities_and_can_be_imported_again(
    model, tmp_path, kind
):
    pytest.importorskip("onnxscript" if kind == "onnx" else "torch")
    exported, imported = tmp_path / "exported", tmp_path / "imported"
    done = wsi("model", "export", model, exported, "--format", kind)
    assert done.exit_code == 0, done.output
    done = wsi(
        "model", "import", exported / f"model.{kind}", imported, "--mpp", 0.5,
        "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    patches = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3), np.uint8)
    found = []
    for folder in (model, exported, imported):
        module, card = load_model(folder)
        options = {"device": "cpu", "precision": "float32"}
        found.append(predictor(module, **card.normalisation, **options)(patches))
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    np.testing.assert_allclose(found[2], found[0], atol=1e-5)
    assert read_card(exported).thresholds.slide == 0.9


def test_weights_of_a_named_network_are_imported(model, tmp_path):
    done = wsi(
        "model", "import", model / "model.safetensors", tmp_path / "own", "--mpp", 0.25,
        "--architecture", "vgg16", "--patch-px", 64, "--name", "mine",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    card = read_card(tmp_path / "own")
    assert (card.name, card.mpp, card.patch_px, card.architecture) == ("mine", 0.25, 64, "vgg16")


@pytest.mark.parametrize(
    ("verb", "given", "message"),
    [
        ("predict", "none", "does not exist. A model is a folder"),
        ("predict", "empty", "is not a model folder: it has no model.json"),
        ("predict", "weights.pt", "is a pickle. Loading a pickle can run code"),
        ("predict", "script.pt", "is a TorchScript file"),
        ("show", "empty", "is not a model folder"),
        ("predict", "coarse", "It is the um per px of the patches that the model was trained on"),
    ],
)
def test_what_is_no_model_is_refused_in_a_line(model, tmp_path, verb, given, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "coarse").mkdir()
    card = (model / "model.json").read_text().replace('  "mpp": 0.5,\n', "")
    (tmp_path / "coarse" / "model.json").write_text(card)
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pt")
    if given == "script.pt":
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / given)
    arguments = {"predict": ("predict", tmp_path / given, tmp_path), "show": ("model", "show")}
    done = wsi(*arguments[verb], *([tmp_path / given] if verb == "show" else []))
    assert done.exit_code == 2 and message in done.output.replace("\n", " ")
    assert "Traceback" not in done.output
