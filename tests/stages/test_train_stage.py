"""What the train stage decides before training."""

import multiprocessing

import pytest

from wsi_pipeline.errors import RunError
from wsi_pipeline.stages import train
from wsi_pipeline.stages.train import loader_workers


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
    with pytest.raises(RunError, match=r"loader_workers is 3.*DASK_DISTRIBUTED__WORKER__DAEMON"):
        loader_workers(3, ["0"], 1)
