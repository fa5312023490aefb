"""What the train stage decides before training."""

import json
import multiprocessing
import os
import subprocess
import sys

import pytest

from wsi_pipeline.errors import RunError
from wsi_pipeline.stages import train
from wsi_pipeline.stages.train import _noted, _noted_in, _torchrun, loader_workers


@pytest.fixture
def cores(monkeypatch):
    def set_to(count):
        monkeypatch.setattr(train, "CPU_COUNT", count)

    return set_to


@pytest.fixture
def daemon(monkeypatch):
    """As in a Dask worker that its nanny keeps from starting processes."""
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})


@pytest.mark.parametrize(
    "count, processes, expected", [(16, 1, 14), (16, 4, 3), (128, 1, 16), (128, 8, 15), (1, 1, 0)]
)
def test_loader_workers_of_a_gpu_are_its_share_of_the_cores(cores, count, processes, expected):
    cores(count)
    assert loader_workers(None, ["0"] * processes, processes) == expected


def test_on_a_cpu_there_are_none_unless_asked_for(cores):
    cores(16)
    assert loader_workers(None, [], 1) == 0
    assert loader_workers(3, [], 1) == 3


def test_a_worker_that_may_start_none_has_none_unless_asked_for(cores, daemon):
    cores(16)
    assert loader_workers(None, ["0"], 1) == 0
    assert loader_workers(0, ["0"], 1) == 0
    assert loader_workers(None, ["0", "1"], 2) == 7  # torchrun's processes are no daemons
    assert loader_workers(3, ["0", "1"], 2) == 3
    with pytest.raises(RunError, match=r"loader_workers is 3.*DASK_DISTRIBUTED__WORKER__DAEMON"):
        loader_workers(3, ["0"], 1)


@pytest.mark.slow
def test_an_error_of_several_processes_is_told_as_that_of_one(tmp_path):
    job = {"folder": str(tmp_path / "model"), "seed": 0, "slides": {"train": []}, "settings": {}}
    with pytest.raises(RunError, match=r"^none of the patches of 0 slides has a known label"):
        _torchrun(job, 2, [], print)
    assert "none of the patches of 0 slides" in (tmp_path / "model/torchrun.log").read_text()


ONE_FAILS = """
from wsi_pipeline.errors import RunError
from wsi_pipeline.stages import train
from wsi_pipeline.training.processes import distributed, gather

def _train(job, report):
    with distributed() as process:
        if process.rank == 1:
            raise RunError("the second cannot read")
        gather([])

train._train = _train
process_of_torchrun = train.process_of_torchrun
"""


@pytest.mark.slow
def test_the_error_told_is_of_the_process_that_failed_not_of_one_that_waited_for_it(
    tmp_path, monkeypatch
):
    (tmp_path / "one_fails.py").write_text(ONE_FAILS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(train, "__name__", "one_fails")
    with pytest.raises(RunError, match=r"^the second cannot read$"):
        _torchrun({"folder": str(tmp_path / "model")}, 2, [], print)


def test_unread_patches_are_noted_once_by_all_processes_also_of_a_path_that_is_no_text(tmp_path):
    path = tmp_path / "unread.txt"
    path.write_text("a.svs: damaged\n")  # of a training that is discarded
    first, second = _noted_in(path), _noted_in(path)
    path.unlink()
    for note in (first, second, first):
        note("a.svs: damaged")
        note("b\udcff.svs:\n damaged")
    assert _noted(path) == ["a.svs: damaged", r"b\udcff.svs: damaged"]


def test_a_process_of_torchrun_ends_with_the_one_that_started_it(tmp_path):
    (tmp_path / "job.json").write_text(json.dumps({}))
    program = (
        "import time; from wsi_pipeline.stages import train;"
        " train._train = lambda *_: (print('training', flush=True), time.sleep(300));"
        f" train.process_of_torchrun({str(tmp_path / 'job.json')!r})"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | {"RANK": "0"}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes) as process:
        assert process.stdout.readline() == "training\n"
        process.stdin.close()
        assert process.wait(timeout=30) == 1
