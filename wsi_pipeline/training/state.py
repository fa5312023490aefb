"""How far a training has come, kept in a file from which it goes on to the same end."""

import logging
from collections.abc import Callable
from pickle import UnpicklingError

import torch

from wsi_pipeline.errors import RunError
from wsi_pipeline.files import replace_atomically
from wsi_pipeline.training.processes import is_first

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
    step, images : int
        Done in this epoch.
    seconds : float
        Gone by in this epoch before the state was loaded.

    The epoch's losses and accuracies stay on the device, a pair for each step: to fetch one is to
    wait for it. Those of a step without images are NaN and are left out.
    """

    def __init__(self, path, fingerprint, module, optimizer, schedule, steps_per_epoch):
        self._path = path
        self._fingerprint = fingerprint
        self._parts = {"module": module, "optimizer": optimizer, "schedule": schedule}
        device = next(module.parameters()).device
        self._measures = torch.zeros(steps_per_epoch, 2, device=device)
        self.history = []
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.step, self.images, self.seconds = 0, 0, 0.0

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    def add_step(self, measures: torch.Tensor, images: int) -> None:
        """Count a step: its loss and accuracy, on the device, and its images."""
        self._measures[self.step] = measures
        self.step += 1
        self.images += images

    def means(self) -> tuple[float, float]:
        """Loss and accuracy over the epoch's steps so far; RunError if a loss is not finite.

        NaN where no step had images.
        """
        measures = self._measures[: self.step].double().cpu()
        empty = measures[:, 1].isnan()  # any output is right or wrong, a NaN too
        finite = measures[:, 0].isfinite() | empty
        if not finite.all():
            step = int((~finite).nonzero()[0])
            raise RunError(
                f"{self._path}: the training loss is {measures[step, 0]:g} at epoch"
                f" {self.epoch + 1}, step {step + 1}: it must be finite; try a lower learning rate."
                " The last state saved is kept"
            )
        return tuple(measures[~empty].mean(dim=0).tolist())

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
            "images": self.images,
            "seconds": seconds,
            "measures": self._measures,
            **{name: part.state_dict() for name, part in self._parts.items()},
        }
        with replace_atomically(self._path) as part:
            torch.save(state, part)

    def load(self, too_long: Callable[[list[dict]], bool]) -> None:
        """Take over the file's state, if there is one with our fingerprint.

        Not if its history is `too_long`: of a training that should have ended before.
        """
        if not self._path.exists():
            return
        try:
            state = torch.load(self._path, map_location="cpu", weights_only=True)
            if state["fingerprint"] != self._fingerprint:
                log.warning("%s is of other settings or data: training starts anew", self._path)
                return
            if too_long(state["history"]):
                log.warning(
                    "%s has %d epochs, more than these settings train: training starts anew",
                    self._path,
                    len(state["history"]),
                )
                return
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
            self._measures.copy_(state["measures"])
        except (OSError, EOFError, KeyError, RuntimeError, ValueError, UnpicklingError) as error:
            raise RunError(
                f"{self._path}: training cannot go on from this file: {error}."
                " Delete it to start anew"
            ) from error
        self.history, self.step = state["history"], state["step"]
        self.images, self.seconds = state["images"], state["seconds"]
