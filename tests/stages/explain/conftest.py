"""What tests of explanations share."""

import pytest
from explain_run import write_run


@pytest.fixture(scope="module", autouse=True)
def in_one_thread(one_thread):
    """All tests of this folder."""


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path)
