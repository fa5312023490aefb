import re
from pathlib import Path

import pytest
import yaml

from wsi_pipeline.config import Config
from wsi_pipeline.config_file import commented_yaml, dump_config, load_config
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
    assert any("glass" in line for line in comments)


def test_a_setting_of_an_earlier_version_is_told_by_its_new_name(tmp_path):
    path = write(tmp_path, heatmap={"mixed_precision": False})
    with pytest.raises(
        ConfigError, match=r"this setting is now `precision`: float32 \(was false\)"
    ):
        load_config(path)
    path = write(tmp_path, tile={"tissue": {"min_saturation": 0.06}})
    with pytest.raises(ConfigError, match="`min_chroma` is a threshold on colour"):
        load_config(path)


def test_a_broken_rule_is_told_with_setting_value_and_file(tmp_path):
    path = write(tmp_path, seed=-1, catalog={}, train={"shades_of_gray": 0.5}, foo=1)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value) == (
        f"{path}: seed: Input should be greater than or equal to 0 (found -1);"
        " catalog: Value error, give either csv or slides, one of the two;"
        " train.shades_of_gray: Input should be greater than or equal to 1 (found 0.5);"
        " foo: there is no such setting (found 1)"
    )


@pytest.mark.parametrize("text", ["[1, 2", "just words", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("tile:\n  mpp: 0.5: x\n", ", line 2, column 11", "mapping values are not allowed here"),
        (
            "splits: [a, b\nseed: 1\n", ", line 2, column 5",
            "while parsing a flow sequence: expected ',' or ']', but got ':'",
        ),
        ("seed: 1\nname: a\0b\n", "", "unacceptable character #x0000: special characters"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_syntax_is_told_in_a_line_with_its_place(tmp_path, text, place, problem):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    told = str(error.value)
    assert told.startswith(f"{path}{place}: cannot be read as YAML: {problem}")
    assert "\n" not in told


def test_overrides_replace_single_settings_of_a_section(tmp_path):
    config = load_config(write(tmp_path, jobs={"workers": 3}), jobs={"scheduler": "tcp://h:1"})
    assert (config.jobs.workers, config.jobs.scheduler) == (3, "tcp://h:1")


def test_what_is_no_section_is_told_though_it_is_overridden(tmp_path):
    with pytest.raises(ConfigError, match=r"my\.yaml: jobs: Input should be .*\(found 4\)"):
        load_config(write(tmp_path, jobs=4), jobs={"scheduler": "tcp://h:1"})


def test_paths_come_back_absolute_for_workers_in_other_folders(tmp_path, monkeypatch):
    path = write(tmp_path, train={"weights": "vgg16.pth", "hard_negatives": "hard.parquet"})
    monkeypatch.chdir(tmp_path)
    config = load_config(path)
    assert config.out == tmp_path / "run"
    assert config.catalog.csv == tmp_path / "slides.csv"
    folders = {"csv": None, "slides": "s", "tissue": "t", "exclude": "e"}
    catalog = load_config(write(tmp_path, catalog=folders)).catalog
    assert (catalog.tissue, catalog.exclude) == (tmp_path / "t", tmp_path / "e")
    assert config.train.weights == str(tmp_path / "vgg16.pth")
    assert config.train.hard_negatives == tmp_path / "hard.parquet"
    assert load_config(write(tmp_path, train={"weights": "none"})).train.weights == "none"


OF_A_WORKFLOW = {"patchnet_comparison.yaml"}
RUNS = sorted(path for path in CONFIGS.glob("*.yaml") if path.name not in OF_A_WORKFLOW)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_shipped_configurations_are_valid_and_say_what_differs_from_the_defaults(path):
    found = yaml.safe_load(path.read_text())
    load_config(path)
    differs = Config.model_validate(found).model_dump(mode="json", exclude_defaults=True)
    assert found == differs
