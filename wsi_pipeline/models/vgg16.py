"""The lecture's patch classifier: VGG16's convolutions, global max pooling, one dense unit."""

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
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.head = nn.Linear(512, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

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
        if min(images.shape[-2:]) < MIN_PX:
            raise ModelError(
                f"patches are {images.shape[-1]} x {images.shape[-2]} px:"
                f" VGG16 needs {MIN_PX} px or more on each side"
            )
        pooled = self.features(images).amax(dim=(2, 3))
        with torch.autocast(pooled.device.type, enabled=False):  # bfloat16 logits would be coarse
            return self.head(pooled.float()).squeeze(1)
