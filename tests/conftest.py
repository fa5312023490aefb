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

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each core has a process of tests: with more threads, they would wait for each other.
    import torch

    torch.set_num_threads(1)

LONGEST = ("test_pipeline.py", "test_real_slides.py")


def pytest_collection_modifyitems(items):
    """Begin with the longest modules: at the end, all other processes would wait for them."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


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
