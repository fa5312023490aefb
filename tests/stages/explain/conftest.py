"""What tests of explanations share."""

import pytest
from distributed import Client
from explain_run import write_run


@pytest.fixture(scope="module")
def client():
    """In this process: what is tested here is not Dask."""
    options = {"processes": False, "n_workers": 1, "threads_per_worker": 1}
    with Client(**options, dashboard_address=None, silence_logs=50) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def in_one_thread(one_thread):
    """All tests of this folder."""


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path)
