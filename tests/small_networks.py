"""Small networks with known explanations, and all that an explanation must leave as it was."""

import torch
from torch import nn


class SmallVgg(nn.Module):
    """VGG16 in small: in-place ReLUs, max pooling, global max pooling, one logit."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.head = nn.Linear(5, 1)

    def pool(self, values):
        return values.amax(dim=(2, 3))

    def forward(self, images):
        return self.head(self.pool(self.features(images))).squeeze(1)


class SmallAverage(SmallVgg):
    """The same with global average pooling."""

    def pool(self, values):
        return values.mean(dim=(2, 3))


class Failing(SmallVgg):
    """Fails when it has nearly run."""

    def pool(self, values):
        raise RuntimeError("out of memory")


class PixelWeights(nn.Module):
    """A linear model: the logit is the sum of the images times a weight for each value."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, images):
        return (images * self.weights).sum(dim=(1, 2, 3))


def seeded(network, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return network().to(dtype)


def in_odd_state(network):
    """A network whose modes, gradients and flags differ between its parts."""
    model = seeded(network, dtype=torch.float32)
    model.train()
    model.features[1].eval()
    model.features[0].weight.requires_grad_(False)
    model.head.weight.grad = torch.full_like(model.head.weight, 7)
    model.features[4].inplace = False
    return model


def state_of(model):
    """Modes, in-place flags, hooks, values, flags and gradients, and torch's random state."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": [
            [name, module.training, getattr(module, "inplace", None)]
            + [len(getattr(module, kind)) for kind in hooks]
            for name, module in model.named_modules()
        ],
        "parameters": [
            (name, value.tolist(), value.requires_grad, value.grad is None or value.grad.tolist())
            for name, value in model.named_parameters()
        ],
        "random": torch.get_rng_state().tolist(),
    }
