"""The processes that train together, under torchrun; or one alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Process:
    """Rank of a process, how many train together, and its device."""

    rank: int
    count: int
    device: torch.device


@contextmanager
def distributed() -> Iterator[Process]:
    """Join the process group that torchrun's environment describes; alone without one.

    NCCL with one GPU for each process, or gloo on the CPU. After an error the group is not
    destroyed: while other processes wait for this one, NCCL may block there, and gloo ends them
    first.
    """
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        yield Process(0, 1, torch.device("cuda" if cuda else "cpu"))
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    yield Process(dist.get_rank(), dist.get_world_size(), device)
    dist.destroy_process_group()


def parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """The module itself, or, in a process group, one that averages gradients over it."""
    if not dist.is_initialized():
        return module
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


def rank() -> int:
    """Of this process; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return rank() == 0


def process_count() -> int:
    """How many train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """The mean of all processes' values, in place of this one's."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def gather(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Give every process the arrays of all, in the order of their ranks."""
    if not dist.is_initialized():
        return arrays
    parts: list[list[np.ndarray]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, arrays)
    return [array for part in parts for array in part]
