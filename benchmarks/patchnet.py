"""PatchNet on the patch of every pixel."""

from collections.abc import Callable

import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Row, compare, rate
from wsi_pipeline.models.dense import dense_logits
from wsi_pipeline.models.patchnet import Subnet, cut_patches


def rows(quick: bool) -> list[Row]:
    """Patches of three sizes; quick: of the smallest."""
    sizes_px = (17,) if quick else (17, 21, 31)
    return [row for patch_px in sizes_px for row in dense_patchnet(patch_px)]


def dense_patchnet(patch_px: int) -> list[Row]:
    """PatchNet on the patch of every pixel of an image, against batches of patches.

    All in float32 and channels-last, so that the first ratio is that of the work, less what
    sharing costs; its baseline is the fastest of several batch sizes. The second row holds the
    arithmetic against that of a plain convolution: a ratio of 1 would be all a convolution gives.
    A GPU has a third row, for bfloat16.
    """
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subnet = Subnet(patch_px).to(device, memory_format=torch.channels_last).eval()
    side = 64
    image = torch.rand(3, side + patch_px - 1, side + patch_px - 1, device=device)

    def dense() -> int:
        dense_logits(subnet, image, 1).cpu()  # which waits for the device
        return side * side

    dense()
    what = f"PatchNet of {patch_px} px patches at stride 1 ({device}"
    operations = _operations(dense)
    alone = image[None, :, :patch_px, :patch_px]
    less = side**2 * _operations(lambda: subnet(alone)) / operations
    baseline, plain = _fastest_batches(subnet, image)
    convolve = _plain_convolution(image)
    rows = [
        compare(f"{what}; {less:.1f} times less work)", baseline, "patches", dense, plain, 5),
        compare(
            f"{what}), its arithmetic", f"a convolution 64 to 64 of {image.shape[-1]} px", "GFLOP",
            lambda: 1e-9 * operations * dense() / side**2, convolve, 5,
        ),
    ]  # fmt: skip
    return rows + ([_dense_bfloat16(what, subnet, image, dense)] if device == "cuda" else [])


def _operations(work: Callable[[], object]) -> int:
    """Multiplications and additions, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def _fastest_batches(subnet: Subnet, image: torch.Tensor) -> tuple[str, Callable[[], int]]:
    """Patches one by one in the batches, of some sizes, that take the least time: name and run."""
    patches = cut_patches(image[None], subnet.patch_px, 1)[0]
    patches = patches.contiguous(memory_format=torch.channels_last)

    def run(batch: int) -> int:
        chosen = patches[: max(batch, 64)]
        with torch.no_grad():
            torch.cat([subnet(part) for part in chosen.split(batch)]).cpu()
        return len(chosen)

    def tried(batch: int) -> float:
        run(batch)
        return max(rate(lambda: run(batch)) for _ in range(3))

    sizes = (4, 8, 16, 32, 64) if image.device.type == "cpu" else (64, 256, 1024)
    batch = max(sizes, key=tried)
    return f"batches of {batch} patches", lambda: run(batch)


def _plain_convolution(image: torch.Tensor) -> Callable[[], float]:
    """A convolution 64 to 64, 3 x 3, float32, channels-last, of the image's size; GFLOP done."""
    size, times = image.shape[-1], 20
    weight = torch.rand(64, 64, 3, 3, device=image.device)
    values = torch.rand(1, 64, size, size, device=image.device)
    weight, values = (t.contiguous(memory_format=torch.channels_last) for t in (weight, values))

    def run() -> float:
        for _ in range(times):
            result = functional.conv2d(values, weight)
        result[0, 0, 0, 0].cpu()  # waits for all of them
        return 2e-9 * times * weight.numel() * (size - 2) ** 2

    run()
    return run


def _dense_bfloat16(
    what: str, subnet: Subnet, image: torch.Tensor, dense: Callable[[], int]
) -> Row:
    """The dense evaluation under autocast, with its largest difference of Q, against float32."""

    def logits() -> torch.Tensor:
        with torch.autocast(image.device.type, torch.bfloat16):
            return dense_logits(subnet, image, 1).cpu()

    exact = torch.sigmoid(dense_logits(subnet, image, 1).cpu())
    difference = (torch.sigmoid(logits()) - exact).abs().max().item()
    return compare(
        f"{what}; bfloat16, Q off by at most {difference:.1g})", "the same in float32", "patches",
        lambda: logits().numel(), dense, 5,
    )  # fmt: skip
