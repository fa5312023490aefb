"""Heatmaps, regions and detections as DICOM objects, in the slide's frame of reference.

Needs the optional library highdicom: ``pip install "wsi_pipeline[dicom]"``.
"""

from wsi_pipeline.export.dicom.annotations import write_annotations
from wsi_pipeline.export.dicom.parametric_map import write_parametric_map
from wsi_pipeline.export.dicom.segmentation import write_segmentation
from wsi_pipeline.export.dicom.slide_header import read_slide_header

__all__ = [
    "read_slide_header",
    "write_annotations",
    "write_parametric_map",
    "write_segmentation",
]
