"""What cannot be explained is refused by the command line, before a worker is started."""

import json
from contextlib import contextmanager

import pandas as pd
import pytest
from click.testing import CliRunner
from explain_run import settings

from wsi_pipeline.cli import main
from wsi_pipeline.config_file import dump_config
from wsi_pipeline.stages.explain import plan as plan_module


@pytest.fixture
def starts(monkeypatch, client):
    """One entry for each time that workers were asked for."""
    found = []

    @contextmanager
    def connect(scheduler, workers):
        found.append(scheduler)
        yield client

    monkeypatch.setattr("wsi_pipeline.jobs.cluster.connect", connect)
    return found


def invoke(run, *arguments, **sections):
    path = run.parent / "run.yaml"
    path.write_text(dump_config(settings(run, **sections)))
    return CliRunner().invoke(main, ["explain", "-c", str(path), *arguments])


def assert_refused(done, starts, run, *parts):
    """In one line that has all the parts, with the status of a mistake, and with nothing made."""
    [line] = done.output.splitlines()
    for part in parts:
        assert part in line
    assert (done.exit_code, starts) == (2, [])
    assert not (run / "config.yaml").exists()
    assert not (run / "explanations").exists()


CORNER = ("--slide", "s", "--at", "0,0")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--methods", "salience"], ["ConfigError: method 'salience' is not known; there are pat"]),
        (["--methods", "saliency,"], ["ConfigError: method '' is not known"]),
        (
            ["--methods", "grad_cam"],
            ["ModelError: ", "net/model.json: method grad_cam is not for a model 'patchnet': it "],
        ),
        (["--slide", "s"], ["ConfigError: --slide is given without --at: a place needs both"]),
        (["--at", "1,2"], ["ConfigError: --at is given without --slide: a place needs both"]),
        (["--size", "64x64"], ["ConfigError: --size is given without --slide and --at"]),
        (
            ["--slide", "z", "--at", "0,0"],
            ["RunError: slide 'z' is not among the 1 readable", "run/slides.parquet"],
        ),
        (
            ["--slide", "s", "--at", "0,256"],
            ["ConfigError: ", "(0, 256)", "off slide s (", "s.tif)", "x 0 to 256, y 0 to 256"],
        ),
        (["--slide", "s", "--at", "-64,0"], ["lies off slide s"]),
        (
            [*CORNER, "--size", "31x64"],
            ["ConfigError: the place's size is 31 x 64 px: it must be that of a patch (tile.patch"],
        ),
    ],
)
def test_what_cannot_be_explained_is_refused_before_any_work(run, starts, arguments, parts):
    assert_refused(invoke(run, *arguments), starts, run, *parts)


@pytest.mark.parametrize("arguments", [(), CORNER], ids=["everywhere", "a place"])
def test_a_layer_that_is_not_there_is_refused_before_any_work(run, starts, arguments):
    done = invoke(run, *arguments, explain={"layer": "features.9"})
    expected = "net/model.json: layer 'features.9' is not in the model; its convolutions are subnet"
    assert_refused(done, starts, run, "ModelError: ", expected)


def test_a_model_without_the_head_of_a_method_is_refused_before_any_work(run, starts):
    """The card alone says what the model is: its weights are not read."""
    path = run / "models/net/model.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps(card | {"architecture": "vgg16", "arguments": {}}))
    done = invoke(run, *CORNER, "--methods", "saliency,cam")
    parts = ["net/model.json: method cam is not for a model 'vgg16'", "global average pooling"]
    assert_refused(done, starts, run, *parts)


def test_a_missing_model_or_evaluation_is_refused_before_any_work(run, starts):
    (run / "evaluation/net/lesions.csv").unlink()
    done = invoke(run)
    assert_refused(done, starts, run, "RunError: ", "lesions.csv does not exist: run the evaluate")
    (run / "models/net/model.json").unlink()
    assert_refused(invoke(run), starts, run, "net/model.json does not exist: run `wsi train` first")


def test_an_evaluation_older_than_the_catalog_is_refused_before_any_work(run, starts):
    slides = pd.read_parquet(run / "slides.parquet").assign(slide_id="t")
    slides.to_parquet(run / "slides.parquet")
    assert_refused(invoke(run), starts, run, "slide 's' of the evaluation is not", "again")


def test_what_is_no_place_at_all_is_refused(run, starts):
    done = invoke(run, "--slide", "s", "--at", "1;2")
    assert (done.exit_code, starts) == (2, [])
    assert "is no place: write it as 1024,2048" in done.output


def test_what_can_be_explained_is_planned_once_and_done(run, starts, monkeypatch):
    planned, evaluated_places = [], plan_module.evaluated_places
    monkeypatch.setattr(
        plan_module,
        "evaluated_places",
        lambda *of: planned.append(of) or evaluated_places(*of),
    )
    done = invoke(run, *CORNER, "--methods", "saliency")
    assert (done.exit_code, len(starts), len(planned)) == (0, 1, 1)
    assert "explain: 2 done" in done.output  # a map and a picture
    assert (run / "explanations/net/asked-s-0-0/panel.png").is_file()
