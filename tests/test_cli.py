"""What verbs do before there are workers."""

import pytest
import yaml
from click.testing import CliRunner

from wsi_pipeline import cli


@pytest.mark.parametrize("cache", [False, True])
def test_a_run_makes_the_cache_that_its_training_reads(tmp_path, monkeypatch, cache):
    settings = {"out": "run", "catalog": {"csv": "slides.csv"}, "train": {"cache": cache}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings))
    asked = []
    monkeypatch.setattr(cli.runs, "run_stages", lambda config, stages: asked.append(stages))
    done = CliRunner().invoke(cli.main, ["run", "-c", str(tmp_path / "my.yaml")])
    assert done.exit_code == 0, done.output
    before_training = ("check", "tile", "cache") if cache else ("check", "tile")
    assert asked == [(*before_training, "train", "heatmap", "evaluate")]
