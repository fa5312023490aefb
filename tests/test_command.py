"""What commands share, with stages and a Dask client that only pretend."""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from wsi_pipeline import __version__, command
from wsi_pipeline.config import Config
from wsi_pipeline.config_file import load_config
from wsi_pipeline.errors import ConfigError, RunError
from wsi_pipeline.jobs.run import Outcome


def test_a_folder_is_held_by_one_command_until_that_ends_or_fails(tmp_path):
    run = tmp_path / "new" / "run"
    with pytest.raises(ZeroDivisionError), command.alone_in(run):
        with (
            pytest.raises(RunError, match=r"new/run: another wsi command is at work"),
            command.alone_in(run),
        ):
            pytest.fail("two commands in one folder")
        raise ZeroDivisionError
    with command.alone_in(run):
        assert run.is_dir()


def test_a_folder_made_for_a_command_that_fails_at_once_is_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), command.alone_in(tmp_path / "run"):
        (tmp_path / "run/config.yaml").touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [True, False])
def test_a_folder_that_was_there_or_has_results_stays(tmp_path, before):
    run = tmp_path / "run"
    if before:
        run.mkdir()
    with pytest.raises(ZeroDivisionError), command.alone_in(run):
        (run / ("config.yaml" if before else "slides.parquet")).touch()
        raise ZeroDivisionError
    assert run.is_dir()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"out is .*file/run: it cannot be written to: .*Errno"),
        command.alone_in(tmp_path / "file" / "run"),
    ):
        pytest.fail("held what is not there")


def test_the_exit_status_and_the_last_lines_tell_of_failures(tmp_path, capsys):
    catalog = Outcome(done=2, counted=Counter(catalog=2))
    tile = Outcome(done=1, skipped=1, counted=Counter(tile=2))
    outcomes = [("tile", catalog + tile), ("heatmap", Outcome(done=2, failed=2))]
    with pytest.raises(SystemExit) as left:
        command.finish(outcomes[:1], tmp_path)
    assert left.value.code == 0
    with pytest.raises(SystemExit) as left:
        command.finish(outcomes, tmp_path)
    assert left.value.code == 1
    told = capsys.readouterr().err.replace("\n", " ").split("tile: ")
    assert told[1] == "3 done, 1 already done, 0 failed (units: catalog 2, tile 2) "
    assert told[2].startswith(
        "3 done, 1 already done, 0 failed (units: catalog 2, tile 2)"
        " heatmap: 2 done, 0 already done, 2 failed 2 failed: see "
    )


@pytest.fixture
def outcomes(monkeypatch):
    """What each stage is to return; a stage that has run is taken out."""
    left = {"tile": Outcome(done=1), "train": Outcome(done=1, results={"net": {}}),
            "heatmap": Outcome(), "evaluate": Outcome(done=1)}  # fmt: skip

    def pretend(module):
        name = module.removeprefix("wsi_pipeline.stages.")
        return SimpleNamespace(run=lambda config, client: left.pop(name))

    monkeypatch.setattr(command, "import_module", pretend)
    monkeypatch.setattr("wsi_pipeline.jobs.cluster.connect", lambda *_, **options: nullcontext())
    return left


STAGES = ("tile", "train", "heatmap", "evaluate")


def test_a_run_keeps_its_settings_and_names_its_report(tmp_path, capsys, outcomes):
    config = Config(out=tmp_path / "run", catalog={"csv": tmp_path / "slides.csv"})
    with pytest.raises(SystemExit) as left:
        command.run_stages(config, STAGES)
    assert (left.value.code, outcomes) == (0, {})
    assert "/run/evaluation/vgg16/report.html\n" in capsys.readouterr().err
    written = config.out / "config.yaml"
    assert written.read_text().startswith(f"# wsi_pipeline {__version__}\n")
    assert load_config(written).tile == config.tile


def test_without_a_model_nothing_follows_training(tmp_path, capsys, outcomes):
    config = Config(out=tmp_path / "run", catalog={"csv": tmp_path / "slides.csv"})
    outcomes["train"] = Outcome(failed=1)
    with pytest.raises(SystemExit) as left:
        command.run_stages(config, STAGES)
    assert (left.value.code, outcomes.keys()) == (1, {"heatmap", "evaluate"})
    assert "report:" not in capsys.readouterr().err


def test_a_run_of_another_version_is_refused_and_left_as_it_was(tmp_path):
    config = Config(out=tmp_path, catalog={"csv": "slides.csv"})
    written = tmp_path / "config.yaml"
    for made_by in ("# wsi_pipeline 0.0.1\nout: x\n", "out: x\n"):
        written.write_text(made_by)
        with pytest.raises(RunError, match=r"cannot continue\. Set `out` to another folder"):
            command.write_settings(config)
        assert written.read_text() == made_by
    written.unlink()
    command.write_settings(config)
    command.write_settings(config)  # its own
