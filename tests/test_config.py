import re
from pathlib import Path

import pytest
import yaml

from wsi_pipeline.config import Config, commented_yaml, dump_config, load_config
from wsi_pipeline.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"


def write(tmp_path, **values):
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({"out": "run", "catalog": {"csv": "slides.csv"}, **values}))
    return path


def test_the_commented_file_reads_back_as_the_same_settings(tmp_path):
    config = load_config(write(tmp_path, seed=7))
    (tmp_path / "again.yaml").write_text(commented_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
    (tmp_path / "plain.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "plain.yaml") == config


def test_every_line_of_the_commented_file_that_needs_words_has_them(tmp_path):
    lines = commented_yaml(load_config(write(tmp_path))).splitlines()
    comments = [line for line in lines if line.strip().startswith("# ")]
    assert len(comments) > 40
    assert any("Otsu" in line for line in comments)


def test_defaults_are_the_lectures(tmp_path):
    config = load_config(write(tmp_path))
    tile, train = config.tile, config.train
    assert (tile.patch_px, tile.stride_px, tile.inner_px, tile.level) == (512, 256, 256, 0)
    assert (train.learning_rate, train.alpha, train.momentum) == (5e-5, 0.9, 0.9)
    assert (train.halve_after, train.stop_after, train.weights) == (3, 5, "imagenet")
    assert config.evaluate.patch_threshold == 0.75


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tile": {"patch_size": 512}}, r"tile\.patch_size: Extra inputs.*found 512"),
        ({"tile": {"inner_px": 700}}, r"inner_px is 700 and patch_px 512"),
        ({"tile": {"level": 0, "mpp": 0.5}}, r"either level or mpp"),
        ({"catalog": {"csv": "a.csv", "slides": "b"}}, r"either csv or slides"),
        (
            {"catalog": {"csv": "a", "split": {"train": 0.5, "test": 0.2}}},
            r"add up to 0\.7, not 1",
        ),
        ({"evaluate": {"patch_threshold": 1.5}}, r"evaluate\.patch_threshold.*found 1\.5"),
        ({"train": {"name": "../x"}}, r"train\.name"),
        ({"train": {"model": "patchnet"}}, r"imagenet.*for patchnet it must be none or a file"),
        (
            {"train": {"patchnet": {"patch_px": 14, "stride_px": 14, "padding": "valid"}}},
            r"patch_px is 14: 7 layers.*15 or more",
        ),
        ({"train": {"patchnet": {"patch_px": 21}}}, r"stride_px is 31 and patch_px 21"),
        ({"train": {"shades_of_gray": 0.5}}, r"train\.shades_of_gray.*found 0\.5"),
        (
            {
                "tile": {"patch_px": 32, "stride_px": 16, "inner_px": 16},
                "train": {
                    "model": "patchnet",
                    "weights": "none",
                    "patchnet": {"patch_px": 33, "stride_px": 33},
                },
            },
            r"train\.patchnet\.patch_px is 33 and tile\.patch_px 32",
        ),
        ({"train": {"hard_negative_share": 1.1}}, r"train\.hard_negative_share.*found 1\.1"),
        (
            {"evaluate": {"detections": {"radius_um": -1}}},
            r"evaluate\.detections\.radius_um.*found -1",
        ),
    ],
)
def test_bad_settings_are_named_with_value_rule_and_file(tmp_path, values, message):
    path = write(tmp_path, **values)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2", "just words", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_config(path)


def test_overrides_replace_single_settings_of_a_section(tmp_path):
    config = load_config(write(tmp_path, jobs={"workers": 3}), jobs={"scheduler": "tcp://h:1"})
    assert (config.jobs.workers, config.jobs.scheduler) == (3, "tcp://h:1")


def test_paths_come_back_absolute_for_workers_in_other_folders(tmp_path, monkeypatch):
    path = write(tmp_path, train={"weights": "vgg16.pth", "hard_negatives": "hard.parquet"})
    monkeypatch.chdir(tmp_path)
    config = load_config(path)
    assert config.out == tmp_path / "run"
    assert config.catalog.csv == tmp_path / "slides.csv"
    assert config.train.weights == str(tmp_path / "vgg16.pth")
    assert config.train.hard_negatives == tmp_path / "hard.parquet"
    assert load_config(write(tmp_path, train={"weights": "none"})).train.weights == "none"


OF_A_WORKFLOW = {"patchnet_comparison.yaml"}
RUNS = sorted(path for path in CONFIGS.glob("*.yaml") if path.name not in OF_A_WORKFLOW)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_shipped_configurations_are_complete_and_valid(path):
    found = yaml.safe_load(path.read_text())
    assert found.keys() == Config.model_fields.keys()
    load_config(path)
