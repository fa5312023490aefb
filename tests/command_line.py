"""The command line in processes of its own, for tests."""

import subprocess
import sys
import time

import pytest

WSI = (sys.executable, "-c", "from wsi_pipeline.cli import main; main()")


def wsi(*arguments, check=True):
    """Run the command line in a process of its own."""
    done = subprocess.run([*WSI, *map(str, arguments)], capture_output=True, text=True)
    if check and done.returncode:
        pytest.fail(f"wsi {arguments} left with {done.returncode}:\n{done.stderr}")
    return done


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"{condition} did not come true in {seconds} s")
        time.sleep(0.05)
