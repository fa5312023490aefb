"""The comparison of PatchNet with CAM and Grad-CAM, on images of two colours."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import shapely
import yaml
from PIL import Image

from wsi_pipeline.errors import CatalogError, ConfigError
from wsi_pipeline.geometry import Bounds, PatchGrid

ROOT = Path(__file__).parents[2]
workflow = SimpleNamespace(**runpy.run_path(str(ROOT / "workflows" / "patchnet_comparison.py")))
CONFIG = ROOT / "configs" / "patchnet_comparison.yaml"
SMALL = {"patch_px": 5, "stride_px": 5, "filters": 3, "layers": 2}


@pytest.fixture
def config(tmp_path):
    """One small PatchNet, images of 16 px."""
    values = yaml.safe_load(CONFIG.read_text())
    model = values["models"]["patchnet-21"] | {"name": "small", "patchnet": SMALL, "max_epochs": 2}
    values |= {
        "out": str(tmp_path / "out"),
        "images": {"side_px": 16, "train": 6, "validation": 4, "test": 4},
        "phantom": values["phantom"] | {"overlap": 4},
        "models": {"small": model | {"learning_rate": 0.01}},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    return workflow.load(tmp_path / "small.yaml")


def images(count, seed=0):
    """Pale images; those of class 1 have a dark left half, which is their mask."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    pixels = rng.integers(200, 255, (count, 16, 16, 3), np.uint8)
    masks = np.zeros((count, 16, 16), bool)
    masks[labels == 1, :, :8] = True
    pixels[masks] //= 4
    return workflow.Images(pixels, labels.astype(np.int8), masks)


def test_the_shipped_settings_are_valid_and_hold_the_five_models():
    config = workflow.load(CONFIG)
    models = {name: settings.model for name, settings in config.models.items()}
    assert models == {
        "patchnet-21": "patchnet",
        "patchnet-31": "patchnet",
        "patchnet-31-valid": "patchnet",
        "cam": "cam",
        "grad-cam": "vgg11",
    }
    for name, settings in config.models.items():
        assert settings.name == name
        assert (settings.optimizer, settings.learning_rate) == ("adam", 1e-4)


def test_bad_settings_name_the_file(tmp_path):
    values = yaml.safe_load(CONFIG.read_text()) | {"seed": -1}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"(?s)bad\.yaml.*seed"):
        workflow.load(tmp_path / "bad.yaml")


def test_every_model_is_trained_drawn_and_held_against_the_masks(config, one_thread):
    data = {"train": images(12), "validation": images(8, 1), "test": images(8, 2)}
    rows = workflow.compare("halves", data, config)
    assert rows["model"].tolist() == ["small"]
    assert rows["epochs"].tolist() == [2]
    history = pd.read_csv(config.out / "halves" / "small" / "history.csv")
    best = history.loc[history["validation_loss"].idxmin()]
    assert rows["best_epoch"].iloc[0] == best["epoch"]
    assert rows["validation_loss"].iloc[0] == pytest.approx(best["validation_loss"])
    found = pd.read_csv(config.out / "overlap.csv")
    assert found["model"].tolist() == ["small"]
    with Image.open(config.out / "heatmaps_halves.png") as picture:
        assert picture.size[1] > picture.size[0]  # six rows of three columns
    text = workflow.page(rows, config)
    assert f"{best['validation_accuracy']:.1%}" in text
    assert "exact match" in text


def test_a_training_is_taken_over_for_the_same_images_alone(config):
    same, data = ({"train": images(12), "validation": images(8, 1)} for _ in range(2))
    assert workflow._fingerprint(data) == workflow._fingerprint(same)
    for split, attribute in [("train", "labels"), ("validation", "pixels")]:
        other = {**data, split: images(len(data[split].labels))}
        getattr(other[split], attribute)[0] += 1
        assert workflow._fingerprint(other) != workflow._fingerprint(data)


def test_splits_of_tiles_share_none(config, tmp_path):
    for split in ("training", "test"):
        for label, name in enumerate(("H", "AC")):
            folder = tmp_path / "tiles" / split / name
            folder.mkdir(parents=True)
            for number in range(10):
                colour = (number, 100 * label, 200 if split == "test" else 0)
                Image.new("RGB", (20, 20), colour).save(folder / f"{number}.png")
    data = workflow.read_tiles(tmp_path / "tiles", config)
    assert {split: len(part.labels) for split, part in data.items()} == {
        "train": 12, "validation": 8, "test": 8,
    }  # fmt: skip
    seen = [tuple(image[0, 0]) for part in data.values() for image in part.pixels]
    assert len(set(seen)) == len(seen)
    for part in data.values():
        assert part.pixels.shape[1:] == (16, 16, 3)
        assert (part.pixels[:, 0, 0, 1] == 100 * part.labels).all()


def test_too_few_tiles_are_an_error(config, tmp_path):
    for name in ("H", "AC"):
        (tmp_path / "tiles" / "training" / name).mkdir(parents=True)
    with pytest.raises(CatalogError, match=r"training.H: 6 tiles are needed, 0 found"):
        workflow.read_tiles(tmp_path / "tiles", config)


def test_a_pixel_of_the_mask_is_tumour_when_more_than_half_of_it_is():
    grid = PatchGrid(Bounds(0, 0, 100, 100), 0.5, 2.0, patch_px=4, stride_px=4, inner_px=4)
    # Level-0 columns 10 to 13 of the patch at x 8: its columns 1 and 2; of row 3 only half.
    lesion = shapely.box(10, 20, 14, 27)
    mask = workflow._mask(SimpleNamespace(lesions=(lesion,)), 8, 20, grid)
    expected = np.zeros((4, 4), bool)
    expected[:3, 1:3] = True
    assert np.array_equal(mask, expected)
    assert not workflow._mask(None, 8, 20, grid).any()
