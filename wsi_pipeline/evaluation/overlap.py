"""How well heatmaps lie over masks: the PatchNet paper's overlap statistics, and two more.

The paper (its appendix E) averages three figures over images: exact match, recall and AUROC. Two
more are common where explanation methods are ranked: the pointing game (Zhang et al., Top-down
neural attention by excitation backprop, ECCV 2016) and the energy inside (Wang et al., Score-CAM,
CVPR workshops 2020, "energy-based pointing game").
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from wsi_pipeline.errors import RunError

STATISTICS = ("exact_match", "recall", "auroc", "pointing_game", "energy_inside")
ROUND_UP_FROM = 0.5


def overlap(heatmaps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> pd.DataFrame:
    """Overlap statistics of each heatmap with the mask of what it should find.

    A heatmap rounds to 1 from 0.5 on: 0.5 itself is 1 (numpy's `round` would make it 0, since it
    rounds halves to even).

    Parameters
    ----------
    heatmaps : sequence of float arrays, shapes (H, W)
        In 0..1; NaN: not predicted, the pixel is left out. Sizes may differ between images.
    masks : sequence of bool arrays, of the same shapes

    Returns
    -------
    DataFrame
        A row for each image, in order; float64. A figure is NaN where it is undefined: all of
        them in an image without any predicted pixel, and as follows, always of the pixels that
        are predicted.

        - ``exact_match``: share of the pixels where the rounded heatmap equals the mask.
        - ``recall``: share of the mask's pixels where the rounded heatmap is 1. NaN for an empty
          mask.
        - ``auroc``: area under the ROC curve of the heatmap, not rounded, as a score of the
          mask's pixels. NaN for an empty or a full mask.
        - ``pointing_game``: 1 if the heatmap's highest pixel lies in the mask, else 0; of several
          equally high ones, the share that does. NaN for an empty mask: there is nothing to
          point at.
        - ``energy_inside``: share of the heatmap's sum that lies in the mask. NaN for a heatmap
          of zeros and for an empty mask.

    Raises
    ------
    RunError
        If there are more of one than of the other, a heatmap is not two-dimensional or of
        another shape than its mask, a value is outside 0..1, or a mask is not bool. The message
        has the image's place in the sequence, from 0.
    """
    if len(heatmaps) != len(masks):
        raise RunError(f"{len(heatmaps)} heatmaps and {len(masks)} masks: each needs the other")
    rows = [
        _statistics(*_predicted(np.asarray(heatmap), np.asarray(mask), image))
        for image, (heatmap, mask) in enumerate(zip(heatmaps, masks, strict=True))
    ]
    return pd.DataFrame(rows, columns=list(STATISTICS), dtype=np.float64)


def average_overlap(frame: pd.DataFrame) -> pd.DataFrame:
    """Overlap statistics averaged over images, each over those in which it is defined.

    The paper does so for recall (its section 3: over the 90 of 150 images with a mask).

    Parameters
    ----------
    frame : DataFrame
        Of `overlap`; further columns are passed over.

    Returns
    -------
    DataFrame
        ``mean`` (float64, NaN without an image) and ``images`` (int64, how many the mean is of);
        a row for each statistic, by its name.
    """
    figures = frame[list(STATISTICS)]
    return pd.DataFrame({"mean": figures.mean(), "images": figures.count()})


def _predicted(heatmap: np.ndarray, mask: np.ndarray, image: int) -> tuple[np.ndarray, np.ndarray]:
    """Values (float64) and truth (bool) of the pixels with a value, checked."""
    if heatmap.ndim != 2 or heatmap.shape != mask.shape:
        raise RunError(
            f"image {image}: the heatmap's shape is {heatmap.shape}, the mask's {mask.shape}:"
            " both must be the same (H, W)"
        )
    if mask.dtype != bool:
        raise RunError(f"image {image}: the mask is {mask.dtype}: it must be bool")
    known = ~np.isnan(heatmap)
    values = heatmap[known].astype(np.float64)
    outside = values[(values < 0) | (values > 1)]
    if outside.size:
        raise RunError(f"image {image}: the heatmap has the value {outside[0]:g}, not in 0..1")
    return values, mask[known]


def _statistics(values: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The figures that are defined."""
    if not values.size:
        return {}
    found = values >= ROUND_UP_FROM
    figures = {"exact_match": np.mean(found == truth)}
    if truth.any():
        figures["recall"] = found[truth].mean()
        figures["pointing_game"] = truth[values == values.max()].mean()
        if values.any():
            figures["energy_inside"] = values[truth].sum() / values.sum()
        if not truth.all():
            figures["auroc"] = roc_auc_score(truth, values)
    return figures
