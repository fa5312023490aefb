"""Networks of timm and of the user's own, and archives, through the stages."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from command_line import wsi

from wsi_pipeline.config import CatalogConfig, Config, HeatmapConfig, TileConfig, TrainConfig
from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.card import NetworkOutput, read_card
from wsi_pipeline.models.checkpoint import copy_model, load_model
from wsi_pipeline.models.convert import export_model
from wsi_pipeline.models.start import start_model
from wsi_pipeline.stages import check, fine, heatmap, tile, train
from wsi_pipeline.stages.run_directory import model_folder

PX = 32
TRAINING = {
    "weights": "none", "epoch_examples": 32, "validation_examples": 32, "max_epochs": 2,
    "batch_size": 8, "learning_rate": 1e-3, "precision": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, client) -> Path:
    """A run directory of six small phantom slides, tiled."""
    folder = tmp_path_factory.mktemp("own")
    wsi("phantom", folder / "cohort", "--slides", 6, "--size", "1000x1000", "--mpp", 1)
    (folder / "run").mkdir()
    assert tile.run(settings(folder / "run"), client).failed == 0
    return folder / "run"


def settings(run: Path, **training) -> Config:
    return Config(
        out=run,
        catalog=CatalogConfig(
            csv=run.parent / "cohort/slides.csv",
            split={"train": 0.4, "validation": 0.3, "test": 0.3},
        ),
        tile=TileConfig(level=None, mpp=2.0, patch_px=PX, stride_px=32, inner_px=32),
        train=TrainConfig(**(TRAINING | training)),
        heatmap=HeatmapConfig(precision="float32", splits=("test",)),
    )


def trained(run, client, **training) -> Path:
    config = settings(run, **training)
    outcome = train.run(config, client)
    assert outcome.failed == 0
    return model_folder(run, config.train.name)


def heatmaps(run, client, name, **options) -> np.ndarray:
    config = settings(run, name=name)
    config = config.model_copy(update={"heatmap": config.heatmap.model_copy(update=options)})
    assert heatmap.run(config, client).failed == 0
    stores = sorted((run / "heatmaps" / name).glob("[!.]*.zarr"))
    values = [zarr.open_group(store, mode="r")["0"][:].ravel() for store in stores]
    found = np.concatenate(values)
    return found[np.isfinite(found)]


RESNET = {"model": "timm:test_resnet", "pooling": "average"}


@pytest.fixture(scope="module")
def resnet(run, client) -> Path:
    pytest.importorskip("timm")
    return trained(run, client, name="resnet", **RESNET)


def test_a_network_of_timm_is_trained_and_its_card_says_how_to_build_it(resnet):
    card = read_card(resnet)
    assert card.architecture == "timm:test_resnet"
    assert card.arguments == {"pooling": "average"}
    assert card.mean == (0.5, 0.5, 0.5)  # timm's of this network, not ImageNet's
    assert "timm" in card.versions
    module, _ = load_model(resnet)
    start = start_model("timm:test_resnet", "none", arguments=card.arguments)
    changed = [
        name
        for name, value in start.state_dict().items()
        if not torch.equal(value, module.state_dict()[name])
    ]
    assert {"features.conv1.0.weight", "head.weight", "features.bn1.running_mean"} <= set(changed)


def test_its_heatmaps_are_in_0_to_1(resnet, run, client):
    values = heatmaps(run, client, "resnet")
    assert len(values) > 10 and np.ptp(values) > 0
    assert values.min() >= 0 and values.max() <= 1


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_an_archive_gives_the_same_heatmaps_to_1e_5(resnet, run, client, kind):
    if kind == "onnx":
        for name in ("onnxscript", "onnxruntime"):
            pytest.importorskip(name)
    export_model(resnet, model_folder(run, kind), kind)
    expected = heatmaps(run, client, "resnet")
    found = heatmaps(run, client, kind, precision=None)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert not (run / "precision.json").exists()


def test_an_archive_in_bfloat16_is_refused(resnet, run, client):
    export_model(resnet, model_folder(run, "refused"), "pt2")
    with pytest.raises(ModelError, match=r"heatmap\.precision is bfloat16, but the model resnet"):
        heatmaps(run, client, "refused", precision="bfloat16")


def test_fine_heatmaps_of_other_networks_are_refused_by_name(resnet, run, client):
    with pytest.raises(ModelError, match="'timm:test_resnet': fine heatmaps need"):
        fine.run(settings(run, name="resnet"), client)


def test_a_frozen_encoder_keeps_its_weights_and_statistics_to_the_bit(resnet, run, client):
    weights = str(resnet / "model.safetensors")
    frozen = trained(run, client, name="frozen", freeze=True, **RESNET | {"weights": weights})
    before, after = (load_model(folder)[0].state_dict() for folder in (resnet, frozen))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    assert "features.bn1.running_mean" in before


@pytest.fixture(scope="module")
def own(run, client) -> Path:
    return trained(
        run, client, name="own", model="own_networks:classes", arguments={"count": 3},
        tumour_class=2, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7),
    )  # fmt: skip


def test_a_function_with_classes_is_trained_on_the_tumours_softmax(own, run, client):
    card = read_card(own)
    assert card.output == NetworkOutput(tumour_class=2)
    assert (card.mean, card.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert card.arguments == {"count": 3}
    values = heatmaps(run, client, "own")
    assert np.ptp(values) > 0


def test_a_second_training_does_nothing_again(resnet, run, client):
    outcome = train.run(settings(run, name="resnet", **RESNET), client)
    assert (outcome.done, outcome.skipped) == (0, 1)


REFUSED = [
    ({"model": "timm:test_resnt"}, "Did you mean test_resnet"),
    ({"model": "timm:vit_tiny_patch16_224", "arguments": {"patch_size": 24}}, "divisible by patch"),
    ({"model": "no_such_module:net"}, "no_such_module:net cannot be imported"),
    ({"model": "own_networks:fails"}, "no licence found"),
    ({"model": "own_networks:no_module"}, "returns a dict"),
    ({"model": "own_networks:feature_maps"}, r"shape \(2, 4, 30, 30\)"),
    ({"model": "own_networks:classes", "arguments": {"count": 3}}, "Say which column is tumour"),
    ({"model": "own_networks:headless", "freeze": True}, "train.freeze: own_networks:headless has"),
    ({"model": "vgg11", "freeze": True}, "train.freeze: vgg11 has no module named head"),
]


@pytest.mark.parametrize(("training", "message"), REFUSED)
def test_what_cannot_be_trained_is_refused_before_training_starts(run, client, training, message):
    if training["model"].startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(ModelError, match=message):
        train.run(settings(run, name="refused_training", **training), client)
    assert not model_folder(run, "refused_training").exists()


def test_the_check_finds_a_network_that_cannot_be_built(run, client):
    check.run(settings(run, name="checked", model="own_networks:fails"), client)
    [found] = [of for of in check.read_findings(run) if "own_networks" in of.what]
    assert found.refuses and found.kind == "settings"


@pytest.mark.slow
def test_a_function_that_only_the_environment_has_works_in_other_processes(
    own, run, tmp_path, monkeypatch
):
    tests = str(Path(__file__).parents[1])
    slides = [json.loads((own / "model.json").read_text())["training"]["slides"]["train"][0]]
    slide = run.parent / "cohort/slides" / f"{slides[0]}.tif"
    copy_model(own, tmp_path / "sent")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]))
    arguments = ["predict", tmp_path / "sent", slide, "--precision", "float32", "--workers", 1]
    wsi(*arguments, "--out", tmp_path / "out")
    [store] = (tmp_path / "out/heatmaps/own").glob("[!.]*.zarr")
    assert np.isfinite(zarr.open_group(store, mode="r")["0"][:]).sum() > 10
