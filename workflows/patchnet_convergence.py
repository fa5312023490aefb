"""PatchNet on the paper's black images and images with a white corner (its appendix A).

    python workflows/patchnet_convergence.py [--out patchnet_convergence.png]

Patches that an image of class 1 shares with those of class 0 end at a Q of (a - b) / 2a, where b
of its a + b patches bear the white; those that do bear it end at 1. The picture shows heatmaps
after training beside these values.
"""

import argparse
from fractions import Fraction
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from wsi_pipeline.models.patchnet import PatchNet, cut_patches, logit_of_mean
from wsi_pipeline.models.patchnet_heatmaps import global_heatmap

SIDE_PX, PATCH_PX = 128, 17
SQUARES = {Fraction(1, 16): (32, 32), Fraction(1, 4): (64, 64), Fraction(1, 2): (64, 128)}
"""Share of the patches that bear the white, and its height and width, px."""


def closed_form(share: Fraction) -> Fraction:
    """Q of a black patch at convergence, max(0, (a - b) / 2a), for a share b / (a + b) of white."""
    return max(Fraction(0), (1 - 2 * share) / (2 * (1 - share)))


def black_and_white(height: int, width: int) -> torch.Tensor:
    """Images of both classes: float (2, 1, 128, 128), the second with its upper left part 1."""
    images = torch.zeros(2, 1, SIDE_PX, SIDE_PX)
    images[1, :, :height, :width] = 1
    return images


def trained(images: torch.Tensor, *, seed: int = 0, steps: int = 400) -> PatchNet:
    """Train on both images by the paper's settings (Adam, learning rate 1e-4).

    Most of the images' patches are alike. Each distinct one goes through the subnet once and
    counts as often as it occurs: the loss and its gradient are those of `PatchNet.forward`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = PatchNet(PATCH_PX, PATCH_PX, channels=1)
    patches = distinct_patches(images)
    descent = torch.optim.Adam(module.parameters(), lr=1e-4)
    for _ in range(steps):
        descent.zero_grad()
        loss_of_distinct(module, *patches).backward()
        descent.step()
    return module.eval()


def distinct_patches(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The images' different patches, and for each patch of both which of them it is."""
    covered = pad(images, (0, -SIDE_PX % PATCH_PX) * 2)
    patches = cut_patches(covered, PATCH_PX, PATCH_PX)
    return patches.flatten(0, 1).unique(dim=0, return_inverse=True)


def loss_of_distinct(module: PatchNet, distinct: torch.Tensor, which: torch.Tensor):
    """Cross-entropy of both images, the first of class 0, from their different patches."""
    logits = logit_of_mean(module.subnet(distinct)[which].unflatten(0, (2, -1)))
    return binary_cross_entropy_with_logits(logits, torch.tensor([0.0, 1.0]))


def black_and_white_q(module: PatchNet) -> tuple[float, float]:
    """Q of a black and of a white patch."""
    patches = torch.stack([torch.zeros(1, PATCH_PX, PATCH_PX), torch.ones(1, PATCH_PX, PATCH_PX)])
    with torch.no_grad():
        return tuple(torch.sigmoid(module.subnet(patches)).tolist())


def main() -> None:
    """Train on each square and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("patchnet_convergence.png"))
    out = parser.parse_args().out
    figure = Figure(figsize=(11, 7), layout="constrained")
    columns = figure.subplots(2, len(SQUARES), sharex=True, sharey=True).T
    for (above, below), (share, square) in zip(columns, SQUARES.items(), strict=True):
        image = black_and_white(*square)
        module = trained(image)
        black, white = black_and_white_q(module)
        expected = float(closed_form(share))
        above.imshow(image[1, 0], cmap="gray", vmin=0, vmax=1)
        above.set_title(f"{share} of the patches bear white", fontsize=10)
        shown = below.imshow(global_heatmap(module.subnet, image[1]), cmap="gray", vmin=0, vmax=1)
        below.set_title(
            f"Q after training (closed form)\n"
            f"black patch {black:.3f} ({expected:.3f}), white {white:.3f} (1)",
            fontsize=10,
        )
        for axes in (above, below):
            axes.set_xticks([])
            axes.set_yticks([])
        print(f"{share}: black {black:.3f} ({expected:.3f}), white {white:.3f} (1)")
    figure.colorbar(shown, ax=columns[:, 1], label="Q of the patch centred at the pixel")
    columns[0][0].set_ylabel("image")
    columns[0][1].set_ylabel("global heatmap")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
