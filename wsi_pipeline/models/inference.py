"""A trained model as a plain function of pixels."""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torchvision.transforms import v2

from wsi_pipeline.models import colour
from wsi_pipeline.models.dense import dense_logits
from wsi_pipeline.models.patchnet import Subnet, check_holds_a_patch
from wsi_pipeline.models.precision import Precision, computing_in

GPU_BATCH, CPU_BATCH = 32, 4
"""Large patches that a model is given at once, unless a setting says otherwise."""
GPU_BATCH_PX, CPU_BATCH_PX = 2**23, 2**17
"""Of small patches there are more in a batch: as many as have about so many px, up to a limit."""
GPU_LARGEST_BATCH, CPU_LARGEST_BATCH = 512, 64
LATTICE_STEP = 8
"""Patches along each axis of a dense evaluation are rounded up to a multiple of this."""


def normalise(
    images: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    gamma: float | None = None,
    shades_of_gray: float | None = None,
) -> torch.Tensor:
    """Pixels as the network takes them: ``(rgb / 255 - mean) / std``.

    Between scaling and standardisation, colours are corrected where that is asked for; gamma
    first, as in the PatchNet paper.

    Parameters
    ----------
    images : uint8 tensor, shape (N, 3, H, W)
    mean, std : sequences of 3 float
        Of values scaled to 0..1, and corrected.
    gamma : float, optional
        For `colour.correct_gamma`.
    shades_of_gray : float, optional
        The power p for `colour.shades_of_gray`.

    Returns
    -------
    float32 tensor, shape (N, 3, H, W)
        On the device of `images`, in their memory format.

    Raises
    ------
    ModelError
        If `gamma` or `shades_of_gray` is out of its range.
    """
    values = v2.functional.to_dtype(images, torch.float32, scale=True)
    if gamma is not None:
        values = colour.correct_gamma(values, gamma)
    if shades_of_gray is not None:
        values = colour.shades_of_gray(values, shades_of_gray)
    # Not by v2.functional.normalize: it sends both to the device anew, and waits for a GPU to come
    # that far.
    centre, spread = (_of_channels(tuple(of), values.device) for of in (mean, std))
    return (values - centre).div_(spread)


@cache
@torch.inference_mode(False)
def _of_channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """A value for each channel, shape (3, 1, 1), kept on the device."""
    return torch.tensor(values, device=device)[:, None, None]


def in_channels_last(module: nn.Module, device: torch.device | str) -> nn.Module:
    """Move a model to a device, in the memory format in which convolutions are fastest."""
    return module.to(device).to(memory_format=torch.channels_last)


def predictor(
    module: nn.Module,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    precision: Precision,
    gamma: float | None = None,
    shades_of_gray: float | None = None,
) -> Callable[[np.ndarray], np.ndarray]:
    """A model as a function from patches to probabilities F(I).

    Parameters
    ----------
    module : nn.Module
        Normalised float (N, 3, H, W) to logits (N,); moved to the device, evaluation mode.
    mean, std : sequences of 3 float
    device : torch.device or str
    precision : {"float32", "bfloat16"}
        The sigmoid is taken in float32.
    gamma, shades_of_gray : float, optional
        With `mean` and `std`, as for `normalise`; a card's `ModelCard.normalisation` has all four.

    Returns
    -------
    callable
        uint8 (N, H, W, 3) -> float32 (N,), in [0, 1]. Several threads may call it; on a GPU their
        work overlaps.
    """
    device = torch.device(device)
    module = in_channels_last(module, device).eval()

    def predict(patches: np.ndarray) -> np.ndarray:
        with (
            _stream_of_thread(device),
            torch.inference_mode(),
            computing_in(precision, device),
        ):
            images = torch.from_numpy(patches).to(device).permute(0, 3, 1, 2)  # is channels-last
            logits = module(
                normalise(images, mean, std, gamma=gamma, shades_of_gray=shades_of_gray)
            )
            return torch.sigmoid(logits.float()).cpu().numpy()

    return predict


def _stream_of_thread(device: torch.device) -> AbstractContextManager:
    """Let a thread work on a CUDA stream of its own; nothing on a CPU.

    On one stream for all, a thread's copies to the GPU would wait for the other's kernels, and the
    other's next ones for these copies. Copies are from pageable memory: to copy into page-locked
    memory first takes as long and waits as well, while the other thread computes all the same.
    """
    if device.type != "cuda":
        return nullcontext()
    stream = _stream(device, threading.get_ident())
    stream.wait_stream(torch.cuda.default_stream(device))  # the model's weights came on that one
    return torch.cuda.stream(stream)


@cache
def _stream(device: torch.device, _thread: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def dense_predictor(
    subnet: Subnet,
    *,
    stride_px: int,
    mean: Sequence[float],
    std: Sequence[float],
    gamma: float | None = None,
    device: torch.device | str,
    precision: Precision,
) -> Callable[[np.ndarray], np.ndarray]:
    """PatchNet's subnet as a function from an image to Q of the patches in it.

    Parameters
    ----------
    subnet : Subnet
        Moved to the device, evaluation mode.
    stride_px : int
        Step between patches, px; the first starts at the image's upper left corner.
    mean, std, gamma
        As for `normalise`. There is no colour constancy: it is of whole patches, not of these.
    device : torch.device or str
    precision : {"float32", "bfloat16"}
        Of the convolutions; the linear models and the sigmoid are in float32.

    Returns
    -------
    callable
        uint8 (H, W, 3) -> float32 (rows, cols), in [0, 1]; rows =
        (H - patch_px) // stride_px + 1, cols alike. It raises ModelError if the image is smaller
        than a patch.
    """
    device = torch.device(device)
    subnet = subnet.to(device).eval()

    def predict(image: np.ndarray) -> np.ndarray:
        with (
            _stream_of_thread(device),
            torch.inference_mode(),
            computing_in(precision, device),
        ):
            pixels = torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1)
            prepared = normalise(pixels[None], mean, std, gamma=gamma)[0]
            logits = dense_logits(subnet, _of_few_sizes(prepared, subnet, stride_px), stride_px)
            rows, cols = ((n - subnet.patch_px) // stride_px + 1 for n in image.shape[:2])
            return torch.sigmoid(logits[:rows, :cols].float()).cpu().numpy()

    return predict


def _of_few_sizes(image: torch.Tensor, subnet: Subnet, stride_px: int) -> torch.Tensor:
    """An image with zeros attached until its patches come in multiples of `LATTICE_STEP`.

    oneDNN and cuDNN keep what they prepare for each size they meet: with sizes at will, a worker's
    memory would grow from chunk to chunk.
    """
    check_holds_a_patch(image, subnet.patch_px)
    below, right = (
        (_rounded_up((n - subnet.patch_px) // stride_px + 1) - 1) * stride_px + subnet.patch_px - n
        for n in image.shape[1:]
    )
    return functional.pad(image, (0, right, 0, below))  # under 0: pixels in no patch are cut off


def _rounded_up(count: int) -> int:
    return -(-count // LATTICE_STEP) * LATTICE_STEP


def use_batch_size(device: torch.device | str, setting: int | None, patch_px: int) -> int:
    """How many patches to give a model at once.

    Parameters
    ----------
    device : torch.device or str
    setting : int or None
        A number is obeyed; None: `GPU_BATCH` or `CPU_BATCH`, more of small patches. On a core
        with AVX2 VGG16 does 1 to 8 patches of 128 px as fast as each other and 32 up to a quarter
        slower; of 512 px 1, 2 and 4 alike, and each takes 150 MB.
    patch_px : int
        Side of a patch.
    """
    if setting is not None:
        return setting
    on_gpu = torch.device(device).type == "cuda"
    least, px, most = (
        (GPU_BATCH, GPU_BATCH_PX, GPU_LARGEST_BATCH)
        if on_gpu
        else (CPU_BATCH, CPU_BATCH_PX, CPU_LARGEST_BATCH)
    )
    return min(max(least, px // patch_px**2), most)
