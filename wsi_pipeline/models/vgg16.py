"""The lecture's patch classifier: VGG16's convolutions, global max pooling, one dense unit."""

from typing import Literal

import torch
from torch import nn
from torchvision.models import VGG16_Weights
from torchvision.models.vgg import cfgs, make_layers

from wsi_pipeline.errors import ModelError

IMAGENET = VGG16_Weights.IMAGENET1K_V1
IMAGENET_MEAN = tuple(IMAGENET.transforms().mean)
IMAGENET_STD = tuple(IMAGENET.transforms().std)
MIN_PX = 32
"""Smallest input side, px: the five 2 x 2 poolings leave one pixel of it."""


class VGG16(nn.Module):
    """Probability of cancer in a patch, as a logit (Lecture).

    torchvision's VGG16 up to and with its fifth max pooling; the fully connected top is replaced
    by global max pooling and one dense unit, so any input of 32 px or more works. The sigmoid of
    the output is F(I).

    The convolutions start as torchvision's do (Kaiming normal, fan out; biases zero), the dense
    unit as torchvision's dense layers of VGG do (normal, standard deviation 0.01; bias zero): F
    starts near 1/2 for every patch. `models.start` gives pretrained ones.
    """

    def __init__(self):
        super().__init__()
        self.features = make_layers(cfgs["D"])  # vgg16() would fill 120 million weights more
        start_convolutions(self.features, mode="fan_out")
        self.head = nn.Linear(512, 1)
        start_dense_unit(self.head, std=0.01)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of normalised patches.

        Parameters
        ----------
        images : float tensor, shape (N, 3, H, W)
            Normalised by the mean and standard deviation that the weights were trained with;
            H and W 32 px or more.

        Returns
        -------
        tensor, shape (N,)

        Raises
        ------
        ModelError
            If H or W is under 32.
        """
        check_size(images, MIN_PX, "VGG16")
        return dense_unit(self.head, self.features(images).amax(dim=(2, 3)))


def start_convolutions(features: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    """Fill a network's convolutions anew: Kaiming normal for ReLU, biases zero."""
    for layer in features.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def start_dense_unit(unit: nn.Linear, std: float) -> None:
    """Fill a dense unit anew: normal with this standard deviation, bias zero."""
    nn.init.normal_(unit.weight, std=std)
    nn.init.zeros_(unit.bias)


def check_size(images: torch.Tensor, min_px: int, network: str) -> None:
    """Raise ModelError if the images, shape (..., H, W), have a side under `min_px`."""
    if min(images.shape[-2:]) < min_px:
        raise ModelError(
            f"patches are {images.shape[-1]} x {images.shape[-2]} px:"
            f" {network} needs {min_px} px or more on each side"
        )


def dense_unit(unit: nn.Linear, values: torch.Tensor) -> torch.Tensor:
    """Logits (N,) of values (N, K), in the unit's own type under autocast too."""
    with torch.autocast(values.device.type, enabled=False):  # bfloat16 logits would be coarse
        return unit(values.to(unit.weight.dtype)).squeeze(1)
