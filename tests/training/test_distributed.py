"""Two processes under torchrun against one with the same global batches."""

import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).with_name("tiny.py")
tiny = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def train_by_two(folder, *arguments):
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, folder]
    subprocess.run([sys.executable, "-m", *command, *arguments], check=True, timeout=300)
    return folder


def ends_in(folder):
    return [torch.load(folder / f"end{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a training by two processes, which both leave a state of other settings there."""
    folder, other = (tmp_path_factory.mktemp(name) for name in ("two", "other"))
    tiny.train(other, fingerprint="other", max_epochs=1)
    shutil.copyfile(other / "state.pt", folder / "state.pt")
    return train_by_two(folder)


@pytest.fixture(scope="module")
def ends(folder):
    return ends_in(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return tiny.train(tmp_path_factory.mktemp("alone"))


def test_two_processes_end_with_the_weights_of_one(ends, alone):
    weights = alone[0].state_dict()
    for end in ends:
        for name, value in end["module"].items():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6)
    start = tiny.TinyNet().state_dict()
    assert max((weights[name] - start[name]).abs().max() for name in start) > 1e-2  # it has moved


def test_both_processes_end_with_equal_weights_and_measures(ends):
    first, second = ends
    for name, value in first["module"].items():
        assert torch.equal(value, second["module"][name])
    for name in ("train_loss", "validation_loss", "validation_roc_auc", "learning_rate"):
        assert first["history"][name] == second["history"][name]


def test_the_history_is_that_of_one_process(ends, alone):
    history = ends[0]["history"]
    for name in ("epoch", "train_loss", "validation_loss", "validation_roc_auc", "learning_rate"):
        assert history[name] == pytest.approx(alone[1][name].tolist(), abs=1e-6), name


def test_one_set_of_files_is_written(folder):
    assert len(list((folder / "tensorboard").iterdir())) == 1
    names = {path.name for path in folder.iterdir()} - {"end0.pt", "end1.pt"}
    assert names == {"history.csv", "state.pt", "best", "tensorboard"}


def test_one_process_goes_on_where_two_left_off(folder, tmp_path):
    module, history = tiny.train(folder, max_epochs=tiny.EPOCHS + 1)
    expected, expected_history = tiny.train(tmp_path, max_epochs=tiny.EPOCHS + 1)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=0, atol=1e-6)
    assert history.validation_loss.tolist() == pytest.approx(
        expected_history.validation_loss.tolist(), abs=1e-6
    )


def test_shares_that_are_short_or_empty_end_with_the_weights_of_one(tmp_path):
    """Of a step of 8 numbers, the first process has the even ones and the second the odd ones."""
    of_one = [17, 19, 21, 23]  # all that the second has of step 2
    of_both = range(40, 48)  # step 5
    some = [56, 58, 61]  # of step 7: two of one, one of the other
    last = [105, 107, 111]  # of step 13: three of the second's
    lost = [*of_one, *of_both, *some, *last]
    two = ends_in(train_by_two(tmp_path / "two", "0", *map(str, lost)))
    module, history = tiny.train(
        tmp_path / "one", train_batches=partial(tiny.train_batches, lost=lost)
    )
    for name, value in module.state_dict().items():
        assert torch.equal(two[0]["module"][name], two[1]["module"][name]), name
        torch.testing.assert_close(two[0]["module"][name], value, rtol=0, atol=1e-6)
    for name in ("train_loss", "train_accuracy", "validation_loss"):
        for end in two:
            assert end["history"][name] == pytest.approx(history[name].tolist(), abs=1e-6), name
    state = torch.load(tmp_path / "two" / "state.pt", weights_only=True)
    assert state["measures"][:, 2].tolist() == [8, 5, 8, 8]  # images of the last epoch's steps
