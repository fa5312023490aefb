"""The model of a worker: loaded once, for all units that use it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import nn

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.checkpoint import ModelCard, load_model
from wsi_pipeline.models.precision import computing_in

_CHANGING, _LOADING = threading.Lock(), threading.Lock()


def worker_model(folder: str, weights: str) -> tuple[nn.Module, ModelCard]:
    """The model in a folder, on the worker's GPU if it has one, in evaluation mode.

    Parameters
    ----------
    folder : str
    weights : str
        Hash that tells models apart: that of the model which the stage began with.

    Raises
    ------
    ModelError
        If it cannot be loaded, or has other weights.
    """
    with _LOADING:  # a worker's threads begin at once: one of them loads
        return _load(folder, weights)


@lru_cache(maxsize=1)
def _load(folder: str, weights: str) -> tuple[nn.Module, ModelCard]:
    module, card = load_model(folder)
    if card.weights_sha256 != weights:
        raise ModelError(f"{folder}: these are not the weights that the stage began with")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return module.to(device, memory_format=torch.channels_last), card


@contextmanager
def held_model(folder: str, weights: str) -> Iterator[tuple[nn.Module, ModelCard]]:
    """The `worker_model`, for one thread at a time: for work that changes it for a while.

    Explaining a model sets flags of its modules and parameters and hooks on its layers, which the
    threads of a worker would see of each other. It computes in float32.
    """
    with _CHANGING:
        module, card = worker_model(folder, weights)
        with computing_in("float32", next(module.parameters()).device):
            yield module, card
