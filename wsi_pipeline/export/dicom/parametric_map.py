"""Heatmaps as DICOM Parametric Maps."""

from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np

from wsi_pipeline.export.dicom.instance import (
    content_hash,
    instance_arguments,
    load_highdicom,
    placed_on_slide,
    write_instance,
)
from wsi_pipeline.geometry import PatchGrid

if TYPE_CHECKING:
    from pydicom import Dataset

SERIES_NUMBER = 1001


def write_parametric_map(
    path, *, values: np.ndarray, grid: PatchGrid, slide: "Dataset", model: str, created: datetime
) -> None:
    """Write a heatmap as a DICOM Parametric Map, whole or not at all.

    Its float32 pixels are probabilities without a unit, in tiles, placed in the slide's frame of
    reference. NaN marks pixels without a prediction. The file does not state NaN as its padding
    value, which is optional: JSON has no NaN, so a web archive could not send the header. The same
    arguments give the same file.

    Parameters
    ----------
    path : path-like
        Usually ends in ``.dcm``.
    values : float array, shape `grid.shape`
        Level 0 of the heatmap, in [0, 1]; NaN where nothing was predicted.
    grid : PatchGrid
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
    from pydicom.sr.codedict import codes

    values = np.ascontiguousarray(values, np.float32)
    probability = highdicom.pm.RealWorldValueMapping(
        lut_label="PROBABILITY",
        lut_explanation="Probability of tumor",
        unit=codes.UCUM.NoUnits,
        value_range=(0.0, 1.0),
        slope=1.0,
        intercept=0.0,
        quantity_definition=codes.DCM.ProbabilityOfCancer,
    )
    parametric_map = highdicom.pm.ParametricMap(
        source_images=[slide],
        pixel_array=values,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[probability],
        voi_lut_transformations=[
            highdicom.VOILUTTransformation(window_center=0.5, window_width=1.0)
        ],
        **placed_on_slide(grid, slide),
        **instance_arguments(
            "Tumor map", SERIES_NUMBER, slide=slide, model=model, created=created,
            content=content_hash(values, grid),
        ),
    )  # fmt: skip
    write_instance(path, parametric_map, created)
