"""When the learning rate is halved and when training stops."""

import math
import sys
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau


class Schedule:
    """The lecture's schedule, and PatchNet's.

    The lecture's: *No improvement of the loss on validation data for 3 consecutive epochs: halve
    the learning rate. No improvement of the ROC AUC on validation data for 5 consecutive epochs:
    terminate.* PatchNet's (appendix C): no halving; training ends when the validation loss has not
    improved for 1000 epochs, or training accuracy has reached 100 %: ``halve_after=None,
    stop_after=1000, best_by="loss", stop_at_accuracy=1``.

    An epoch improves a measure if it beats every epoch before it; an equal value or NaN does
    not. The first epoch has nothing to beat and improves, NaN excepted. After a halving the
    count starts at zero, the best loss stays: with no improvement at all after epoch 1 the rate
    is halved at the ends of epochs 4, 7, 10, ...

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Its learning rate is halved in place.
    halve_after : int or None
        Consecutive epochs, 1 or more; None: never.
    stop_after : int
        Consecutive epochs, 1 or more.
    best_by : {"roc_auc", "loss"}
        The validation measure that tells the best epoch, and whose standstill ends training.
    stop_at_accuracy : float or None
        Training accuracy, 0 to 1, that ends training when an epoch reaches it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        halve_after: int | None = 3,
        stop_after: int = 5,
        best_by: Literal["roc_auc", "loss"] = "roc_auc",
        stop_at_accuracy: float | None = None,
    ):
        self._plateau = ReduceLROnPlateau(
            optimizer,
            factor=0.5,
            # torch acts at bad epoch patience + 1
            patience=sys.maxsize if halve_after is None else halve_after - 1,
            threshold=0,  # any improvement counts, however small
            eps=0,  # nor is a halving ever too small
        )
        self.stop_after = stop_after
        self.best_by = best_by
        self.stop_at_accuracy = math.inf if stop_at_accuracy is None else stop_at_accuracy
        self.best = -math.inf
        self.epochs_since_best = 0
        self.train_accuracy = 0.0

    def step(
        self, validation_loss: float, validation_roc_auc: float, train_accuracy: float = 0.0
    ) -> bool:
        """Take one epoch's measures; halve the learning rate if it is time.

        Returns
        -------
        bool
            Whether the measure of `best_by` improved: this epoch's model is the best so far.
        """
        self._plateau.step(validation_loss)
        measure = validation_roc_auc if self.best_by == "roc_auc" else -validation_loss
        improved = measure > self.best
        if improved:
            self.best = measure
        self.epochs_since_best = 0 if improved else self.epochs_since_best + 1
        self.train_accuracy = train_accuracy
        return improved

    @property
    def stopped(self) -> bool:
        """Whether training is over."""
        return (
            self.epochs_since_best >= self.stop_after
            or self.train_accuracy >= self.stop_at_accuracy
        )

    def state_dict(self) -> dict:
        """Return what `load_state_dict` needs; the learning rate itself is the optimizer's."""
        return {
            "plateau": self._plateau.state_dict(),
            "best": self.best,
            "epochs_since_best": self.epochs_since_best,
            "train_accuracy": self.train_accuracy,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`."""
        self._plateau.load_state_dict(state["plateau"])
        self.best = state["best"]
        self.epochs_since_best = state["epochs_since_best"]
        self.train_accuracy = state["train_accuracy"]
