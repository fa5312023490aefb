"""Regions of a heatmap as DICOM Segmentations."""

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_pipeline.export.dicom.instance import (
    algorithm,
    content_hash,
    deterministic_uid,
    instance_arguments,
    load_highdicom,
    placed_on_slide,
    write_instance,
)
from wsi_pipeline.geometry import PatchGrid

if TYPE_CHECKING:
    from pydicom import Dataset

SERIES_NUMBER = 1002


def write_segmentation(
    path, *, values: np.ndarray, grid: PatchGrid, thresholds: Sequence[float],
    slide: "Dataset", model: str, created: datetime,
) -> None:  # fmt: skip
    """Write the regions of a heatmap as a binary DICOM Segmentation, whole or not at all.

    Each threshold is a segment: the heatmap pixels with a probability >= the threshold. These are
    the pixels that `heatmap_regions` outlines. The same arguments give the same file.

    Parameters
    ----------
    path : path-like
        Usually ends in ``.dcm``.
    values : float array, shape `grid.shape`
        Level 0 of the heatmap, in [0, 1]; NaN is in no segment.
    grid : PatchGrid
    thresholds : sequence of float
        At least one. Segments are numbered from 1 in this order.
    slide : pydicom.Dataset
        From `read_slide_header`.
    model : str
        NAME@VERSION.
    created : datetime
        When the heatmap was made. Fractions of a second are left out.

    Raises
    ------
    ExportError
        If highdicom is not installed.
    """
    highdicom = load_highdicom()
    values = np.asarray(values, np.float64)  # as `heatmap_regions` compares them
    masks = np.stack([values >= threshold for threshold in thresholds], axis=-1)
    arguments = instance_arguments(
        "Tumor regions", SERIES_NUMBER, slide=slide, model=model, created=created,
        content=content_hash(masks, grid, tuple(thresholds)),
    )  # fmt: skip
    segmentation = highdicom.seg.Segmentation(
        source_images=[slide],
        pixel_array=masks[np.newaxis].astype(np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=[
            _segment(number, threshold, model, arguments["sop_instance_uid"])
            for number, threshold in enumerate(thresholds, start=1)
        ],
        omit_empty_frames=False,
        **placed_on_slide(grid, slide),
        **arguments,
    )
    segmentation.PatientOrientation = ""  # must be there; it does not apply to slides
    write_instance(path, segmentation, created)


def _segment(number: int, threshold: float, model: str, instance_uid: str) -> Any:
    highdicom = load_highdicom()
    from pydicom.sr.codedict import codes

    label = f"probability >= {threshold:g}"
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=label,
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Neoplasm,
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm(model),
        tracking_uid=deterministic_uid(instance_uid, label),
        tracking_id=label,
    )
