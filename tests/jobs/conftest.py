"""A Dask scheduler and its workers, started apart from the tests' process."""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@contextmanager
def dask_process(*arguments, path=TESTS):
    """A process of Dask's command line, in the folder `path` and able to import from it.

    It imports the rest from where this process does.
    """
    importable = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=path,
        env={**os.environ, "PYTHONPATH": importable},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def start_scheduler(tmp_path):
    """Function that starts a scheduler and workers: address, scheduler process, workers."""
    with ExitStack() as stack:

        def start(workers: int, **options):
            file = tmp_path / "scheduler.json"
            place = ("--host", "127.0.0.1", "--scheduler-file", str(file))
            place += ("--no-dashboard", "--dashboard-address", "127.0.0.1:0")
            scheduler = stack.enter_context(
                dask_process("distributed.cli.dask_scheduler", "--port", "0", *place)
            )
            command = ("distributed.cli.dask_worker", "--scheduler-file", str(file))
            command += ("--nthreads", "1", "--no-dashboard")
            while not file.exists():
                time.sleep(0.05)
            started = [
                stack.enter_context(dask_process(*command, **options)) for _ in range(workers)
            ]
            return json.loads(file.read_text())["address"], scheduler, started

        yield start
