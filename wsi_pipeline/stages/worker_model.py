"""The trained model of a stage, and how a worker comes by it: loaded once, for all its units."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from wsi_pipeline.config import Config
from wsi_pipeline.errors import ModelError
from wsi_pipeline.jobs.unit import Unhashed
from wsi_pipeline.models.card import ModelCard, read_card
from wsi_pipeline.models.checkpoint import load_model
from wsi_pipeline.models.inference import in_channels_last
from wsi_pipeline.models.precision import computing_in
from wsi_pipeline.stages.run_directory import model_folder, model_id

_CHANGING, _LOADING = threading.Lock(), threading.Lock()


@dataclass(frozen=True)
class TrainedModel:
    """A model as an input of units: its weights count, and nothing else.

    Parameters
    ----------
    weights : str
        Hash that tells models apart: of the model which the stage began with.
    name, folder : str
    """

    weights: str
    name: Unhashed[str]
    folder: Unhashed[str]

    @classmethod
    def of_run(cls, config: Config) -> "TrainedModel":
        """Look at the model that the settings name; ModelError if it is missing or damaged."""
        folder = model_folder(config.out, config.train.name)
        return cls(read_card(folder).weights_sha256, config.train.name, str(folder))

    @property
    def id(self) -> str:
        """What heatmaps call it."""
        return model_id(self.name, self.weights)


def worker_device() -> torch.device:
    """Where a worker computes: on its GPU if it has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def worker_model(model: TrainedModel) -> tuple[nn.Module, ModelCard]:
    """Load a model, on the worker's GPU if it has one, in evaluation mode.

    Raises
    ------
    ModelError
        If it cannot be loaded, or has other weights.
    """
    with _LOADING:  # a worker's threads begin at once: one of them loads
        return _load(model)


@lru_cache(maxsize=1)
def _load(model: TrainedModel) -> tuple[nn.Module, ModelCard]:
    module, card = load_model(model.folder, worker_device())
    if card.weights_sha256 != model.weights:
        raise ModelError(f"{model.folder}: these are not the weights that the stage began with")
    return in_channels_last(module, worker_device()), card


@contextmanager
def held_model(model: TrainedModel) -> Iterator[tuple[nn.Module, ModelCard]]:
    """The `worker_model`, for one thread at a time: for work that changes it for a while.

    Explaining a model sets flags of its modules and parameters and hooks on its layers, which the
    threads of a worker would see of each other. It computes in float32.
    """
    with _CHANGING:
        module, card = worker_model(model)
        with computing_in("float32", worker_device()):
            yield module, card
