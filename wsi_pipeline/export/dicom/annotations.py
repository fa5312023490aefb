"""Detections as DICOM Microscopy Bulk Simple Annotations."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from wsi_pipeline.export.dicom.instance import (
    algorithm,
    content_hash,
    deterministic_uid,
    instance_arguments,
    load_highdicom,
    slide_places_mm,
    write_instance,
)

if TYPE_CHECKING:
    from pydicom import Dataset

SERIES_NUMBER = 1003


def write_annotations(
    path, *, detections: pd.DataFrame, slide: "Dataset", model: str, created: datetime
) -> bool:
    """Write detections as DICOM Microscopy Bulk Simple Annotations, whole or not at all.

    Each detection is a point in the slide's frame of reference (3D, mm), with its probability as a
    measurement. The same arguments give the same file. DICOM has no empty annotations: without a
    detection no file is written, and a file of an earlier export is removed.

    Parameters
    ----------
    path : path-like
        Usually ends in ``.dcm``.
    detections : DataFrame
        ``probability, x, y``; x and y in level-0 px.
    slide : pydicom.Dataset
        From `read_slide_header`.
    model : str
        NAME@VERSION.
    created : datetime
        When the heatmap was made. Fractions of a second are left out.

    Returns
    -------
    bool
        Whether there is a file.

    Raises
    ------
    ExportError
        If highdicom is not installed.
    """
    highdicom = load_highdicom()
    from pydicom.sr.codedict import codes

    if detections.empty:
        Path(path).unlink(missing_ok=True)
        return False
    # Some viewers cannot read points in double precision; at 75 mm, float32 resolves 8 nm.
    points_mm = slide_places_mm(detections[["x", "y"]], slide).astype(np.float32)
    probabilities = detections["probability"].to_numpy(np.float32)
    arguments = instance_arguments(
        "Tumor detections", SERIES_NUMBER, slide=slide, model=model, created=created,
        content=content_hash(points_mm, probabilities),
    )  # fmt: skip
    group = highdicom.ann.AnnotationGroup(
        number=1,
        uid=deterministic_uid(arguments["sop_instance_uid"], "group"),
        label="Tumor detections",
        annotated_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        annotated_property_type=codes.SCT.Neoplasm,
        graphic_type="POINT",
        graphic_data=[point[np.newaxis] for point in points_mm],
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm(model),
        measurements=[
            highdicom.ann.Measurements(
                name=codes.DCM.ProbabilityOfCancer,
                values=probabilities,
                unit=codes.UCUM.NoUnits,
            )
        ],
    )
    annotations = highdicom.ann.MicroscopyBulkSimpleAnnotations(
        source_images=[slide],
        annotation_coordinate_type="3D",
        annotation_groups=[group],
        **arguments,
    )
    write_instance(path, annotations, created)
    return True
