"""A training that takes a second: loaded by the tests with runpy, run by them as a script.

python tiny.py FOLDER [SECONDS_A_STEP [LOST ...]]      alone, or under torchrun
"""

import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import nn

from wsi_pipeline.training.loop import fit
from wsi_pipeline.training.processes import distributed
from wsi_pipeline.training.recipe import Feed, Recipe

BATCH = 8
STEPS = 4
EPOCHS = 4
WEIGHTS = "weights.pt"
VALIDATION = range(1_000_000, 1_000_021)


class TinyNet(nn.Module):
    """Two layers, start weights always the same; keeps the dtype of its first layer's output."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, images):
        features = self.conv(images)
        self.dtype = features.dtype
        return self.head(features.relu().amax(dim=(2, 3))).squeeze(1)


def batch(numbers):
    """Images that depend on their numbers only; odd ones are a little brighter and are 1."""
    labels = torch.tensor([number % 2 for number in numbers])
    images = np.stack([np.random.default_rng(n).integers(0, 220, (3, 8, 8)) for n in numbers])
    images += 30 * labels.numpy()[:, None, None, None]
    return torch.from_numpy(images.astype(np.uint8)), labels, torch.tensor(list(numbers))


def train_batches(first_step, steps, rank=0, count=1, lost=()):
    """Step s has the numbers from s * BATCH on; a process has every `count`-th of them.

    Those that are lost are left out.
    """
    for step in range(first_step, first_step + steps):
        numbers = range(step * BATCH, (step + 1) * BATCH)[rank::count]
        kept = torch.tensor([number not in lost for number in numbers])
        yield tuple(column[kept] for column in batch(numbers))


def validation_batches(rank=0, count=1):
    """21 examples, in batches of 4: two processes have 11 and 10 of them."""
    mine = VALIDATION[rank::count]
    for start in range(0, len(mine), 4):
        yield batch(mine[start : start + 4])


def prepare(images, numbers):
    """Scale; mirror the images whose number is a multiple of 3, in training."""
    images = images.float() / 255
    if numbers is None:
        return images
    mirrored = (numbers % 3 == 0)[:, None, None, None].to(images.device)
    return torch.where(mirrored, images.flip(-1), images)


def train(folder, module=None, **settings):
    """Fit a new TinyNet, or another network; give it and its history."""
    module = module or TinyNet()
    folder = Path(folder)
    settings = {
        "train_batches": train_batches,
        "validation_batches": validation_batches,
        "prepare": prepare,
        "folder": folder,
        "fingerprint": "tiny",
        "steps_per_epoch": STEPS,
        "max_epochs": EPOCHS,
        "learning_rate": 0.003,
        "save_best": lambda best, module, row: torch.save(module.state_dict(), best / WEIGHTS),
    } | settings
    recipe, feed = (
        of(**{part.name: settings.pop(part.name) for part in fields(of) if part.name in settings})
        for of in (Recipe, Feed)
    )
    history = fit(module, recipe, feed, **settings)
    return module, history


def main(folder, seconds_a_step=0.0, *lost):
    """Train as this process's part of a group, slowly on demand; the first one saves the end."""
    with distributed() as process:
        share = {"rank": process.rank, "count": process.count}

        def slow_train_batches(first_step, steps):
            for item in train_batches(first_step, steps, **share, lost=lost):
                time.sleep(seconds_a_step)
                yield item

        module, history = train(
            folder,
            train_batches=slow_train_batches,
            validation_batches=lambda: validation_batches(**share),
            checkpoint_seconds=1e-9,
        )
    torch.save(
        {"module": module.state_dict(), "history": history.to_dict("list")},
        Path(folder) / f"end{process.rank}.pt",
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:]))
