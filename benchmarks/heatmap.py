"""Models on batches of patches."""

import numpy as np
import torch

from benchmarks.measure import Row, compare
from wsi_pipeline.models.inference import predictor, use_mixed_precision
from wsi_pipeline.models.start import start_model
from wsi_pipeline.models.vgg16 import IMAGENET_MEAN, IMAGENET_STD


def rows(quick: bool) -> list[Row]:
    """VGG16."""
    return [inference()]


def inference() -> Row:
    """VGG16 on 128 px patches as heatmaps run it, against plain float32."""
    patches = np.random.default_rng(0).integers(0, 256, (32, 128, 128, 3), np.uint8)
    module = start_model("vgg16", "none")
    scaling = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = predictor(
        start_model("vgg16", "none"), **scaling, device=device,
        mixed_precision=use_mixed_precision(device, None),
    )  # fmt: skip
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in scaling.values())
    module = module.to(device).eval()

    def pipeline() -> int:
        ours(patches)
        return len(patches)

    def plain() -> int:
        images = torch.from_numpy(patches).to(device).permute(0, 3, 1, 2).contiguous() / 255
        with torch.no_grad():
            torch.sigmoid(module((images - mean) / std)).cpu()
        return len(patches)

    pipeline(), plain()
    return compare(
        f"VGG16 on 128 px patches ({device})", "float32, contiguous", "patches", pipeline, plain
    )
