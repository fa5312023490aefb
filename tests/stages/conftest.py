"""What tests of stages share."""

import pytest
from distributed import Client


@pytest.fixture(scope="module")
def client():
    """Client of one worker with one thread in this process: what is tested here is not Dask."""
    options = {"processes": False, "n_workers": 1, "threads_per_worker": 1, "silence_logs": 50}
    with Client(**options, dashboard_address="127.0.0.1:0") as client:
        yield client
