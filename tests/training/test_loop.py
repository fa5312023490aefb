"""The loop against a plain one, its resuming to the bit, its files and its refusals."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wsi_pipeline.errors import RunError
from wsi_pipeline.models.inference import normalise
from wsi_pipeline.models.start import start_model
from wsi_pipeline.training import loop
from wsi_pipeline.training.augment import augment
from wsi_pipeline.training.loop import _steps, best_epoch, best_folder
from wsi_pipeline.training.state import TrainingState

SCRIPT = Path(__file__).with_name("tiny.py")
tiny = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
TIMES = ["seconds", "images_per_second", "validation_seconds"]


class Interrupted(Exception):
    pass


def interrupted_before(step):
    def train_batches(first_step, steps):
        for number, item in enumerate(tiny.train_batches(first_step, steps), first_step):
            if number == step:
                raise Interrupted
            yield item

    return train_batches


def assert_same_end(first, second):
    """Equal weights, bit for bit, and equal histories but for the times."""
    (module, history), (other_module, other_history) = first, second
    for name, value in module.state_dict().items():
        assert torch.equal(value, other_module.state_dict()[name]), name
    pd.testing.assert_frame_equal(
        history.drop(columns=TIMES), other_history.drop(columns=TIMES), check_exact=True
    )


@contextmanager
def killed_at_the_end_of(epoch):
    """When all but the state is written."""
    end_epoch = TrainingState.end_epoch

    def killed(state, row):
        if row["epoch"] == epoch:
            raise Interrupted
        end_epoch(state, row)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(TrainingState, "end_epoch", killed)
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return tiny.train(tmp_path_factory.mktemp("uninterrupted"))


def test_the_loop_is_a_plain_loop_with_the_lectures_settings(tmp_path):
    module, history = tiny.train(tmp_path, learning_rate=5e-5, max_epochs=2)

    plain = tiny.TinyNet()
    optimizer = torch.optim.RMSprop(plain.parameters(), lr=5e-5, alpha=0.9, momentum=0.9)
    losses, hits = [], []
    for step in range(8):
        images, labels, numbers = tiny.batch(range(8 * step, 8 * step + 8))
        p = plain(tiny.prepare(images, numbers)).sigmoid()
        loss = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        hits.append(((p > 0.5) == (labels == 1)).double().mean().item())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert history.train_loss.tolist() == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:])])
    assert history.train_accuracy.tolist() == [np.mean(hits[:4]), np.mean(hits[4:])]

    images, labels, _ = tiny.batch(tiny.VALIDATION)
    scores = plain(tiny.prepare(images, None)).sigmoid().detach().double().numpy()
    last = history.iloc[-1]
    assert last.validation_loss == pytest.approx(log_loss(labels, scores), rel=1e-5)
    assert last.validation_accuracy == accuracy_score(labels, scores > 0.5)
    assert last.validation_roc_auc == roc_auc_score(labels, scores)


def test_the_best_epoch_is_the_first_of_the_best():
    history = pd.DataFrame(
        {
            "epoch": [1, 2, 3, 4],
            "validation_loss": [0.6, 0.5, 0.5, 0.7],
            "validation_roc_auc": [0.6, 0.7, 0.8, 0.8],
        }
    )
    assert best_epoch(history, "loss")["epoch"] == 2
    assert best_epoch(history, "roc_auc")["epoch"] == 3


def test_adam_is_torchs_with_the_learning_rate_given(tmp_path):
    module, _ = tiny.train(tmp_path, optimizer="adam", learning_rate=1e-3, max_epochs=1)
    plain = tiny.TinyNet()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    for step in range(4):
        images, labels, numbers = tiny.batch(range(8 * step, 8 * step + 8))
        logits = plain(tiny.prepare(images, numbers))
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float()).backward()
        optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_training_stops_at_full_training_accuracy(tmp_path):
    def train_batches(first_step, steps):
        for _ in range(steps):
            images, labels, numbers = tiny.batch(range(8))
            yield images // 8 + (200 * labels).to(torch.uint8)[:, None, None, None], labels, numbers

    settings = {"learning_rate": 0.02, "stop_after": 200, "max_epochs": 200}
    _, history = tiny.train(tmp_path, train_batches=train_batches, stop_at_accuracy=1.0, **settings)
    assert history.train_accuracy.iloc[-1] == 1
    assert (history.train_accuracy.iloc[:-1] < 1).all()
    assert len(history) < 200


def test_a_batch_of_no_images_is_a_step_with_a_gradient_of_zero(tmp_path):
    lost = range(8, 16)  # all of the second of four steps
    module, history = tiny.train(
        tmp_path, train_batches=partial(tiny.train_batches, lost=lost), max_epochs=1
    )
    plain = tiny.TinyNet()
    optimizer = torch.optim.RMSprop(plain.parameters(), lr=0.003, alpha=0.9, momentum=0.9)
    losses, hits = [], []
    for step in range(4):
        optimizer.zero_grad()
        images, labels, numbers = tiny.batch(range(8 * step, 8 * step + 8))
        logits = plain(tiny.prepare(images, numbers))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
        if step == 1:
            (0 * loss).backward()
        else:
            loss.backward()
            losses.append(loss.item())
            hits.append(((logits > 0) == (labels == 1)).double().mean().item())
        optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert history.train_loss.tolist() == pytest.approx([np.mean(losses)])  # of three batches
    assert history.train_accuracy.tolist() == pytest.approx([np.mean(hits)])


def test_an_epoch_of_no_images_has_no_training_loss(tmp_path):
    lost = range(32)  # all of the first epoch
    _, history = tiny.train(
        tmp_path, train_batches=partial(tiny.train_batches, lost=lost), max_epochs=2
    )
    assert history.train_loss.isna().tolist() == [True, False]
    assert history.validation_loss.notna().all()


@pytest.mark.parametrize(
    "name, arguments",
    [("vgg16", {}), ("vgg11", {}), ("cam", {}), ("patchnet", {"patch_px": 27, "stride_px": 27})],
)
def test_each_architecture_takes_a_batch_of_no_images(name, arguments):
    module = start_model(name, "none", arguments=arguments)
    images = torch.empty(0, 3, 270, 270)
    module(images).sum().backward()
    assert not any(parameter.grad.any() for parameter in module.parameters())


class Dropping(tiny.TinyNet):
    def forward(self, images):
        return super().forward(torch.nn.functional.dropout(images, 0.3, self.training))


def test_dropout_is_the_same_after_an_interruption_and_leaves_the_generator(tmp_path):
    module, state = Dropping(), torch.get_rng_state()
    whole = tiny.train(tmp_path / "whole", module=module)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    with pytest.raises(Interrupted):
        tiny.train(
            tmp_path / "cut",
            module=Dropping(),
            train_batches=interrupted_before(6),
            checkpoint_seconds=1e-9,
        )
    assert_same_end(tiny.train(tmp_path / "cut", module=Dropping()), whole)
    other, _ = tiny.train(tmp_path / "other", module=Dropping(), seed=1)
    assert not torch.equal(other.head.weight, whole[0].head.weight)


def test_training_learns(tmp_path):
    _, history = tiny.train(tmp_path, max_epochs=12)
    assert history.validation_roc_auc.max() > 0.95
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0]


def test_the_history_file_is_the_frame_returned(tmp_path):
    _, history = tiny.train(tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "history.csv"), history)
    assert history.epoch.tolist() == [1, 2, 3, 4]
    assert set(history) == {
        "epoch",
        "train_loss",
        "train_accuracy",
        "validation_loss",
        "validation_accuracy",
        "validation_roc_auc",
        "learning_rate",
        *TIMES,
    }
    assert (history[TIMES] > 0).all(axis=None)


@pytest.mark.parametrize("checkpoint_seconds", [1e-9, 1e9])
@pytest.mark.parametrize("step", [0, 1, 4, 6, 15])
def test_an_interrupted_training_ends_the_same(tmp_path, uninterrupted, step, checkpoint_seconds):
    with pytest.raises(Interrupted):
        tiny.train(
            tmp_path,
            train_batches=interrupted_before(step),
            checkpoint_seconds=checkpoint_seconds,
        )
    asked = []

    def train_batches(first_step, steps):
        asked.append((first_step, steps))
        return tiny.train_batches(first_step, steps)

    assert_same_end(tiny.train(tmp_path, train_batches=train_batches), uninterrupted)
    resumed_at = step if checkpoint_seconds < 1 else step // 4 * 4
    assert asked[0] == (resumed_at, 4 - resumed_at % 4)


def test_an_interrupted_training_in_bfloat16_ends_the_same(tmp_path):
    expected = tiny.train(tmp_path / "whole", precision="bfloat16")
    options = {"precision": "bfloat16", "checkpoint_seconds": 1e-9}
    with pytest.raises(Interrupted):
        tiny.train(tmp_path / "parts", train_batches=interrupted_before(6), **options)
    assert_same_end(tiny.train(tmp_path / "parts", **options), expected)


def test_interrupted_while_the_best_model_is_saved(tmp_path, uninterrupted):
    def save_best(folder, module, row):
        raise Interrupted

    with pytest.raises(Interrupted):
        tiny.train(tmp_path, save_best=save_best, checkpoint_seconds=1e-9)
    assert_same_end(tiny.train(tmp_path), uninterrupted)


def test_a_killed_process_goes_on_to_the_same_end(tmp_path, uninterrupted):
    # Of a Dask nanny that another test began in this process, these stay in the environment.
    left = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in left}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    process = subprocess.Popen([sys.executable, SCRIPT, tmp_path, "0.2"], env=environment)
    state = tmp_path / "state.pt"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (state.exists() and len(saved_history(state)) == 1):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL  # it was still training
    assert 1 <= len(saved_history(state)) < tiny.EPOCHS
    assert_same_end(tiny.train(tmp_path), uninterrupted)


def saved_history(state):
    return torch.load(state, weights_only=True)["history"]


def test_a_finished_training_is_not_done_again(tmp_path):
    first = tiny.train(tmp_path)

    def train_batches(first_step, steps):
        raise AssertionError("asked for batches")

    second = tiny.train(tmp_path, train_batches=train_batches)
    assert_same_end(first, second)
    pd.testing.assert_frame_equal(first[1], second[1])


def test_more_epochs_go_on_from_the_end(tmp_path, uninterrupted):
    tiny.train(tmp_path, max_epochs=2)
    assert_same_end(tiny.train(tmp_path, max_epochs=4), uninterrupted)


def test_fewer_epochs_than_were_done_start_anew_and_say_so(tmp_path, caplog):
    expected = tiny.train(tmp_path / "short", max_epochs=2)
    tiny.train(tmp_path / "long", max_epochs=4)
    assert not caplog.records
    assert_same_end(tiny.train(tmp_path / "long", max_epochs=2), expected)
    assert "state.pt has 4 epochs, more than these settings train" in caplog.text


@pytest.mark.parametrize("stop_after, epochs", [(5, 6), (4, 5), (3, 4), (6, 7)])
def test_a_training_that_would_have_stopped_before_starts_anew(
    tmp_path, caplog, stop_after, epochs
):
    settings = {"learning_rate": 1e-30, "max_epochs": 100}  # epoch 1 stays the best
    _, history = tiny.train(tmp_path, **settings)
    assert len(history) == 6  # five after it
    _, history = tiny.train(tmp_path, **settings, stop_after=stop_after)
    assert len(history) == epochs
    assert ("training starts anew" in caplog.text) == (epochs < 6)


def test_a_training_that_had_reached_the_accuracy_before_starts_anew(tmp_path, caplog):
    _, whole = tiny.train(tmp_path)
    reached = whole.train_accuracy.iloc[0]
    _, history = tiny.train(tmp_path, stop_at_accuracy=reached)
    assert "training starts anew" in caplog.text
    assert history.train_accuracy.tolist() == [reached]


def test_other_settings_start_anew_and_say_so(tmp_path, uninterrupted, caplog):
    tiny.train(tmp_path, learning_rate=0.1, fingerprint="other", max_epochs=2)
    assert not caplog.records
    assert_same_end(tiny.train(tmp_path), uninterrupted)
    assert "state.pt is of other settings or data: training starts anew" in caplog.text


@pytest.fixture
def losses(monkeypatch):
    """Validation losses of the epochs from 1 on, by which the best are 1, 3; to be changed."""
    of_epochs = [0.6, 0.7, 0.5, 0.8]
    measures = loop._measures

    def scripted(logits, labels, where):
        loss = of_epochs[int(where.split()[-1]) - 1]
        return {**measures(logits, labels, where), "validation_loss": loss}

    monkeypatch.setattr(loop, "_measures", scripted)
    return of_epochs


@pytest.fixture
def best_after(tmp_path, losses):
    """Train by loss in one folder; give the epochs done and the only weights that are kept."""

    def train(**settings):
        _, history = tiny.train(tmp_path / "run", best_by="loss", **settings)
        (kept,) = (tmp_path / "run" / "best").iterdir()
        assert kept == best_folder(tmp_path / "run", history, "loss")
        assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == len(history)
        return len(history), torch.load(kept / tiny.WEIGHTS, weights_only=True)

    return train


def assert_weights_after(epochs, weights, folder):
    module, _ = tiny.train(folder, max_epochs=epochs)
    for name, value in module.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_a_shorter_training_that_was_killed_leaves_no_weights_to_a_longer_one(tmp_path, best_after):
    best_after()
    with killed_at_the_end_of(1):
        best_after(max_epochs=2)
    assert not (tmp_path / "run" / "state.pt").exists()
    epochs, weights = best_after()
    assert epochs == 4
    assert_weights_after(3, weights, tmp_path / "expected")


def test_an_epoch_that_was_killed_leaves_no_weights_to_a_shorter_training(tmp_path, best_after):
    with killed_at_the_end_of(3):
        best_after()
    assert (tmp_path / "run" / "best" / "3").is_dir()
    _, history = tiny.train(tmp_path / "run", best_by="loss", max_epochs=2)
    assert len(history) == len(pd.read_csv(tmp_path / "run" / "history.csv")) == 2
    best = best_folder(tmp_path / "run", history, "loss")
    weights = torch.load(best / tiny.WEIGHTS, weights_only=True)
    assert_weights_after(1, weights, tmp_path / "expected")


def test_an_epoch_that_does_not_improve_again_leaves_no_weights(tmp_path, best_after, losses):
    with killed_at_the_end_of(3):
        best_after()
    losses[2] = 0.9  # as a GPU may have it, a little off
    epochs, weights = best_after()
    assert epochs == 4
    assert_weights_after(1, weights, tmp_path / "expected")


def test_a_state_whose_best_weights_are_missing_is_refused(tmp_path):
    _, history = tiny.train(tmp_path, max_epochs=1)
    shutil.rmtree(best_folder(tmp_path, history, "roc_auc"))
    with pytest.raises(RunError, match=r"state\.pt: the weights of its best epoch are missing"):
        tiny.train(tmp_path)


def test_only_a_training_from_nothing_is_told_to_start(tmp_path):
    told = []
    settings = {"folder": tmp_path, "on_start": lambda: told.append("start")}
    for fingerprint, step, starts in [("a", 6, 1), ("a", 9, 1), ("b", 0, 2), ("a", 1, 3)]:
        with pytest.raises(Interrupted):
            tiny.train(**settings, fingerprint=fingerprint, train_batches=interrupted_before(step))
        assert len(told) == starts


@pytest.mark.parametrize("damage", [b"", b"not a state", "truncate"])
def test_a_damaged_state_is_refused(tmp_path, damage):
    tiny.train(tmp_path, max_epochs=1)
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:-100] if damage == "truncate" else damage)
    with pytest.raises(RunError, match=r"state\.pt: training cannot go on"):
        tiny.train(tmp_path)


def test_the_best_model_is_that_of_the_best_roc_auc(tmp_path):
    saved = []

    def save_best(folder, module, row):
        images, labels, _ = tiny.batch(tiny.VALIDATION)
        with torch.inference_mode():
            scores = module(tiny.prepare(images, None))
        assert row["validation_roc_auc"] == roc_auc_score(labels, scores)
        saved.append(row["epoch"])

    _, history = tiny.train(tmp_path, save_best=save_best, max_epochs=12, stop_after=12)
    aucs = history.validation_roc_auc.tolist()
    assert saved == [n + 1 for n, auc in enumerate(aucs) if all(auc > a for a in aucs[:n])]
    assert 1 < len(saved) < 12


def test_the_rate_is_halved_and_training_stopped_by_the_lectures_sentences(tmp_path):
    rate = 1e-30  # moves no float32 weight: loss and ROC AUC stay as they are after epoch 1
    _, history = tiny.train(tmp_path, learning_rate=rate, max_epochs=100)
    assert history.validation_loss.nunique() == 1
    assert history.learning_rate.tolist() == [rate] * 4 + [rate / 2] * 2


def test_the_schedule_outlives_an_interruption(tmp_path):
    rate = 1e-30
    tiny.train(tmp_path, learning_rate=rate, max_epochs=3)
    _, history = tiny.train(tmp_path, learning_rate=rate, max_epochs=100)
    assert history.learning_rate.tolist() == [rate] * 4 + [rate / 2] * 2


def scalars(folder, name):
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_has_each_epoch_once_also_when_epochs_are_repeated(tmp_path):
    with killed_at_the_end_of(3):
        tiny.train(tmp_path)
    time.sleep(1)  # event files are read in the order of the second in their names
    _, history = tiny.train(tmp_path)
    for name in set(history) - {"epoch"}:
        expected = list(zip(history.epoch, history[name].astype(np.float32), strict=True))
        assert scalars(tmp_path, name) == expected


def test_progress_is_told_after_each_step(tmp_path):
    told = []
    tiny.train(tmp_path, max_epochs=2, on_progress=told.append)
    assert [(item["epoch"], item["step"]) for item in told] == [
        (epoch, step) for epoch in (1, 2) for step in (1, 2, 3, 4)
    ]
    assert {(item["epochs"], item["steps"]) for item in told} == {(2, 4)}


def test_progress_has_the_mean_loss_so_far(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.fit.__globals__, "LOOK_SECONDS", 0.0)
    told = []
    _, history = tiny.train(tmp_path, max_epochs=2, on_progress=told.append)
    assert [told[3]["loss"], told[7]["loss"]] == history.train_loss.tolist()


def test_the_seconds_of_an_epoch_are_those_of_training_without_validation(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setitem(tiny.fit.__globals__, "time", clock)

    def train_batches(first_step, steps):
        for batch in tiny.train_batches(first_step, steps):
            clock.now += 3
            yield batch

    def validation_batches():
        clock.now += 100
        yield from tiny.validation_batches()

    _, history = tiny.train(
        tmp_path, train_batches=train_batches, validation_batches=validation_batches, max_epochs=2
    )
    assert history.seconds.tolist() == [12, 12]  # four steps
    assert history.validation_seconds.tolist() == [100, 100]
    assert history.images_per_second.tolist() == pytest.approx([32 / 12, 32 / 12])


def poisoned(step):
    def prepare(images, numbers):
        images = tiny.prepare(images, numbers)
        return images * torch.inf if numbers is not None and step * 8 in numbers else images

    return prepare


@pytest.mark.parametrize("checkpoint_seconds", [1e-9, 1e9])
def test_a_loss_that_is_not_finite_ends_training_and_keeps_the_last_state(
    tmp_path, uninterrupted, checkpoint_seconds
):
    with pytest.raises(RunError, match=r"loss is nan at epoch 2, step 3"):
        tiny.train(tmp_path, prepare=poisoned(6), checkpoint_seconds=checkpoint_seconds)
    assert_same_end(tiny.train(tmp_path), uninterrupted)


def test_a_network_that_breaks_on_the_validation_set_ends_training(tmp_path):
    def prepare(images, numbers):
        return tiny.prepare(images, numbers) * (torch.inf if numbers is None else 1)

    with pytest.raises(RunError, match=r"epoch 1: 21 of 21 validation outputs are not finite"):
        tiny.train(tmp_path, prepare=prepare)


@pytest.mark.parametrize(("numbers", "present"), [([1, 3, 5], r"\[1\]"), ([2, 4], r"\[0\]")])
def test_a_validation_set_of_one_label_is_refused(tmp_path, numbers, present):
    with pytest.raises(RunError, match=rf"labels {present}: it needs 0 and 1"):
        tiny.train(tmp_path, validation_batches=lambda: [tiny.batch(numbers)])


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_training_computes_in_its_precision_and_keeps_float32_weights(tmp_path, precision):
    module, history = tiny.train(tmp_path, precision=precision)
    assert module.dtype == getattr(torch, precision)
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    assert np.isfinite(history).all(axis=None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_a_gpu_agrees_with_the_cpu(tmp_path, uninterrupted):
    module, history = tiny.train(tmp_path, device="cuda")
    assert history.validation_loss.tolist() == pytest.approx(
        uninterrupted[1].validation_loss.tolist(), rel=1e-3
    )
    assert next(module.parameters()).is_cuda


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_does_not_wait_for_the_gpu():
    """torch raises where it would wait."""

    def prepare(images, numbers):
        colours = {"brightness": 0.25, "contrast": 0.25, "saturation": 0.25, "hue": 0.04}
        images = augment(images, numbers, seed=0, flips=True, **colours)
        return normalise(images, [0.5] * 3, [0.2] * 3)

    module = tiny.TinyNet().cuda()
    images, labels, numbers = tiny.batch(range(8))
    batch = images.pin_memory(), labels.pin_memory(), numbers
    optimizer = torch.optim.RMSprop(module.parameters(), momentum=0.9)
    steps = _steps(module, optimizer, [batch] * 3, prepare, torch.device("cuda"), "bfloat16")
    next(steps)  # sets up what stays
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(steps)) == 2
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Normalised(tiny.TinyNet):
    """Batch normalisation and dropout before the head."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Sequential(
            self.conv, torch.nn.BatchNorm2d(4), torch.nn.Dropout(), torch.nn.BatchNorm2d(4)
        )


def test_frozen_parts_keep_weights_and_statistics_to_the_bit_and_are_resumed(tmp_path):
    def frozen():
        module = Normalised()
        module.requires_grad_(False)
        module.head.requires_grad_(True)
        return module

    before = {name: value.clone() for name, value in frozen().state_dict().items()}
    whole = tiny.train(tmp_path / "whole", frozen())
    after = whole[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    with pytest.raises(Interrupted):
        tiny.train(
            tmp_path / "parts", frozen(), train_batches=interrupted_before(6), checkpoint_seconds=0
        )
    assert_same_end(tiny.train(tmp_path / "parts", frozen()), whole)


class Attentive(Normalised):
    """It reshapes its input as networks with attention do, which no image at all cannot be."""

    def forward(self, images):
        return super().forward(images.reshape(len(images), 3, -1, 8))


def test_a_network_that_cannot_take_no_images_takes_an_empty_batch(tmp_path):
    lost = range(8, 16)  # all of the second of four steps
    module, history = tiny.train(
        tmp_path, Attentive(), train_batches=partial(tiny.train_batches, lost=lost), max_epochs=1
    )
    assert int(module.conv[1].num_batches_tracked) == tiny.STEPS - 1
    assert history.train_loss.notna().all()


def test_parts_that_are_not_frozen_train(tmp_path):
    module, _ = tiny.train(tmp_path, Normalised())
    assert int(module.conv[1].num_batches_tracked) == tiny.STEPS * tiny.EPOCHS
