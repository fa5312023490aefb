import os
import sys

import pytest
from unit_functions import call, exit_code_of_a_child, visible_gpu

from wsi_pipeline.errors import ConfigError, RunError
from wsi_pipeline.jobs import cluster
from wsi_pipeline.jobs.cluster import (
    GPU,
    GPU_CORES,
    GPU_THREADS,
    connect,
    has_resource,
    visible_gpus,
    worker_threads,
)
from wsi_pipeline.jobs.run import run_units


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """A driver that lists two GPUs, the second one cut in two (MIG)."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(
        f"#!{sys.executable}\nprint('GPU 0: A (UUID: GPU-0)\\nGPU 1: A (UUID: GPU-1)')\n"
        "print('  MIG 3g.71gb Device 0: (UUID: MIG-0)')\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpus_are_those_of_the_driver_narrowed_down_by_the_environment(two_gpus, monkeypatch):
    assert visible_gpus() == ["0", "1"]
    for chosen, visible in (("1", ["1"]), ("GPU-1, GPU-0", ["GPU-1", "GPU-0"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert visible_gpus() == visible
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert visible_gpus() == []


@pytest.mark.parametrize("text", ["exit 9", "echo 'No devices were found'"])
def test_no_driver_no_gpus(tmp_path, monkeypatch, text):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{text}\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert visible_gpus() == []  # not executable: as if there were none
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert visible_gpus() == []


def test_each_gpu_has_one_worker_and_units_that_need_one_go_there(two_gpus, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "CPU_COUNT", 12)
    units = [call(str(i), "s", {"i": i}, visible_gpu) for i in range(12)]
    with connect(workers=3) as client:
        assert worker_threads(client) == 2 * GPU_THREADS + 1
        assert worker_threads(client, {GPU: 1}) == 2 * GPU_THREADS
        assert has_resource(client, GPU)
        seen = client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
        assert sorted(seen.values()) == ["", "0", "1"]
        # Each has a third of 12 cores; units that need a GPU have them to themselves, by halves.
        assert set(client.run(os.getenv, "OMP_NUM_THREADS").values()) == {"4"}
        cores = client.run(os.getenv, GPU_CORES)
        assert {seen[worker]: cores[worker] for worker in seen} == {"": None, "0": "6", "1": "6"}
        ended = run_units(
            client, units, run_dir=tmp_path, stage="s", schema_version=1, resources={GPU: 1}
        )
    assert {result["gpu"] for result in ended.results.values()} == {"0", "1"}


def test_local_workers_may_have_children_and_no_resources_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    with connect(workers=1) as client:
        assert not has_resource(client, GPU)
        assert client.submit(exit_code_of_a_child).result() == {"code": 0}
        with pytest.raises(RunError, match=r"no worker of tcp://.* offers \{'GPU': 1\}"):
            run_units(
                client,
                [call("a", "a", {}, visible_gpu)],
                run_dir=tmp_path / "run",
                stage="train",
                schema_version=1,
                resources={GPU: 1},
            )
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]  # Dask leaves nothing here


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense", "http://127.0.0.1:1"])
def test_an_address_where_no_scheduler_answers_is_an_error_that_names_it(address):
    with pytest.raises(ConfigError, match=f"no Dask scheduler answers at '{address}'"):
        connect(address, timeout_s=0.5).__enter__()


def test_connecting_waits_for_the_first_worker_of_a_running_scheduler(start_scheduler):
    address, *_ = start_scheduler(workers=1)
    with connect(address) as client:
        assert worker_threads(client) == 1


def test_a_worker_with_another_version_of_the_package_is_an_error(start_scheduler, tmp_path):
    metadata = tmp_path / "other" / "wsi_pipeline-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: wsi_pipeline\nVersion: 9.9.9\n")
    address, *_ = start_scheduler(workers=1, path=tmp_path / "other")
    with pytest.raises(ConfigError, match=r"worker tcp://.* has wsi_pipeline 9\.9\.9 installed"):
        connect(address).__enter__()
