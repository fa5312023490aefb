"""What all DICOM objects of an export share: UIDs, maker, place on the slide, writing."""

import hashlib
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

import wsi_pipeline
from wsi_pipeline.errors import ExportError
from wsi_pipeline.files import replace_atomically
from wsi_pipeline.geometry import PatchGrid

if TYPE_CHECKING:
    from pydicom import Dataset

TILE_PX = 256
MAKER = "wsi_pipeline"
LONG_STRING = 64
"""Characters that DICOM allows in a name or label."""


def load_highdicom() -> Any:
    """Import highdicom.

    Raises
    ------
    ExportError
        If it is not installed.
    """
    try:
        import highdicom
    except ImportError as error:
        raise ExportError(
            f"a DICOM export needs highdicom ({error}). Install it: pip install"
            ' "wsi_pipeline[dicom]"'
        ) from error
    return highdicom


def deterministic_uid(*sources: str) -> str:
    """A UID that depends on nothing but the sources."""
    from pydicom.uid import generate_uid

    return generate_uid(entropy_srcs=[MAKER, *sources])


def content_hash(*parts) -> str:
    """Of what an object holds: arrays by their values, the rest by its text."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()


def algorithm(model: str) -> Any:
    """Identify the model, NAME@VERSION, as the algorithm that found something."""
    highdicom = load_highdicom()
    from pydicom.sr.codedict import codes

    name, _, version = model.partition("@")
    return highdicom.AlgorithmIdentificationSequence(
        name=name[:LONG_STRING],
        version=version[:LONG_STRING] or "unknown",
        family=codes.DCM.ArtificialIntelligence,
        source=MAKER,
    )


def instance_arguments(
    kind: str, number: int, *, slide: "Dataset", model: str, created: datetime, content: str
) -> dict[str, Any]:
    """The arguments that every object's constructor takes.

    Parameters
    ----------
    kind : str
        What the object shows, such as "Tumor map": 16 characters at most.
    number : int
        Of the series.
    slide : pydicom.Dataset
        From `read_slide_header`.
    model : str
        NAME@VERSION.
    created : datetime
        When the heatmap was made.
    content : str
        Hash of what the object holds.
    """
    # A series of its own: viewers take the maps of one series for the levels of a pyramid.
    series = deterministic_uid(slide.SOPInstanceUID, model, kind, content)
    return {
        "series_instance_uid": series,
        "series_number": number,
        "series_description": f"{kind} ({model})"[:LONG_STRING],
        "series_date": created.date(),
        "series_time": created.time().replace(microsecond=0),
        "sop_instance_uid": deterministic_uid(series, "SOPInstanceUID"),
        "instance_number": 1,
        "content_date": created.date(),
        "content_time": created.time().replace(microsecond=0),
        "content_label": kind.upper().replace(" ", "_"),
        "content_description": f"{kind} by the model {model}"[:LONG_STRING],
        "manufacturer": MAKER,
        "manufacturer_model_name": MAKER,
        "software_versions": wsi_pipeline.__version__,
        "device_serial_number": model[-LONG_STRING:],
        "specific_character_set": "ISO_IR 192",
    }


def placed_on_slide(grid: PatchGrid, slide: "Dataset") -> dict[str, Any]:
    """The arguments that place a heatmap's pixels in the slide's frame of reference, as tiles.

    Every tile states its place: validators of 2022 reject TILED_FULL, which would leave it out.
    """
    highdicom = load_highdicom()
    measures = slide.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    step = grid.level0_length(grid.stride_px)
    spacing_mm = [step * float(level0_mm) for level0_mm in measures.PixelSpacing]
    (position_mm,) = slide_places_mm(grid.heatmap_points([[0.5, 0.5]]), slide)
    return {
        "pixel_measures": highdicom.PixelMeasuresSequence(
            pixel_spacing=spacing_mm, slice_thickness=float(measures.SliceThickness)
        ),
        "plane_orientation": highdicom.PlaneOrientationSequence(
            "SLIDE", [float(cosine) for cosine in slide.ImageOrientationSlide]
        ),
        "plane_positions": [highdicom.PlanePositionSequence("SLIDE", position_mm, (1, 1))],
        "dimension_organization_type": "TILED_SPARSE",
        "tile_pixel_array": True,
        "tile_size": (TILE_PX, TILE_PX),
    }


def slide_places_mm(points_level0, slide: "Dataset") -> np.ndarray:
    """Places in the slide's frame of reference of points in level-0 px.

    The origin of the total pixel matrix is the centre of its first pixel, which covers level-0 px 0
    to 1 (PS3.3, C.8.12.14.1.2).

    Parameters
    ----------
    points_level0 : array_like, shape (N, 2)
        x, y.
    slide : pydicom.Dataset

    Returns
    -------
    float64 array, shape (N, 3)
        x, y, z, mm.
    """
    from highdicom.spatial import ImageToReferenceTransformer

    origin = slide.TotalPixelMatrixOriginSequence[0]
    measures = slide.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    offsets_mm = (origin.get(f"{axis}OffsetInSlideCoordinateSystem") or 0 for axis in "XYZ")
    transform = ImageToReferenceTransformer(
        image_position=[float(offset) for offset in offsets_mm],
        image_orientation=[float(cosine) for cosine in slide.ImageOrientationSlide],
        pixel_spacing=[float(side) for side in measures.PixelSpacing],
    )
    return transform(np.asarray(points_level0, np.float64))


def write_instance(path, instance: "Dataset", created: datetime) -> None:
    """Write an object, whole or not at all, without the time of writing and without random UIDs."""
    from pydicom.valuerep import DA, DT, TM

    created = created.replace(microsecond=0)
    instance.InstanceCreationDate = DA(created.date())
    instance.InstanceCreationTime = TM(created.time())
    for item in instance.ContributingEquipmentSequence:
        if item.get("ManufacturerModelName") == "highdicom":
            item.ContributionDateTime = DT(created)
    organization = deterministic_uid(instance.SOPInstanceUID, "DimensionOrganizationUID")
    for name in ("DimensionOrganizationSequence", "DimensionIndexSequence"):
        for item in instance.get(name) or ():
            item.DimensionOrganizationUID = organization
    with replace_atomically(path) as part:
        instance.save_as(part)
