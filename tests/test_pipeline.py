"""All stages together, as a user runs them: in processes, with files, and when things go wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
import zarr
from command_line import WSI, wait_until, wsi

from wsi_pipeline.config_file import load_config
from wsi_pipeline.jobs.record import read_done


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Ten small phantom slides."""
    out = tmp_path_factory.mktemp("cohort")
    wsi("phantom", out, "--slides", 10, "--size", "1100x1100", "--mpp", 1, "--seed", 5)
    return out


def settings(path: Path, out: Path, cohort: Path, **sections) -> Path:
    values = {
        "out": str(out),
        "catalog": {
            "csv": str(cohort / "slides.csv"),
            "split": {"train": 0.4, "validation": 0.3, "test": 0.3},
        },
        "tile": {"level": None, "mpp": 2.0, "patch_px": 32, "stride_px": 32, "inner_px": 32},
        "train": {
            "weights": "none",
            "epoch_examples": 64,
            "validation_examples": 64,
            "max_epochs": 2,
            "batch_size": 16,
            "precision": "float32",
        },
        "heatmap": {"chunk": 4, "precision": "float32"},
        "jobs": {"workers": 2},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def finished(cohort, tmp_path_factory) -> Path:
    """A run through all stages: half a minute, but the quick tests hold no other such run."""
    folder = tmp_path_factory.mktemp("finished")
    path = settings(folder / "run.yaml", folder / "run", cohort)
    wsi("run", "-c", path)
    return folder / "run"


def heatmaps(run: Path) -> dict[str, np.ndarray]:
    return {
        store.name: zarr.open_group(store, mode="r")["0"][:]
        for store in sorted((run / "heatmaps" / "vgg16").glob("*.zarr"))
        if not store.name.startswith(".")
    }


def test_a_run_leaves_every_file_that_the_architecture_names(finished):
    expected = [
        "config.yaml", "slides.parquet", "failures.csv", "models/vgg16/model.safetensors",
        "models/vgg16/model.json", "models/vgg16/history.csv", "evaluation/vgg16/report.html",
        "evaluation/vgg16/metrics.json", "tissue/index.html",
    ]  # fmt: skip
    assert [name for name in expected if not (finished / name).is_file()] == []
    pictures, indices = (finished.glob(files) for files in ("tissue/*.jpg", "patches/*"))
    assert {path.stem for path in pictures} == {path.stem for path in indices}
    metrics = json.loads((finished / "evaluation/vgg16/metrics.json").read_text())
    assert 0 <= metrics["patch"]["roc_auc"] <= 1
    assert {"patch", "slide", "froc"} <= metrics.keys()
    assert load_config(finished / "config.yaml").tile.patch_px == 32


def test_no_patient_is_in_two_splits(finished):
    slides = pd.read_parquet(finished / "slides.parquet")
    assert set(slides["split"]) == {"train", "validation", "test"}
    assert slides.groupby("patient_id")["split"].nunique().max() == 1


def test_a_second_run_does_nothing_again(finished):
    before = {path: path.stat().st_mtime_ns for path in (finished / "heatmaps").rglob("*")}
    done = wsi("run", "-c", finished / "config.yaml")
    assert "train: 0 done, 1 already done" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (finished / "heatmaps").rglob("*")} == before
    assert "failed" not in wsi("status", finished).stdout.split("\n", 4)[-1]


def test_a_run_and_its_status_tell_how_slides_were_read(finished):
    reading = "heatmap: tiles are decoded for 6 slides, after the first 4 megapixels of each\n"
    assert reading in wsi("heatmap", "-c", finished / "config.yaml").stderr
    assert reading in wsi("status", finished).stdout


def test_a_run_does_not_differ_from_itself(finished, tmp_path):
    done = wsi("compare", finished, finished, "--out", tmp_path / "compared.json")
    assert "froc.corrected score" in done.stdout
    found = json.loads((tmp_path / "compared.json").read_text())
    assert set(found) == {"patch", "slide", "froc.lecture", "froc.official", "froc.corrected"}
    differences = [row["difference"] for figures in found.values() for row in figures.values()]
    assert set(differences) - {None} == {0}


@pytest.fixture
def worker_options() -> list[dict]:
    """Of each of the two workers: ``preload``, code that it runs first, and ``env``."""
    return [{}, {}]


@pytest.fixture
def scheduler(tmp_path, worker_options):
    """A scheduler and two workers started apart, in a folder of their own, as on a cluster.

    Gives the address and the worker processes.
    """
    file = tmp_path / "scheduler.json"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": elsewhere}
    dask = (sys.executable, "-m", "dask")
    place = ("--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0")
    command = (*dask, "scheduler", *place, "--no-dashboard", "--scheduler-file", file)
    processes = [subprocess.Popen(command, **quiet)]
    try:
        wait_until(lambda: file.exists() and file.read_text().endswith("}"))
        address = json.loads(file.read_text())["address"]
        worker = (*dask, "worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard")
        for options in worker_options:
            preload = ("--preload", options["preload"]) if "preload" in options else ()
            # A thread, as local workers have: with others some CPUs' kernels round differently.
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.get("env", {})
            processes.append(subprocess.Popen([*worker, *preload], env=environment, **quiet))
        yield address, processes[1:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def copy_before_heatmaps(finished: Path, out: Path) -> Path:
    """The run as it was before its heatmap stage."""
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("heatmaps", "evaluation"))
    for stage in ("predict-vgg16", "heatmap-vgg16", "evaluate-vgg16"):
        (out / "done" / f"{stage}.jsonl").unlink(missing_ok=True)
    return out


@pytest.mark.slow
def test_workers_started_apart_give_the_same_outputs_though_one_is_killed(
    finished, cohort, scheduler, tmp_path
):
    address, workers = scheduler
    run = tmp_path / "run"
    path = settings(tmp_path / "run.yaml", run, cohort)
    client = subprocess.Popen(
        [*WSI, "run", "-c", path, "--scheduler", address], stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: len(read_done(run, "predict-vgg16")) >= 3)
    assert client.poll() is None, "the run ended before a worker could be killed"
    workers[0].send_signal(signal.SIGKILL)
    _, messages = client.communicate(timeout=300)
    assert client.returncode == 0, messages
    same = ("patches/*.parquet", "models/vgg16/model.safetensors", "evaluation/vgg16/metrics.json")
    for pattern in same:
        expected = {file.name: file.read_bytes() for file in finished.glob(pattern)}
        assert expected
        assert {file.name: file.read_bytes() for file in run.glob(pattern)} == expected
    assert_same_heatmaps(run, finished)


@pytest.mark.slow
def test_training_in_two_processes_is_that_in_one(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("models", "heatmaps"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"out": str(run), "train": config["train"] | {"processes": 2}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    wsi("train", "-c", tmp_path / "two.yaml")
    found, expected = (
        pd.read_csv(folder / "models/vgg16/history.csv") for folder in (run, finished)
    )
    # The first epoch alone: rounding depends on the CPU and on the size of a process's batches, and
    # grows from step to step, since RMSprop divides by small gradients. Processes that did not
    # share their gradients would be off by more than a tenth.
    losses = ["train_loss", "validation_loss"]
    np.testing.assert_allclose(found.loc[0, losses], expected.loc[0, losses], rtol=5e-3)
    assert (run / "models/vgg16/model.safetensors").is_file()
    assert read_done(run, "train")["vgg16"]["result"]["failures"] == []


def all_native(instructions: bool) -> str:
    """Code that makes a worker take its CPU for one with, or without, bfloat16 instructions."""
    return f"import torch; torch.cpu.get_capabilities = lambda: {{'avx512_bf16': {instructions}}}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "worker_options",
    [[{"preload": all_native(True)},
      {"preload": all_native(False), "env": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}]],
)  # fmt: skip
def test_heatmaps_of_a_worker_with_bfloat16_and_one_without_are_in_one_precision(
    finished, scheduler, tmp_path
):
    run = copy_before_heatmaps(finished, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"out": str(run)}
    stores = {}
    for setting, expected in (("null", "float32"), ("bfloat16", "bfloat16")):
        config["heatmap"]["precision"] = None if setting == "null" else setting
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        done = wsi("heatmap", "-c", tmp_path / "run.yaml", "--scheduler", scheduler[0])
        assert ("they emulate it" in done.stderr) == (setting == "bfloat16")
        for store in (run / "heatmaps/vgg16").glob("*.zarr"):
            assert zarr.open_group(store, mode="r").attrs["wsi_pipeline"]["precision"] == expected
        stores[setting] = heatmaps(run)
    assert json.loads((run / "precision.json").read_text()) == {"heatmap": "float32"}
    for name, exact in heatmaps(finished).items():
        np.testing.assert_allclose(stores["null"][name], exact, atol=1e-5)
        predicted = np.isfinite(exact)
        differences = np.abs(stores["bfloat16"][name] - exact)[predicted]
        assert (differences > 0).mean() > 0.9, f"{name} has parts in float32"
        assert differences.max() < 0.05


@pytest.mark.slow
def test_a_run_in_bfloat16_says_so_wherever_its_figures_are(cohort, tmp_path):
    run = tmp_path / "run"
    sections = {"train": {"precision": "bfloat16"}, "heatmap": {"precision": "bfloat16"}}
    done = wsi("run", "-c", settings(tmp_path / "run.yaml", run, cohort, **sections))
    card = json.loads((run / "models/vgg16/model.json").read_text())
    assert card["precision"] == card["training"]["settings"]["precision"] == "bfloat16"
    said = json.loads((run / "evaluation/vgg16/metrics.json").read_text())["precision"]
    difference = said.pop("difference")
    assert said == {"training": "bfloat16", "heatmaps": "bfloat16"}
    assert difference["patches"] == 24  # 4 of each of 6 slides
    assert 0 < difference["mean"] < difference["largest"] < 0.05
    told = re.compile(r"heatmap: computed in bfloat16\. On 24 patches drawn at random")
    assert told.search(done.stderr)
    assert told.search(wsi("status", run).stdout)
    page = (run / "evaluation/vgg16/report.html").read_text()
    assert f"at most {difference['largest']:.2g} (mean {difference['mean']:.2g})" in page
    again = wsi("run", "-c", tmp_path / "run.yaml")
    assert "train: 0 done, 1 already done" in again.stderr
    assert re.search(r"heatmap: 0 done, \d+ already done, 0 failed", again.stderr)


@pytest.mark.slow
def test_a_run_killed_in_the_heatmap_stage_redoes_only_what_was_not_done(finished, tmp_path):
    run = copy_before_heatmaps(finished, tmp_path / "run")
    command = [*WSI, "heatmap", "-c", run / "config.yaml", "--out", run]
    client = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: len(read_done(run, "predict-vgg16")) >= 3)
    assert client.poll() is None, "the stage ended before it could be killed"
    os.killpg(client.pid, signal.SIGKILL)
    client.wait()
    before = read_done(run, "predict-vgg16")
    assert not list((run / "heatmaps/vgg16").glob("[!.]*.zarr"))

    wsi("heatmap", "-c", run / "config.yaml", "--out", run)
    after = read_done(run, "predict-vgg16")
    assert len(after) > len(before)
    assert {key: after[key] for key in before} == before  # not recorded anew: not redone
    assert_same_heatmaps(run, finished)


def assert_same_heatmaps(run: Path, expected: Path):
    found, expected = heatmaps(run), heatmaps(expected)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
