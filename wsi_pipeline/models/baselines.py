"""What PatchNet is compared with: the paper's CAM and Grad-CAM networks (its appendix C).

The maps themselves are the explanation methods' of the same names. Both networks start from random
weights, as in the paper, and end in one logistic unit, as PatchNet does. The paper does not say
what its random weights were or how many outputs these two had.
"""

import torch
from torch import nn
from torchvision.models import VGG
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms.v2 import functional

from wsi_pipeline.models.vgg16 import check_size, dense_unit, start_convolutions, start_dense_unit

CAM_POOLINGS = 3
CAM_MIN_PX = 2**CAM_POOLINGS
"""Smallest input side of `CAMNet`, px: its 2 x 2 poolings leave one pixel of it."""
GRAD_CAM_PX = 224
"""Side that `GradCAMNet` resizes its input to, px."""
GRAD_CAM_MIN_PX = 32
"""Smallest input side of `GradCAMNet`, px: torchvision's for VGG-11, before any resizing."""
HEAD_STD = 0.001
"""Of the last layer's first weights: the logits of normalised images then start within some
tenths of 0."""


class CAMNet(nn.Module):
    """The paper's CAM model: a network whose logit is the mean of its class activation map.

    VGG-19's convolutions with only 3 pooling layers, global average pooling
    and one linear unit. The paper does not say which of the 5 poolings are left: here the first
    three, so that the last eight convolutions work at 1/8 of the image's size.

    With f_k the feature maps of `features` (after the last ReLU), w and b the weights and bias of
    `head`, the class activation map of Zhou et al. (Learning deep features for discriminative
    localization, CVPR 2016) is M = sum_k w_k f_k, and the logit is exactly mean(M) + b.

    The convolutions start Kaiming normal (fan in; biases zero), the unit normal with standard
    deviation `HEAD_STD`.

    Attributes
    ----------
    features : nn.Sequential
        Images (N, 3, H, W) to f, shape (N, 512, H // 8, W // 8).
    head : nn.Linear
        512 values to the logit.
    """

    def __init__(self):
        super().__init__()
        self.features = make_layers(_with_poolings(cfgs["E"], CAM_POOLINGS))
        start_convolutions(self.features, mode="fan_in")
        self.head = nn.Linear(512, 1)
        start_dense_unit(self.head, std=HEAD_STD)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of normalised images.

        Parameters
        ----------
        images : float tensor, shape (N, 3, H, W)
            H and W 8 px or more.

        Returns
        -------
        tensor, shape (N,)

        Raises
        ------
        ModelError
            If H or W is under 8.
        """
        check_size(images, CAM_MIN_PX, "the CAM network")
        return dense_unit(self.head, self.features(images).mean(dim=(2, 3)))


class GradCAMNet(VGG):
    """The paper's network for Grad-CAM: VGG-11 whole, its input resized to 224 x 224 px.

    torchvision's VGG-11 with one output in place of 1,000, under its names of weights:
    `features`, then the three fully connected layers of `classifier`, with dropout (probability
    1/2) after the first two. In training mode the dropout draws from torch's global generator.
    515 MB in float32, of which all but 37 MB are fully connected.

    The convolutions start Kaiming normal (fan in; biases zero), the first two fully connected
    layers as torchvision's (normal, standard deviation 0.01; biases zero), the last one normal
    with standard deviation `HEAD_STD`.

    Attributes
    ----------
    features : nn.Sequential
        Resized images (N, 3, 224, 224) to shape (N, 512, 7, 7), through five poolings; its last
        convolution's output, Grad-CAM's layer, is (N, 512, 14, 14).
    classifier : nn.Sequential
    """

    def __init__(self):
        super().__init__(make_layers(cfgs["A"]), num_classes=1)
        start_convolutions(self.features, mode="fan_in")
        start_dense_unit(self.classifier[-1], std=HEAD_STD)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of normalised images.

        Parameters
        ----------
        images : float tensor, shape (N, 3, H, W)
            H and W 32 px or more. Resized to 224 x 224 px (bilinear, antialiased; the paper does
            not say how): a longer side is shrunk more.

        Returns
        -------
        tensor, shape (N,)

        Raises
        ------
        ModelError
            If H or W is under 32.
        """
        check_size(images, GRAD_CAM_MIN_PX, "VGG-11")
        resized = functional.resize(images, [GRAD_CAM_PX, GRAD_CAM_PX], antialias=True)
        values = self.avgpool(self.features(resized)).flatten(1)  # 7 x 7 px already
        return dense_unit(self.classifier[-1], self.classifier[:-1](values))


def _with_poolings(configuration: list, count: int) -> list:
    """A VGG's layers as torchvision lists them, without the poolings after the first `count`."""
    poolings = [place for place, layer in enumerate(configuration) if layer == "M"]
    left_out = set(poolings[count:])
    return [layer for place, layer in enumerate(configuration) if place not in left_out]
