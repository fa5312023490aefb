"""The training loop: one process or several, resumable to the bit."""

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.tensorboard import SummaryWriter

from wsi_pipeline.errors import RunError
from wsi_pipeline.files import replace_atomically
from wsi_pipeline.models.inference import in_channels_last
from wsi_pipeline.models.precision import computing_in
from wsi_pipeline.seeds import derived_seed
from wsi_pipeline.training.dataset import Batch
from wsi_pipeline.training.processes import (
    gather,
    is_first,
    mean_over_processes,
    parallel,
    process_count,
    rank,
)
from wsi_pipeline.training.recipe import Feed, Recipe
from wsi_pipeline.training.schedule import Schedule
from wsi_pipeline.training.state import TrainingState

LOOK_SECONDS = 1.0
"""How often the loss is fetched within an epoch: each time the host waits for the device."""

log = logging.getLogger(__name__)


def fit(
    module: nn.Module,
    recipe: Recipe,
    feed: Feed,
    *,
    folder: str | Path,
    fingerprint: str,
    save_best: Callable[[Path, nn.Module, dict], object],
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint_seconds: float = 300.0,
    on_start: Callable[[], None] | None = None,
    on_progress: Callable[[dict], None] | None = None,
) -> pd.DataFrame:
    """Train a binary classifier by the lecture's recipe (Lecture, VGG16), or PatchNet's.

    Binary cross-entropy on logits, RMSprop or Adam, and `Schedule`'s halving and stopping; the
    defaults are the lecture's. `folder` receives ``history.csv``, TensorBoard events and
    ``state.pt``, from which a later call with the same `folder` and `fingerprint` goes on: on a CPU
    with the same number of threads it ends with the same weights, bit for bit, as one never
    interrupted. ``best/EPOCH/`` is for `save_best`; see `best_folder`.

    Under an initialised process group (`distributed`) every process calls `fit` with its share
    of each batch and of the validation set; gradients and losses are means over the images of
    the whole batch, and only the first one writes. The result is that of one process with the
    whole batch, up to rounding and what the module draws at random, also where shares differ in
    size or are empty. A batch that is empty in all processes is a step with a gradient of zero, and
    left out of the epoch's means.

    Parameters
    ----------
    module : nn.Module
        Images (N, 3, P, P) to logits (N,). Trained in place: afterwards it holds the last
        epoch's weights, not the best. What it draws at random (dropout) comes from torch's global
        generators, which are seeded for each step and given back as they were.
    recipe : Recipe
    feed : Feed
    folder : path-like
        Made when missing.
    fingerprint : str
        Of all that the weights depend on but the recipe's `max_epochs`, `stop_after` and
        `stop_at_accuracy`. A state with another one is not resumed, nor one of more epochs than
        those three allow: it is deleted, training starts anew, and the log says so.
    save_best : callable
        ``(folder, module, row)``, called in the first process when the recipe's `best_by`
        improves, with a folder for this epoch alone and the epoch's row of the history.
    seed : int
        Of what the module draws at random.
    device : torch.device or str
    checkpoint_seconds : float
        How often the state is saved within an epoch; at its end it always is.
    on_start : callable, optional
        ``()``, called in the first process, before any asks for a batch, when training starts from
        nothing: to remove what an earlier one left.
    on_progress : callable, optional
        After each step: ``epoch`` (from 1), ``epochs``, ``step`` (done in this epoch), ``steps``,
        ``loss`` (the epoch's mean, as last fetched; NaN in its first second).

    Returns
    -------
    pandas.DataFrame
        ``history.csv``, a row an epoch: ``epoch`` (from 1), ``train_loss`` and ``train_accuracy``
        (means of the batches', each before its step; NaN if all were empty),
        ``validation_loss``, ``validation_accuracy``, ``validation_roc_auc``, ``learning_rate``
        (of this epoch), ``seconds`` and ``images_per_second`` (of training alone, all processes
        together), ``validation_seconds``. Accuracies are at a probability of 1/2.

    Raises
    ------
    RunError
        If a loss is not finite (the last state saved stays), the validation set lacks one of
        the labels, the state cannot be read, or the best weights until then are missing.
    """
    folder, device = Path(folder), torch.device(device)
    prepare, steps_per_epoch, best_by = feed.prepare, feed.steps_per_epoch, recipe.best_by
    folder.mkdir(parents=True, exist_ok=True)
    in_channels_last(module, device)
    descent = recipe.optimizer_of(module)
    schedule_for = partial(
        Schedule,
        halve_after=recipe.halve_after,
        stop_after=recipe.stop_after,
        best_by=recipe.best_by,
        stop_at_accuracy=recipe.stop_at_accuracy,
    )
    schedule = schedule_for(descent)
    state = TrainingState(
        folder / "state.pt", fingerprint, module, descent, schedule, steps_per_epoch
    )
    replayed = schedule_for(torch.optim.SGD([torch.zeros(1)]))
    resumed = state.load(
        too_long=partial(_too_long, max_epochs=recipe.max_epochs, schedule=replayed)
    )
    if state.epoch and not best_folder(folder, pd.DataFrame(state.history), best_by).is_dir():
        raise RunError(
            f"{folder / 'state.pt'}: the weights of its best epoch are missing from"
            f" {folder / 'best'}. Delete the file to start anew"
        )
    if is_first():  # before `parallel`, where the other processes wait
        if not resumed:
            shutil.rmtree(folder / "best", ignore_errors=True)
            if on_start:
                on_start()
        _write_history(state.history, folder)  # less an epoch that will be repeated
    shared = parallel(module, device)
    with (
        _event_writer(folder, first_epoch=state.epoch + 1) as events,
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        while state.epoch < recipe.max_epochs and not schedule.stopped:
            epoch, rate = state.epoch + 1, descent.param_groups[0]["lr"]
            started = time.monotonic() - state.seconds
            look, checkpoint, seen_loss = _Timer(LOOK_SECONDS), _Timer(checkpoint_seconds), math.nan
            first_step = state.epoch * steps_per_epoch + state.step
            batches = feed.train_batches(first_step, steps_per_epoch - state.step)
            batches = _seeded(batches, seed, first_step)
            for measures in _steps(shared, descent, batches, prepare, device, recipe.precision):
                state.add_step(measures)
                if look.due():
                    seen_loss, _ = state.means()
                if checkpoint.due():
                    state.save(seconds=time.monotonic() - started)
                if on_progress:
                    on_progress(
                        {
                            "epoch": epoch,
                            "epochs": recipe.max_epochs,
                            "step": state.step,
                            "steps": steps_per_epoch,
                            "loss": seen_loss,
                        }
                    )
            train_loss, train_accuracy = state.means()  # waits for the device: the clock is right
            trained = time.monotonic()
            logits, labels = _predict(
                module, feed.validation_batches(), prepare, device, recipe.precision
            )
            validation = _measures(logits, labels, f"{folder}, epoch {epoch}")
            validated = time.monotonic()
            improved = schedule.step(
                validation["validation_loss"], validation["validation_roc_auc"], train_accuracy
            )
            row = {
                "epoch": epoch,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                **validation,
                "learning_rate": rate,
                "seconds": trained - started,
                "images_per_second": state.images() / (trained - started),
                "validation_seconds": validated - trained,
            }
            if is_first():
                if improved:
                    best = folder / "best" / str(epoch)
                    best.mkdir(parents=True, exist_ok=True)
                    save_best(best, module, row)
                _write_history([*state.history, row], folder)
                _add_events(row, events)
            state.end_epoch(row)  # if killed before, all above is repeated
            if is_first():  # only now: what the state goes on from is there at any time
                _remove_all_but(best_folder(folder, pd.DataFrame(state.history), best_by))
    return pd.DataFrame(state.history)


def best_epoch(history: pd.DataFrame, best_by: Literal["roc_auc", "loss"]) -> pd.Series:
    """The row of the epoch whose weights `fit` kept: the first of the best."""
    if best_by == "roc_auc":
        return history.loc[history["validation_roc_auc"].idxmax()]
    return history.loc[history["validation_loss"].idxmin()]


def best_folder(
    folder: str | Path, history: pd.DataFrame, best_by: Literal["roc_auc", "loss"]
) -> Path:
    """What `save_best` wrote to in the best epoch of a training in `folder`: no other epoch does.

    One that was killed at its end, is repeated and may not improve again, writes to its own.
    """
    return Path(folder) / "best" / str(int(best_epoch(history, best_by)["epoch"]))


def _remove_all_but(best: Path) -> None:
    for other in best.parent.iterdir():
        if other != best:
            shutil.rmtree(other)


def _too_long(history: list[dict], *, max_epochs: int, schedule: Schedule) -> bool:
    """Whether training would have ended before the history does; `schedule` is at its start."""
    for row in history[:-1]:
        schedule.step(row["validation_loss"], row["validation_roc_auc"], row["train_accuracy"])
        if schedule.stopped:
            return True
    return len(history) > max_epochs


class _Timer:
    """Due each time that so many seconds have passed."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._last = time.monotonic()

    def due(self) -> bool:
        if time.monotonic() - self._last < self._seconds:
            return False
        self._last = time.monotonic()
        return True


def _seeded(batches: Iterable[Batch], seed: int, first_step: int) -> Iterator[Batch]:
    """Seed torch for each step, so that dropout is the same in a training that was resumed."""
    for step, batch in enumerate(batches, first_step):
        torch.manual_seed(derived_seed(seed, f"step {step} of process {rank()}"))
        yield batch


def _steps(module, optimizer, batches, prepare, device, precision):
    """Optimise once for each batch; yield `TrainingState.add_step`'s measures of it."""
    _train_mode(module)
    for images, labels, numbers in batches:
        images, labels = (_to(device, tensor) for tensor in (images, labels))
        logits = _logits(module, prepare(images, numbers), precision)
        losses = binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        hits = ((logits > 0) == (labels > 0)).float()
        # Of an empty share the sum: zero, and a backward pass that the other processes wait for.
        loss, accuracy = (of.mean() if len(labels) else of.sum() for of in (losses, hits))
        count = torch.full((), float(len(labels)), device=device)
        weight = count / mean_over_processes(count.clone())  # 0 / 0 where all shares are empty
        optimizer.zero_grad()
        (loss * weight.nan_to_num()).backward()
        optimizer.step()
        measures = [loss.detach() * weight, accuracy * weight, count * process_count()]
        yield mean_over_processes(torch.stack(measures))


def _train_mode(module) -> None:
    """Training mode, but of parts that are frozen: their statistics stay, and nothing drops out."""
    module.train()
    for part in module.modules():
        weights = list(part.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            part.eval()


def _predict(module, batches, prepare, device, precision) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of the validation set, float64: all processes' shares together."""
    module.eval()
    logits, labels = [torch.empty(0, device=device)], [torch.empty(0)]
    with torch.inference_mode():
        for images, of_batch, _ in batches:
            logits.append(_logits(module, prepare(_to(device, images), None), precision))
            labels.append(of_batch)
        # At the end: to fetch logits is to wait for the device.
        columns = np.stack([torch.cat(logits).cpu(), torch.cat(labels)]).astype(np.float64)
    logits, labels = np.concatenate(gather([columns]), axis=1)
    return logits, labels


def _logits(module, images, precision) -> torch.Tensor:
    """Logits of a batch, which may be empty: networks with attention cannot take that as it is."""
    if len(images):
        return _forward(module, images, precision)
    training = module.training
    module.eval()  # so that statistics of batches do not see the image in its place
    logits = _forward(module, images.new_zeros(1, *images.shape[1:]), precision)[:0]
    if training:
        _train_mode(module)
    return logits


def _forward(module, images, precision) -> torch.Tensor:
    images = images.contiguous(memory_format=torch.channels_last)
    with computing_in(precision, images.device):
        return module(images).float()


def _measures(logits, labels, where) -> dict[str, float]:
    """Binary cross-entropy, accuracy and ROC AUC of the validation set."""
    present = np.unique(labels).astype(int).tolist()
    if present != [0, 1]:
        raise RunError(f"{where}: the validation set has the labels {present}: it needs 0 and 1")
    if not np.isfinite(logits).all():
        raise RunError(
            f"{where}: {np.sum(~np.isfinite(logits))} of {len(logits)} validation outputs are not"
            " finite; try a lower learning rate. The last state saved is kept"
        )
    loss = binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(labels))
    return {
        "validation_loss": loss.item(),
        "validation_accuracy": float(np.mean((logits > 0) == (labels > 0))),
        "validation_roc_auc": float(roc_auc_score(labels, logits)),
    }


def _event_writer(folder: Path, first_epoch: int) -> AbstractContextManager:
    if not is_first():
        return nullcontext()
    return SummaryWriter(folder / "tensorboard", purge_step=first_epoch)


def _write_history(history: list[dict], folder: Path) -> None:
    if not history:
        (folder / "history.csv").unlink(missing_ok=True)
        return
    with replace_atomically(folder / "history.csv") as part:
        pd.DataFrame(history).to_csv(part, index=False)


def _add_events(row: dict, events: SummaryWriter) -> None:
    for name, value in row.items():
        if name != "epoch":
            events.add_scalar(name, value, row["epoch"])
    events.flush()


def _to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(device, non_blocking=True)
