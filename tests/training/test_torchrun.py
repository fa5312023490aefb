"""Several processes under torchrun: what they report and return, and how they end."""

import os
import pickle
import subprocess
import sys

import pytest

from wsi_pipeline.errors import RunError
from wsi_pipeline.training.torchrun import in_processes

WORK = """
import time

from wsi_pipeline.errors import RunError
from wsi_pipeline.training.processes import distributed, gather


def adds_up(job, report):
    with distributed() as process:
        if process.rank == 0:
            print("{'loss': 1}", flush=True)  # as a library might
            report({"of": process.count})
        return {"sum": sum(gather([job["number"] + process.rank]))}


def second_fails(job, report):
    with distributed() as process:
        if process.rank == 1:
            raise RunError("the second cannot read")
        gather([])


def is_killed(job, report):
    import os
    os._exit(3)


def sleeps(job, report):
    print("working", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A module of work that processes can import, too."""
    (tmp_path / "work_of_several.py").write_text(WORK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(tmp_path))
    import work_of_several

    yield work_of_several
    del sys.modules["work_of_several"]


@pytest.fixture
def run(tmp_path):
    def in_two(work, report=print):
        folder, job = tmp_path / "model", {"number": 5}
        return in_processes(work, job, processes=2, gpus=[], folder=folder, report=report)

    return in_two


def test_the_first_process_reports_and_gives_the_result(work, run):
    events = []
    assert run(work.adds_up, events.append) == {"sum": 5 + 6}
    assert events == [{"of": 2}]


def test_the_error_told_is_of_the_process_that_failed_not_of_one_that_waited_for_it(
    work, run, tmp_path
):
    with pytest.raises(RunError, match=r"^the second cannot read$"):
        run(work.second_fails)
    assert "the second cannot read" in (tmp_path / "model/torchrun.log").read_text()


def test_processes_that_end_without_a_word_are_told_with_the_end_of_the_log(work, run):
    with pytest.raises(RunError, match=r"2 processes ended with status 1; the end of .*torchrun"):
        run(work.is_killed)


def test_a_process_ends_with_the_one_that_started_it(work, tmp_path):
    job_file = tmp_path / "job.pickle"
    job_file.write_bytes(pickle.dumps((work.sleeps, {})))
    program = f"from wsi_pipeline.training.torchrun import process; process({str(job_file)!r})"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | {"RANK": "0"}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes) as process:
        assert process.stdout.readline() == "working\n"
        process.stdin.close()
        assert process.wait(timeout=30) == 1
