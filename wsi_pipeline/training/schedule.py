"""When the learning rate is halved and when training stops: two sentences of the lecture."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau


class Schedule:
    """The lecture's schedule (Lecture, VGG16).

    *No improvement of the loss on validation data for 3 consecutive epochs: halve the learning
    rate. No improvement of the ROC AUC on validation data for 5 consecutive epochs: terminate.*

    An epoch improves a measure if it beats every epoch before it; an equal value or NaN does
    not. The first epoch has nothing to beat and improves, NaN excepted. After a halving the
    count starts at zero, the best loss stays: with no improvement at all after epoch 1 the rate
    is halved at the ends of epochs 4, 7, 10, ...

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Its learning rate is halved in place.
    halve_after, stop_after : int
        Consecutive epochs, 1 or more.
    """

    def __init__(self, optimizer: Optimizer, *, halve_after: int = 3, stop_after: int = 5):
        self._plateau = ReduceLROnPlateau(
            optimizer,
            factor=0.5,
            patience=halve_after - 1,  # torch acts at bad epoch patience + 1
            threshold=0,  # any improvement counts, however small
            eps=0,  # nor is a halving ever too small
        )
        self.stop_after = stop_after
        self.best_roc_auc = -math.inf
        self.epochs_since_best = 0

    def step(self, validation_loss: float, validation_roc_auc: float) -> bool:
        """Take one epoch's measures; halve the learning rate if it is time.

        Returns
        -------
        bool
            Whether the ROC AUC improved: this epoch's model is the best so far.
        """
        self._plateau.step(validation_loss)
        improved = validation_roc_auc > self.best_roc_auc
        if improved:
            self.best_roc_auc = validation_roc_auc
        self.epochs_since_best = 0 if improved else self.epochs_since_best + 1
        return improved

    @property
    def stopped(self) -> bool:
        """Whether training is over."""
        return self.epochs_since_best >= self.stop_after

    def state_dict(self) -> dict:
        """Return what `load_state_dict` needs; the learning rate itself is the optimizer's."""
        return {
            "plateau": self._plateau.state_dict(),
            "best_roc_auc": self.best_roc_auc,
            "epochs_since_best": self.epochs_since_best,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`."""
        self._plateau.load_state_dict(state["plateau"])
        self.best_roc_auc = state["best_roc_auc"]
        self.epochs_since_best = state["epochs_since_best"]
