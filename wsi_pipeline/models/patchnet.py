"""PatchNet: an image's probability as the plain mean of its patches' (Radhakrishnan et al.)."""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.vgg16 import start_convolutions


class Subnet(nn.Module):
    """The paper's subnet S: a patch to the logit of Q, the patch's probability of class 1.

    Convolutions (3 x 3, each with ReLU), then one linear model for each filter, a dot product
    over that filter's whole output, then tanh, then one linear layer over these values. The
    sigmoid of its output is Q.

    The convolutions start Kaiming normal (fan in; biases zero). The paper names no start for the
    linear models: they start as torch's linear layers do (uniform in +-1 / sqrt(inputs)).

    Parameters
    ----------
    patch_px : int
        Side of a patch, px.
    channels : int
        Of the image.
    filters, layers : int
        Of the convolutions.
    padding : {"same", "valid"}
        ``"same"``, the paper's: one pixel of zeros around the patch in every layer. ``"valid"``,
        a different model of ours: none, so that each layer takes two pixels off each side's
        length and the filters' output is ``patch_px - 2 * layers`` px wide. Weights of the one
        do not fit the other.

    Attributes
    ----------
    output_px : int
        Side of a filter's output, px.

    Raises
    ------
    ModelError
        If a number is under 1, `padding` is another word, or nothing is left of a patch.
    """

    def __init__(
        self,
        patch_px: int,
        *,
        channels: int = 3,
        filters: int = 64,
        layers: int = 7,
        padding: Literal["same", "valid"] = "same",
    ):
        super().__init__()
        _check_sizes(patch_px=patch_px, channels=channels, filters=filters, layers=layers)
        if padding not in ("same", "valid"):
            raise ModelError(f"padding is {padding!r}: it must be 'same' or 'valid'")
        self.patch_px = patch_px
        self.padding = padding
        self.output_px = patch_px if padding == "same" else patch_px - 2 * layers
        if self.output_px < 1:
            raise ModelError(
                f"patch_px is {patch_px}: {layers} layers without padding need"
                f" {2 * layers + 1} px or more"
            )
        inputs = [channels] + [filters] * (layers - 1)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(size, filters, 3, padding=1 if padding == "same" else 0) for size in inputs
        )
        self.readout_weight = nn.Parameter(torch.empty(filters, self.output_px, self.output_px))
        self.readout_bias = nn.Parameter(torch.empty(filters))
        self.head = nn.Linear(filters, 1)
        self._start()

    def _start(self) -> None:
        start_convolutions(self, "fan_in")
        bound = 1 / self.output_px  # 1 / sqrt(inputs)
        nn.init.uniform_(self.readout_weight, -bound, bound)
        nn.init.uniform_(self.readout_bias, -bound, bound)

    def filter_outputs(self, patches: torch.Tensor) -> torch.Tensor:
        """One value for each filter: the tanh of its linear model.

        Parameters
        ----------
        patches : float tensor, shape (M, channels, patch_px, patch_px)

        Returns
        -------
        tensor, shape (M, filters), in (-1, 1)

        Raises
        ------
        ModelError
            If the patches are of another size.
        """
        if tuple(patches.shape[-2:]) != (self.patch_px, self.patch_px):
            raise ModelError(
                f"patches are {patches.shape[-1]} x {patches.shape[-2]} px:"
                f" this subnet takes {self.patch_px} x {self.patch_px} px"
            )
        values = patches
        for convolution in self.convolutions:
            values = torch.relu(convolution(values))
        return self.read_out(values)

    def read_out(self, values: torch.Tensor) -> torch.Tensor:
        """The filters' linear models and tanh of the last convolution's output.

        Parameters
        ----------
        values : float tensor, shape (M, filters, output_px, output_px)

        Returns
        -------
        tensor, shape (M, filters), in (-1, 1)
        """
        with torch.autocast(values.device.type, enabled=False):  # bfloat16 would be coarse
            weighted = values.to(self.readout_weight.dtype) * self.readout_weight
            return torch.tanh(weighted.sum(dim=(2, 3)) + self.readout_bias)

    def logits(self, filter_outputs: torch.Tensor) -> torch.Tensor:
        """Logits of Q from the filters' values.

        Parameters
        ----------
        filter_outputs : float tensor, shape (..., filters)

        Returns
        -------
        tensor, shape (...)
        """
        with torch.autocast(filter_outputs.device.type, enabled=False):
            return self.head(filter_outputs).squeeze(-1)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Logits of Q of patches, shape (M, channels, patch_px, patch_px), as shape (M,)."""
        return self.logits(self.filter_outputs(patches))


class PatchNet(nn.Module):
    """An image's probability P of class 1 as the mean of Q over its patches, as a logit.

    P = (1 / l) sum Q over the image's l patches (the paper's section 2). The output is the logit
    of that mean, not a mean of logits: torch's ``binary_cross_entropy_with_logits`` of it is the
    paper's loss, cross-entropy of P, and stays finite where Q saturates (see `logit_of_mean`).

    Parameters
    ----------
    patch_px : int
        Side of a patch, px.
    stride_px : int
        Step between patches, px; under `patch_px` they overlap. 1 to `patch_px`.
    channels, filters, layers, padding
        As for `Subnet`.

    Raises
    ------
    ModelError
        If a setting is out of its range.
    """

    def __init__(
        self,
        patch_px: int,
        stride_px: int,
        *,
        channels: int = 3,
        filters: int = 64,
        layers: int = 7,
        padding: Literal["same", "valid"] = "same",
    ):
        super().__init__()
        _check_sizes(stride_px=stride_px)
        self.stride_px = stride_px
        self.subnet = Subnet(
            patch_px, channels=channels, filters=filters, layers=layers, padding=padding
        )
        if stride_px > patch_px:
            raise ModelError(
                f"stride_px is {stride_px} and patch_px {patch_px}: pixels between patches would"
                " not count"
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of P.

        The patches start at the upper left corner. Where the steps do not end at the right or
        lower edge, zeros are attached there until the last patch reaches it: every pixel counts.
        The paper does not say so, but its figure of 1/3 follows from 8 x 8 patches of 17 px on
        128 px (16 of 64 bear the white square); the 7 x 7 that lie inside would give 0.26.

        Parameters
        ----------
        images : float tensor, shape (N, channels, H, W)
            H and W of `patch_px` or more.

        Returns
        -------
        tensor, shape (N,)

        Raises
        ------
        ModelError
            If an image is smaller than a patch.
        """
        check_holds_a_patch(images, self.subnet.patch_px)
        height, width = images.shape[-2:]
        right, below = (self._missing_px(size) for size in (width, height))
        covered = functional.pad(images, (0, right, 0, below))
        patches = cut_patches(covered, self.subnet.patch_px, self.stride_px)
        logits = self.subnet(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        return logit_of_mean(logits)

    def _missing_px(self, size_px: int) -> int:
        """Zeros to attach along one axis for the last patch to reach its end."""
        return -(size_px - self.subnet.patch_px) % self.stride_px


def cut_patches(images: torch.Tensor, patch_px: int, stride_px: int) -> torch.Tensor:
    """All patches of a regular lattice that lie inside the image.

    The first starts at the upper left corner. Where the steps do not end at the right or lower
    edge, the pixels after the last patch are in none.

    Parameters
    ----------
    images : tensor, shape (N, C, H, W)
    patch_px, stride_px : int

    Returns
    -------
    tensor, shape (N, l, C, patch_px, patch_px)
        Row by row; a copy where patches overlap.

    Raises
    ------
    ModelError
        If an image is smaller than a patch.
    """
    check_holds_a_patch(images, patch_px)
    windows = images.unfold(2, patch_px, stride_px).unfold(3, patch_px, stride_px)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def check_holds_a_patch(images: torch.Tensor, patch_px: int) -> None:
    """Raise ModelError if the images, shape (..., H, W), are smaller than a patch."""
    if min(images.shape[-2:]) < patch_px:
        raise ModelError(
            f"images are {images.shape[-1]} x {images.shape[-2]} px: patches of {patch_px} px"
            " need as much on each side"
        )


def logit_of_mean(logits: torch.Tensor) -> torch.Tensor:
    """Logit of the mean of sigmoids: log P - log(1 - P) with P = mean(sigmoid(logits)).

    With z the l logits of an image, log P = logsumexp(log sigmoid(z)) - log l and
    log(1 - P) = logsumexp(log sigmoid(-z)) - log l, so neither is ever the logarithm of a rounded
    0, and log l cancels in their difference. The value and its gradient are finite for all finite
    logits.

    Parameters
    ----------
    logits : float tensor, shape (..., l)

    Returns
    -------
    tensor, shape (...)
    """
    log_p = torch.logsumexp(functional.logsigmoid(logits), dim=-1)
    log_not_p = torch.logsumexp(functional.logsigmoid(-logits), dim=-1)
    return log_p - log_not_p


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not (isinstance(size, int) and size >= 1):
            raise ModelError(f"{name} is {size!r}: it must be a whole number of 1 or more")


def subnet_of(model: nn.Module) -> Subnet:
    """The subnet of a PatchNet.

    Raises
    ------
    ModelError
        If the model is none.
    """
    if not isinstance(model, PatchNet):
        raise ModelError(f"a {type(model).__name__} has no subnet: only a PatchNet has")
    return model.subnet
