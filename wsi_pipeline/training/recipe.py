"""How a model is trained, and what it is trained on: the two values that `fit` takes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from wsi_pipeline.models.precision import Precision
from wsi_pipeline.training.dataset import Batch


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The optimiser, its schedule and the precision; the defaults are the lecture's.

    Parameters
    ----------
    max_epochs : int
    optimizer : {"rmsprop", "adam"}
    learning_rate : float
    alpha, momentum : float
        RMSprop's; alpha is the lecture's forgetting rho.
    halve_after, stop_after, best_by, stop_at_accuracy
        See `Schedule`.
    precision : {"float32", "bfloat16"}
        Of the forward and the backward pass; weights and optimiser are float32.
    """

    max_epochs: int
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    learning_rate: float = 5e-5
    alpha: float = 0.9
    momentum: float = 0.9
    halve_after: int | None = 3
    stop_after: int = 5
    best_by: Literal["roc_auc", "loss"] = "roc_auc"
    stop_at_accuracy: float | None = None
    precision: Precision = "float32"

    def optimizer_of(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        """A new optimiser of those of a module's parameters that are trained."""
        trained = [of for of in module.parameters() if of.requires_grad]
        if self.optimizer == "adam":
            return torch.optim.Adam(trained, lr=self.learning_rate)
        return torch.optim.RMSprop(
            trained, lr=self.learning_rate, alpha=self.alpha, momentum=self.momentum
        )


@dataclass(frozen=True)
class Feed:
    """Where batches come from, and how they become input.

    Parameters
    ----------
    train_batches : callable
        ``(first_step, steps)`` to that many batches, from global step ``first_step`` on: step
        ``s`` of epoch ``e``, both from 0, is step ``e * steps_per_epoch + s``. ``steps`` is 0
        when training resumes at the validation after an epoch's last step.
    validation_batches : callable
        ``()`` to the validation set's batches, the same each time; their numbers are not used.
    prepare : callable
        ``(images, numbers)`` to normalised float images, on the device of ``images``: augmented
        by their numbers, or, for ``numbers=None``, not at all.
    steps_per_epoch : int
    """

    train_batches: Callable[[int, int], Iterable[Batch]]
    validation_batches: Callable[[], Iterable[Batch]]
    prepare: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    steps_per_epoch: int
