"""How far a training has come, kept in a file from which it goes on to the same end."""

import logging
from collections.abc import Callable
from pickle import UnpicklingError

import torch

from wsi_pipeline.errors import RunError
from wsi_pipeline.files import replace_atomically
from wsi_pipeline.training.processes import gather, is_first

log = logging.getLogger(__name__)


class TrainingState:
    """Epochs, steps, weights and all else that training goes on from.

    Parameters
    ----------
    path : Path
        The file.
    fingerprint : str
        Of all that the weights depend on.
    module, optimizer, schedule
        Whose state is saved and loaded.
    steps_per_epoch : int

    Attributes
    ----------
    history : list of dict
        A row for each epoch done.
    step : int
        Steps done in this epoch.
    seconds : float
        Gone by in this epoch before the state was loaded.

    The measures of the epoch's steps stay on the device: to fetch one is to wait for it.
    """

    def __init__(self, path, fingerprint, module, optimizer, schedule, steps_per_epoch):
        self._path = path
        self._fingerprint = fingerprint
        self._parts = {"module": module, "optimizer": optimizer, "schedule": schedule}
        device = next(module.parameters()).device
        self._measures = torch.zeros(steps_per_epoch, 3, device=device)
        self.history = []
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.step, self.seconds = 0, 0.0

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    def add_step(self, measures: torch.Tensor) -> None:
        """Count a step: its loss, accuracy and images, of all processes; shape (3,), on the device.

        Loss and accuracy of a step without images are NaN, and left out of the means.
        """
        self._measures[self.step] = measures
        self.step += 1

    def images(self) -> int:
        """How many images the epoch's steps had so far."""
        return int(self._measures[: self.step, 2].double().sum())

    def means(self) -> tuple[float, float]:
        """Loss and accuracy over the epoch's steps so far; RunError if a loss is not finite.

        NaN where no step had images.
        """
        measures = self._measures[: self.step].double().cpu()
        empty = measures[:, 2] == 0
        finite = measures[:, 0].isfinite() | empty
        if not finite.all():
            step = int((~finite).nonzero()[0])
            raise RunError(
                f"{self._path}: the training loss is {measures[step, 0]:g} at epoch"
                f" {self.epoch + 1}, step {step + 1}: it must be finite; try a lower learning rate."
                " The last state saved is kept"
            )
        return tuple(measures[~empty, :2].mean(dim=0).tolist())

    def end_epoch(self, row: dict) -> None:
        """Add the epoch's row to the history and save."""
        self.history.append(row)
        self._start_epoch()
        self.save(seconds=0.0)

    def save(self, seconds: float) -> None:
        """Replace the file, in the first process; `seconds` of this epoch have gone by."""
        if not is_first():
            return
        self.means()  # nothing past a loss that is not finite is saved
        state = {
            "fingerprint": self._fingerprint,
            "history": self.history,
            "step": self.step,
            "seconds": seconds,
            "measures": self._measures,
            **{name: part.state_dict() for name, part in self._parts.items()},
        }
        with replace_atomically(self._path) as part:
            torch.save(state, part)

    def load(self, too_long: Callable[[list[dict]], bool]) -> bool:
        """Take over the file's state, if there is one with our fingerprint; whether it was.

        Not if its history is `too_long`: of a training that should have ended before. A state that
        is not taken over is deleted: what training keeps beside it will be of another.
        """
        if not self._path.exists():
            return False
        try:
            state = torch.load(self._path, map_location="cpu", weights_only=True)
            unfit = self._unfit(state, too_long)
            if not unfit:
                for name, part in self._parts.items():
                    part.load_state_dict(state[name])
                self._measures.copy_(state["measures"])
        except (OSError, EOFError, KeyError, RuntimeError, ValueError, UnpicklingError) as error:
            raise RunError(
                f"{self._path}: training cannot go on from this file: {error}."
                " Delete it to start anew"
            ) from error
        if unfit:
            log.warning("%s %s: training starts anew", self._path, unfit)
            gather([])  # every process has read the file
            if is_first():
                self._path.unlink()
            return False
        self.history = state["history"]
        self.step, self.seconds = state["step"], state["seconds"]
        return True

    def _unfit(self, state: dict, too_long: Callable[[list[dict]], bool]) -> str | None:
        """Why training does not go on from a state."""
        if state["fingerprint"] != self._fingerprint:
            return "is of other settings or data"
        if too_long(state["history"]):
            return f"has {len(state['history'])} epochs, more than these settings train"
        return None
