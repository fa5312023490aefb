"""PatchNet's subnet on every patch of a lattice, exactly, sharing what patches have in common.

Every patch is padded with zeros at its own border in every layer, so the subnet is no plain fully
convolutional network: a pixel in two patches has two values. But layer l's output at a pixel
depends on the patch only through the pixel's distances to the patch's four borders, each clipped
at l. Along one axis a patch then falls into three *segments*: its first l pixels, its last l, and
the middle, whose values are the same for every patch that holds the pixel there.

A layer is kept as the nine regions that are products of two segments: the middle once for the
image, edges once for each row (or column) of patches, corners once for each patch. The next layer
of each region is an ordinary convolution without padding, of the region with the pixels around it
attached: zeros outside of the patch, two pixels of the middle inside.

A corner is a few pixels wide, too few to keep a processor's vector units busy. So the patches of a
row are interleaved: the first pixel of each, then the second of each. That is one wide image, on
which a convolution of all these patches is one with dilation. A region needs no other but itself
and those shared by more patches: the nine are evaluated one after the other, each through all
layers, so that what one leaves in between stays small. What convolutions read is written to one
memory that is kept from one use to the next: fresh pages would cost more than the copies.

With n(l) = min(P, 2 l + s) pixels a patch and axis at patch side P and stride s, a layer costs
n(l)^2 convolution outputs a patch instead of P^2. Once 2 l + s reaches P nothing is shared any
more: the regions are joined into whole patches, and the remaining layers run on these. So for each
layer the cheaper of the two ways is taken, and batched patches are never cheaper than the whole.

The valid variant has no border, and the same code runs with the middle segment alone: a fully
convolutional network, n(l) = min(P - 2 l, s).
"""

from collections.abc import Iterator
from itertools import product
from math import prod

import torch
from torch import nn
from torch.nn import functional

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.patchnet import Subnet, check_holds_a_patch

START, MIDDLE, END = "start", "middle", "end"
BLOCK = 32
"""Patches a side evaluated at once. In float32, with 64 filters and patches of 31 px, that takes
some 180 MB at stride 1 and 500 MB at stride 8."""
PATCHES_AT_ONCE = 256
"""Whole patches run at once where nothing is shared any more."""

Regions = dict[tuple[str, str], torch.Tensor]
"""By row and column segment: shape (rows or 1, height, width, columns or 1, filters). Rows and
columns count the lattice's patches and are 1 where all of them share the segment."""

SEGMENTS: list[tuple[str, str]] = sorted(
    product((START, MIDDLE, END), (START, MIDDLE, END)), key=lambda key: -key.count(MIDDLE)
)
"""The nine regions, each after those that it reads: the middle, edges, corners."""


@torch.no_grad()
def dense_filter_outputs(
    subnet: Subnet, image: torch.Tensor, stride_px: int, *, block: int = BLOCK
) -> torch.Tensor:
    """`Subnet.filter_outputs` of every patch of a lattice that lies inside the image.

    The same values as of patches cut and run one by one, up to rounding. Evaluated in blocks of
    the lattice, so that memory beyond the result does not grow with the image. Under
    `torch.autocast` the convolutions run in its type, the linear models in the weights'.

    Parameters
    ----------
    subnet : Subnet
    image : float tensor, shape (channels, H, W)
        On the subnet's device; H and W of ``patch_px`` or more.
    stride_px : int
        Step between patches, px; 1 or more. The first starts at the upper left corner.
    block : int
        Patches a side evaluated at once. Memory grows with its square, and the work for what
        blocks compute twice, at their borders, falls with it.

    Returns
    -------
    tensor, shape (filters, rows, cols), in (-1, 1)
        rows = (H - patch_px) // stride_px + 1, cols alike.

    Raises
    ------
    ModelError
        If the image is smaller than a patch, or `stride_px` or `block` under 1.
    """
    shape = _lattice(subnet, image, stride_px)
    out = image.new_empty(len(subnet.readout_bias), *shape, dtype=subnet.readout_bias.dtype)
    memory = _Memory()
    for rows, cols, part in _blocks(image, subnet.patch_px, stride_px, shape, block):
        out[:, rows, cols] = _evaluate(subnet, part, stride_px, memory)
    return out


@torch.no_grad()
def dense_logits(
    subnet: Subnet, image: torch.Tensor, stride_px: int, *, block: int = BLOCK
) -> torch.Tensor:
    """Logits of Q of every patch of a lattice that lies inside the image.

    Parameters and errors as for `dense_filter_outputs`. The filters' values are kept for one
    block only.

    Returns
    -------
    tensor, shape (rows, cols)
    """
    shape = _lattice(subnet, image, stride_px)
    out = image.new_empty(shape, dtype=subnet.readout_bias.dtype)
    memory = _Memory()
    for rows, cols, part in _blocks(image, subnet.patch_px, stride_px, shape, block):
        outputs = _evaluate(subnet, part, stride_px, memory)
        out[rows, cols] = subnet.logits(outputs.movedim(0, -1))
    return out


def _lattice(subnet: Subnet, image: torch.Tensor, stride_px: int) -> tuple[int, int]:
    """Rows and columns of the patches inside the image."""
    check_holds_a_patch(image, subnet.patch_px)
    _check_steps(stride_px=stride_px)
    height, width = image.shape[1:]
    return (height - subnet.patch_px) // stride_px + 1, (width - subnet.patch_px) // stride_px + 1


def _blocks(
    image: torch.Tensor, patch_px: int, stride_px: int, shape: tuple[int, int], block: int
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Blocks of the lattice: their rows, their columns, and the part of the image they need."""
    _check_steps(block=block)
    for row, col in product(range(0, shape[0], block), range(0, shape[1], block)):
        rows, cols = slice(row, min(row + block, shape[0])), slice(col, min(col + block, shape[1]))
        y, x = (
            slice(span.start * stride_px, (span.stop - 1) * stride_px + patch_px)
            for span in (rows, cols)
        )
        yield rows, cols, image[:, y, x]


class _Memory:
    """Memory for one tensor at a time, kept for the next."""

    def __init__(self) -> None:
        self.values: torch.Tensor | None = None

    def empty(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of unset values, in the memory of the one before."""
        size = prod(shape)
        if self.values is None or self.values.dtype != like.dtype or len(self.values) < size:
            self.values = like.new_empty(size)
        return self.values[:size].view(shape)


def _evaluate(subnet: Subnet, image: torch.Tensor, stride_px: int, memory: _Memory) -> torch.Tensor:
    """`dense_filter_outputs` in one block: (channels, H, W) to (filters, rows, cols)."""
    lattice = _lattice(subnet, image, stride_px)
    shared = [
        convolution
        for layer, convolution in enumerate(subnet.convolutions, 1)
        if isinstance(convolution, nn.Conv2d) and _is_shared(subnet, layer, stride_px)
    ]
    layers = [_image_as_regions(image, lattice, subnet.padding)]
    layers += [{} for _ in shared]
    for key in list(layers[0]):
        for convolution, regions, following in zip(shared, layers, layers[1:], strict=False):
            inputs = _with_surroundings(regions, key, lattice, stride_px, memory)
            following[key] = _convolve(convolution, inputs)
            if MIDDLE not in key:
                del regions[key]  # nothing else reads a corner
    if len(shared) == len(subnet.convolutions):
        return _read_out(subnet, layers[-1], stride_px)
    step = -(-PATCHES_AT_ONCE // lattice[1])
    parts = []
    for first in range(0, lattice[0], step):
        rows = range(first, min(first + step, lattice[0]))
        regions = _of_rows(layers[-1], lattice[0], rows, stride_px)
        values = _as_patches(_joined(regions, (len(rows), lattice[1]), stride_px))
        for alone in subnet.convolutions[len(shared) :]:
            values = torch.relu(alone(values))
        parts.append(subnet.read_out(values).T.unflatten(1, (len(rows), lattice[1])))
    return torch.cat(parts, dim=1)


def _image_as_regions(image: torch.Tensor, lattice: tuple[int, int], padding: str) -> Regions:
    """Layer 0: no pixel depends on a border, so that all but the middle are empty.

    The valid variant has no border in any layer.
    """
    middle = image.permute(1, 2, 0)[None, :, :, None]
    if padding == "valid":
        return {(MIDDLE, MIDDLE): middle}
    regions: Regions = {}
    for key in SEGMENTS:
        region = middle
        for axis, count in enumerate(lattice):
            if key[axis] != MIDDLE:
                shape = [count if of == 3 * axis else -1 for of in range(region.ndim)]
                region = region.narrow(1 + axis, 0, 0).expand(shape)
        regions[key] = region
    return regions


def _of_rows(regions: Regions, count: int, rows: range, stride_px: int) -> Regions:
    """The regions of some of `count` rows of patches (views)."""
    others = count - len(rows)
    return {
        key: (
            region.narrow(1, rows.start * stride_px, region.shape[1] - others * stride_px)
            if key[0] == MIDDLE
            else region[rows.start : rows.stop]
        )
        for key, region in regions.items()
    }


def _with_surroundings(
    regions: Regions,
    key: tuple[str, str],
    lattice: tuple[int, int],
    stride_px: int,
    memory: _Memory,
) -> torch.Tensor:
    """A region after its ReLU, with what the next layer reads around it.

    Along each axis on which it lies at the border: a zero outside of the patch, two pixels of the
    middle inside. The middle loses a pixel at each end to the borders, and needs none.
    """
    own = regions[key]
    if key == (MIDDLE, MIDDLE):
        return own
    sizes = own.shape[1:3]
    around = (0 if segment == MIDDLE else 3 for segment in key)
    height, width = (size + more for size, more in zip(sizes, around, strict=True))
    out = memory.empty(own, (len(own), height, width, *own.shape[3:]))
    for axis, segment in enumerate(key):
        if segment != MIDDLE:
            out.select(1 + axis, 0 if segment == START else -1).zero_()
    for source in product({key[0], MIDDLE}, {key[1], MIDDLE}):
        part, target = regions[source], out
        for axis in (0, 1):
            first, size = {START: 1, MIDDLE: 0, END: 2}[key[axis]], sizes[axis]
            if source[axis] != key[axis]:
                first, size = (1 + size if key[axis] == START else 0), 2
                part = _next_to_border(part, axis, key[axis], lattice[axis], stride_px)
            target = target.narrow(1 + axis, first, size)
        target.copy_(part)
    return out


def _next_to_border(
    middle: torch.Tensor, axis: int, segment: str, count: int, stride_px: int
) -> torch.Tensor:
    """The two pixels of each patch's middle that touch its first or last segment (a view)."""
    first = 0 if segment == START else _middle_px(middle, axis, count, stride_px) - 2
    return _of_each_patch(middle, axis, count, first, 2, stride_px)


def _middle_px(middle: torch.Tensor, axis: int, count: int, stride_px: int) -> int:
    """Pixels of one patch's middle segment, given that of `count` patches together."""
    return middle.shape[1 + axis] - (count - 1) * stride_px


def _of_each_patch(
    middle: torch.Tensor, axis: int, count: int, first: int, size: int, stride_px: int
) -> torch.Tensor:
    """Pixels `first` to ``first + size`` of each patch's middle segment along one axis (a view)."""
    pixels, patches = 1 + axis, 3 * axis
    used = middle.narrow(pixels, first, (count - 1) * stride_px + size)
    windows = used.unfold(pixels, size, stride_px)  # patches in place of pixels, pixels at the end
    return windows.transpose(patches, pixels).transpose(pixels, -1).squeeze(-1)


def _joined(regions: Regions, lattice: tuple[int, int], stride_px: int) -> torch.Tensor:
    """Whole patches, put together from the regions: shape (rows, height, width, cols, filters)."""
    segments = [segment for segment in (START, MIDDLE, END) if (segment, MIDDLE) in regions]

    def whole(axis: int, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        middle = parts[MIDDLE]
        size = _middle_px(middle, axis, lattice[axis], stride_px)
        spread = _of_each_patch(middle, axis, lattice[axis], 0, size, stride_px)
        parts = parts | {MIDDLE: spread}
        return torch.cat([parts[segment] for segment in segments], 1 + axis)

    strips = {col: whole(0, {row: regions[row, col] for row in segments}) for col in segments}
    return whole(1, strips)


def _convolve(convolution: nn.Conv2d, region: torch.Tensor) -> torch.Tensor:
    """Convolution without padding of a region, and ReLU."""
    cols = region.shape[3]
    values = functional.conv2d(
        _as_image(region), convolution.weight, convolution.bias, dilation=(1, cols)
    )
    torch.relu_(values)
    return values.permute(0, 2, 3, 1).unflatten(2, (-1, cols))


def _as_image(region: torch.Tensor) -> torch.Tensor:
    """A region as a batch of rows of patches, interleaved, in torch's channels-last layout."""
    return region.flatten(2, 3).permute(0, 3, 1, 2)


def _as_patches(region: torch.Tensor) -> torch.Tensor:
    """Whole patches as a batch, in torch's channels-last layout."""
    return region.movedim(3, 1).flatten(0, 1).permute(0, 3, 1, 2)


def _read_out(subnet: Subnet, regions: Regions, stride_px: int) -> torch.Tensor:
    """The filters' linear models, as the sum of their parts over the regions, and tanh."""
    border_px = len(subnet.convolutions) if subnet.padding == "same" else 0
    inner_px = subnet.output_px - border_px
    spans = {
        START: slice(0, border_px),
        MIDDLE: slice(border_px, inner_px),
        END: slice(inner_px, None),
    }
    total = subnet.readout_bias[:, None, None]
    with torch.autocast(total.device.type, enabled=False):  # bfloat16 would be coarse
        for key, region in regions.items():
            weight = subnet.readout_weight[:, spans[key[0]], spans[key[1]]]
            down, right = (stride_px if segment == MIDDLE else 1 for segment in key)
            total = total + _weighted_sums(region.to(weight.dtype), weight, (down, right))
    return torch.tanh(total)


def _weighted_sums(
    region: torch.Tensor, weight: torch.Tensor, steps: tuple[int, int]
) -> torch.Tensor:
    """Each filter's dot product with its weights at every patch: (filters, rows, cols)."""
    sums = functional.conv2d(
        _as_image(region),
        weight[:, None],
        stride=steps,
        dilation=(1, region.shape[3]),
        groups=len(weight),
    )
    return sums.movedim(1, 0).flatten(1, 2)  # there is one row of patches or one of sums


def _is_shared(subnet: Subnet, layer: int, stride_px: int) -> bool:
    """Whether sharing costs no more than whole patches in a layer."""
    return _shared_px(subnet, layer, stride_px) <= _whole_px(subnet, layer)


def _shared_px(subnet: Subnet, layer: int, stride_px: int) -> int:
    """Pixels computed a patch along one axis when patches share: the borders and a step."""
    return stride_px + (2 * layer if subnet.padding == "same" else 0)


def _whole_px(subnet: Subnet, layer: int) -> int:
    """Side of a layer's output for a patch run alone."""
    return subnet.patch_px - (0 if subnet.padding == "same" else 2 * layer)


def _check_steps(**steps: int) -> None:
    for name, value in steps.items():
        if value < 1:
            raise ModelError(f"{name} is {value}: it must be 1 or more")
