"""Fixtures shared by all tests."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest

# Helper modules of the tests, such as slide_files.
sys.path.insert(0, str(Path(__file__).parent))

# No test depends on how busy the machine is.
hypothesis.settings.register_profile("any_machine", deadline=None)
hypothesis.settings.load_profile("any_machine")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real slides, annotations and tiles; tests on them skip without it."""
    folder = os.environ.get("WSI_TEST_DATA")
    if not folder:
        pytest.skip("WSI_TEST_DATA is not set: no real slides to test on")
    return Path(folder)


@pytest.fixture(scope="module")
def one_thread():
    """Many small operations of torch: on a busy machine, threads would wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
