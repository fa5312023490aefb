"""Explanations of the run made by hand, see explain_run.py."""

import shutil
from dataclasses import replace

import pandas as pd
import pytest
from explain_run import METHODS, run_stage, settings, write_lesions

from wsi_pipeline.errors import ModelError, RunError
from wsi_pipeline.jobs.record import read_failures
from wsi_pipeline.models.card import read_card
from wsi_pipeline.models.checkpoint import copy_model
from wsi_pipeline.models.convert import export_model
from wsi_pipeline.stages import explain
from wsi_pipeline.stages.explain import checks
from wsi_pipeline.stages.explain.methods import ALL_METHODS
from wsi_pipeline.stages.explain.places import annotated_patches
from wsi_pipeline.stages.run_directory import evaluation_folder


def test_a_run_explains_each_place_and_its_page_lists_them(run, client):
    outcome = explain.run(settings(run), client)
    # 3 places by 2 methods, 3 pictures, 4 patches by 2 methods, 1 patch by 2 methods.
    assert (outcome.done, outcome.failed) == (6 + 3 + 8 + 2, 0)
    folder = run / "explanations/net"
    table = pd.read_csv(folder / "places.csv")
    assert table["kind"].tolist() == ["false-positive", "missed", "hit"]
    assert table["x_level0"].tolist() == [16, 176, 112]
    assert table["x_um"].tolist() == [8, 88, 56]
    page = (folder / "index.html").read_text()
    for name in table["place"]:
        assert f'id="{name}"' in page
        assert {path.name for path in (folder / name).iterdir()} == {
            "panel.png", "patchnet.zarr", "saliency.zarr",
        }  # fmt: skip
    assert "False positive: no tumour is annotated here" in page
    assert "evaluate again" in page  # 0.85 is what the table says, not this random model
    ranking = pd.read_csv(folder / "ranking.csv")
    assert ranking["auroc"].is_monotonic_decreasing
    assert ranking["patches"].tolist() == [4, 4]
    assert set(pd.read_csv(folder / "trust.csv")["method"]) == set(METHODS)
    layers = pd.read_csv(folder / "similarity.csv")["layer"].unique().tolist()
    assert layers == ["subnet.head", "subnet", "subnet.convolutions.1", "subnet.convolutions.0"]
    report = (run / "evaluation/net/report.html").read_text()
    assert 'href="../../explanations/net/index.html"' in report
    assert "Ranked on 4 annotated test patches" in report
    assert report.startswith("before ") and report.endswith(" after") and " none " not in report


def test_only_what_has_changed_is_done_again(run, client, tmp_path):
    whole = settings(run, explain={"patches": 0, "trust_patches": 0})
    assert explain.run(whole, client).done == 9
    again = explain.run(whole, client)
    assert (again.done, again.skipped) == (0, 9)
    annotation = tmp_path / "s.geojson"
    annotation.write_text(annotation.read_text() + "\n")
    redrawn = explain.run(whole, client)
    assert (redrawn.done, redrawn.skipped) == (3, 6)  # pictures show the annotation, maps do not
    (run / "explanations/net/hit-s-lesion-1/panel.png").unlink()
    assert explain.run(whole, client).done == 1


def test_a_place_asked_for_joins_the_page(run, client):
    whole = settings(run, explain={"patches": 0, "trust_patches": 0})
    explain.run(whole, client)
    run_stage(whole, client, slide="s", at=(0, 0), size=(40, 32), methods=["saliency"])
    page = (run / "explanations/net/index.html").read_text()
    assert page.count("<article") == 4
    assert "Place asked for: no tumour is annotated here" in page
    assert "in 2 patches side by side" in page
    # The evaluation has other places now: those of before go, the one asked for stays.
    write_lesions(evaluation_folder(run, "net"), "found")
    explain.run(whole, client)
    kinds = pd.read_csv(run / "explanations/net/places.csv")["kind"].tolist()
    assert kinds == ["false-positive", "lowest", "hit", "asked"]
    assert not (run / "explanations/net/missed-s-lesion-2").exists()


def test_a_place_asked_for_takes_nothing_off_the_page(run, client):
    """By one method, where the run before was by two, with a place more of a kind than usual."""
    run_stage(settings(run), client, top=2)
    folder = run / "explanations/net"
    before = pd.read_csv(folder / "places.csv")
    assert before["kind"].tolist() == ["false-positive"] * 2 + ["missed", "hit"]
    tables = {name: (folder / f"{name}.csv").read_text() for name in ("ranking", "trust")}
    run_stage(settings(run), client, slide="s", at=(0, 0), methods=["saliency"])
    after = pd.read_csv(folder / "places.csv")
    assert after["place"].tolist() == [*before["place"], "asked-s-0-0"]
    assert {name: (folder / f"{name}.csv").read_text() for name in tables} == tables
    for name in before["place"]:
        shutil.rmtree(folder / name)
    run_stage(settings(run), client, slide="s", at=(0, 0), methods=["saliency"])
    page = (folder / "index.html").read_text()
    assert page.count("PatchNet&#39;s probability</th>") == 2  # ranking, trust


def test_a_picture_is_told_with_the_settings_that_it_was_made_with(run, client):
    """The seed is 1 now: SmoothGrad's map at the origin was made with 0; saliency has no seed."""
    run_stage(settings(run), client, slide="s", at=(0, 0), methods=["smooth_grad"])
    later = settings(run).model_copy(update={"seed": 1})
    run_stage(later, client, slide="s", at=(64, 0), methods=["smooth_grad"])
    run_stage(later, client, slide="s", at=(0, 64), methods=["saliency"])
    page = (run / "explanations/net/index.html").read_text()
    first, second, third = (
        page.split(f'id="asked-s-{place}"')[1].split("</article>")[0]
        for place in ("0-0", "64-0", "0-64")
    )
    assert "Made with seed: 0." in first
    assert "Made with seed: 1." in second
    assert "Made with" not in third
    assert page.count("seed: ") == 2


def failed_units(run):
    return [row.unit for row in read_failures(run) if row.stage == "explain-net"]


def test_failures_stay_until_their_unit_is_done_or_gone(run, client, monkeypatch):
    """Saliency fails at all three places, then at one asked for; narrower runs have other units."""

    def fail(model, images, **settings):
        raise ModelError("no saliency today")

    whole = settings(run, explain={"patches": 0, "trust_patches": 0, "methods": ("saliency",)})
    asked = {"slide": "s", "at": (0, 0)}
    failing = replace(ALL_METHODS["saliency"], function=fail)
    monkeypatch.setitem(ALL_METHODS, "saliency", failing)
    explain.run(whole, client)
    every = failed_units(run)
    assert len(every) == 3
    run_stage(whole, client, **asked)
    assert failed_units(run) == [*every, "asked-s-0-0/saliency"]
    monkeypatch.undo()
    run_stage(whole, client, methods=["patchnet"])
    assert failed_units(run) == [*every, "asked-s-0-0/saliency"]
    assert all(unit in (run / "explanations/net/index.html").read_text() for unit in every)
    write_lesions(evaluation_folder(run, "net"), "found")  # the missed one is not a place any more
    explain.run(whole, client)
    assert failed_units(run) == ["asked-s-0-0/saliency"]
    run_stage(whole, client, **asked)
    assert failed_units(run) == []


def test_without_an_evaluation_a_place_must_be_asked_for(run, client):
    (run / "evaluation/net/lesions.csv").unlink()
    with pytest.raises(RunError, match=r"lesions\.csv does not exist: run the evaluate stage"):
        explain.plan_explanations(settings(run))
    assert run_stage(settings(run), client, slide="s", at=(-32, 0)).done == 3


def test_an_evaluation_older_than_the_catalog_is_refused(run, client):
    """A place can still be asked for, on a slide that is there."""
    slides = pd.read_parquet(run / "slides.parquet").assign(slide_id="t")
    slides.to_parquet(run / "slides.parquet")
    with pytest.raises(RunError, match=r"'s' of the evaluation is not .* again"):
        explain.plan_explanations(settings(run))
    place = annotated_patches(run, "net", 1, seed=0)
    card = read_card(run / "models/net")
    for units_of in (checks.rank_units, checks.trust_units):
        with pytest.raises(RunError, match="evaluate again"):
            units_of(place, METHODS, slides.set_index("slide_id"), settings(run), card)
    assert run_stage(settings(run), client, slide="t", at=(0, 0)).done == 3


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_an_archive_is_explained_by_what_fits_it_and_its_weights_are_not_drawn_anew(
    run, client, tmp_path, kind
):
    if kind == "onnx":
        for name in ("onnxscript", "onnxruntime"):
            pytest.importorskip(name)
    export_model(run / "models/net", tmp_path / kind, kind)
    shutil.rmtree(run / "models/net")
    copy_model(tmp_path / kind, run / "models/net")
    with pytest.raises(ModelError, match=r"model\.json: method grad_cam is not for a model"):
        explain.plan_explanations(settings(run), methods=["grad_cam"])
    with pytest.raises(ModelError, match="no convolution"):
        explain.plan_explanations(settings(run, explain={"methods": None, "layer": "conv"}))
    config = settings(run, explain={"methods": ("occlusion",), "patches": 1})
    assert explain.run(config, client).failed == 0
    trust = pd.read_csv(run / "explanations/net/trust.csv")
    assert trust["method"].tolist() == ["occlusion"]
    assert trust["similarity"].isna().all() and trust["warning"].isna().all()
    assert trust["deletion_area"].notna().all()
