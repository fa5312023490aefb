"""Factories of networks as users write them, named in settings and cards as own_networks:NAME."""

import torch
from torch import nn


class Colours(nn.Module):
    """Mean colour, normalised over the batch, to `outputs` values."""

    def __init__(self, outputs: int):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, outputs)

    def forward(self, images):
        return self.head(self.features(images).mean(dim=(2, 3)))


class Flat(Colours):
    """One logit, as shape (N,)."""

    def forward(self, images):
        return super().forward(images)[:, 0]


def one_logit(outputs: int = 1):
    return Colours(outputs)


def flat_logit():
    return Flat(1)


def classes(count: int):
    return Colours(count)


def probabilities(count: int = 2):
    return nn.Sequential(Colours(count), nn.Softmax(dim=1))


def fails():
    raise RuntimeError("no licence found\nsecond line")


def no_module():
    return {"weights": 1}


def feature_maps():
    return nn.Conv2d(3, 4, 3)


def not_a_number():
    network = Colours(1)
    nn.init.constant_(network.head.bias, torch.nan)
    return network


def large_images_only():
    return nn.Sequential(nn.Conv2d(3, 1, 65), nn.Flatten())


def headless():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1))


def tied():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3), nn.Linear(3, 3))
    network[3].weight = network[2].weight
    network.append(nn.Linear(3, 1))
    return network
