"""The DICOM header that describes a slide: its own, or one made for a slide of another format."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_pipeline.errors import ExportError
from wsi_pipeline.export.dicom.instance import (
    LONG_STRING,
    TILE_PX,
    deterministic_uid,
    load_highdicom,
)
from wsi_pipeline.geometry import level0_to_um

if TYPE_CHECKING:
    from pydicom import Dataset

WHOLE_SLIDE_IMAGE = "1.2.840.10008.5.1.4.1.1.77.1.6"
"""SOP class of VL Whole Slide Microscopy Images."""
SECTION_THICKNESS_MM = 0.001
"""Stated where the slide states none: an image of a slide needs a thickness."""
NEEDED = (
    "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID",
    "FrameOfReferenceUID", "ImageOrientationSlide", "Rows", "Columns",
    "TotalPixelMatrixColumns", "TotalPixelMatrixRows", "SharedFunctionalGroupsSequence",
)  # fmt: skip
MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate",
    "StudyTime", "AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator",
)  # fmt: skip
"""Every DICOM object has these. De-identified slides may lack them."""
CONTAINER_SEQUENCES = "IssuerOfTheContainerIdentifierSequence", "ContainerTypeCodeSequence"
SPECIMEN_SEQUENCES = "IssuerOfTheSpecimenIdentifierSequence", "SpecimenPreparationSequence"
"""These may be empty as well."""
USUAL_ORIENTATION = 0, -1, 0, -1, 0, 0
USUAL_ORIGIN_MM = 25, 50
"""Where wsidicom places slides of unknown position: rows run along the slide, from its far end."""
SAMPLED_BYTES = 1 << 20
"""Read from each end of a file, to identify it."""


def read_slide_header(path, *, slide_id: str, slide_size: tuple[int, int], mpp: float) -> "Dataset":
    """Read the header of a DICOM slide's finest level, or make one for another format.

    A header that is made has the slide's size and resolution. Its UIDs depend only on the file's
    content: its length, its first and its last MiB. The same file has the same UIDs on every
    machine and under every name. Patient and study are left empty.

    Parameters
    ----------
    path : path-like
        The slide. One file of a DICOM slide is enough: the others of its series are looked for in
        the same folder, as OpenSlide does.
    slide_id : str
        Identifies the slide's container and specimen in a header that is made.
    slide_size : (int, int)
        Width and height of the slide's level-0 frame, px.
    mpp : float
        Micrometres per level-0 px in a header that is made. A DICOM slide's own pixel spacing is
        kept, because it belongs to the slide's frame of reference.

    Returns
    -------
    pydicom.Dataset
        Without pixels. Level-0 px are coordinates in its total pixel matrix.

    Raises
    ------
    ExportError
        If highdicom is not installed, or the header of a DICOM slide lacks what places an image on
        the slide, or states another size.
    """
    load_highdicom()
    from pydicom.misc import is_dicom

    path = Path(path)
    if not is_dicom(path):
        return _made_header(path, slide_id, slide_size, mpp)
    header = _finest_level(path)
    _check(header, path, slide_size)
    return _completed(header, slide_id)


def _finest_level(path: Path) -> "Dataset":
    """The header of the largest image of the slide's series."""
    from pydicom import dcmread

    given = dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
    levels = dict(_level_widths(path.parent, given.get("SeriesInstanceUID")))
    if not levels:
        raise ExportError(
            f"{path}: its series holds no whole slide image (ImageType VOLUME). Give a file of the"
            " slide's levels"
        )
    header = dcmread(max(levels, key=lambda file: levels[file]), stop_before_pixels=True)
    header.decode()  # texts are written in another character set
    return header


def _level_widths(folder: Path, series: str | None) -> Iterator[tuple[Path, int]]:
    """Files and widths of a slide's levels, without label, overview and thumbnail."""
    from pydicom import dcmread
    from pydicom.misc import is_dicom

    stated = ["SOPClassUID", "SeriesInstanceUID", "ImageType", "TotalPixelMatrixColumns"]
    for file in sorted(folder.iterdir()):
        if not (file.is_file() and is_dicom(file)):
            continue
        found = dcmread(file, stop_before_pixels=True, specific_tags=stated)
        is_level = "VOLUME" in found.get("ImageType", []) and "THUMBNAIL" not in found.ImageType
        if (
            found.get("SOPClassUID") == WHOLE_SLIDE_IMAGE
            and found.get("SeriesInstanceUID") == series
            and is_level
        ):
            yield file, int(found.get("TotalPixelMatrixColumns", 0))


def _check(header: "Dataset", path: Path, slide_size: tuple[int, int]) -> None:
    missing = [name for name in NEEDED if not header.get(name)]
    if not missing and not _pixel_measures(header).get("PixelSpacing"):
        missing = ["PixelSpacing"]
    if missing:
        raise ExportError(
            f"{path}: its DICOM header lacks {', '.join(missing)}. Without it a heatmap has no"
            " place on the slide. Repair the slide's header"
        )
    size = header.TotalPixelMatrixColumns, header.TotalPixelMatrixRows
    if size != tuple(slide_size):
        raise ExportError(
            f"{path}: its finest level has {size[0]} x {size[1]} px, but the slide"
            f" {slide_size[0]} x {slide_size[1]} px. Keep one slide's files in a folder"
        )


def _pixel_measures(header: "Dataset") -> Any:
    from pydicom import Dataset

    found = header.SharedFunctionalGroupsSequence[0].get("PixelMeasuresSequence")
    return found[0] if found else Dataset()


def _completed(header: "Dataset", slide_id: str) -> "Dataset":
    """Add what a slide may lack and the objects need; nothing that is there is changed."""
    from pydicom import Dataset

    for name in MAY_BE_EMPTY:
        if name not in header:
            setattr(header, name, "")
    if not header.get("TotalPixelMatrixOriginSequence"):
        header.TotalPixelMatrixOriginSequence = [_origin(0, 0)]
    measures = _pixel_measures(header)
    if not measures.get("SliceThickness"):
        measures.SliceThickness = SECTION_THICKNESS_MM
    if not header.get("ContainerIdentifier"):
        header.ContainerIdentifier = slide_id[:LONG_STRING]
    if not header.get("SpecimenDescriptionSequence"):
        specimen = Dataset()
        specimen.SpecimenIdentifier = header.ContainerIdentifier
        specimen.SpecimenUID = deterministic_uid("SpecimenUID", header.SOPInstanceUID)
        header.SpecimenDescriptionSequence = [specimen]
    may_be_empty = [(header, name) for name in CONTAINER_SEQUENCES] + [
        (specimen, name)
        for specimen in header.SpecimenDescriptionSequence
        for name in SPECIMEN_SEQUENCES
    ]
    for dataset, name in may_be_empty:
        if name not in dataset:
            setattr(dataset, name, [])
    return header


def _origin(x_mm: float, y_mm: float) -> "Dataset":
    from pydicom import Dataset

    origin = Dataset()
    origin.XOffsetInSlideCoordinateSystem = x_mm
    origin.YOffsetInSlideCoordinateSystem = y_mm
    return origin


def _made_header(path: Path, slide_id: str, slide_size: tuple[int, int], mpp: float) -> "Dataset":
    """The header that a whole slide image of the same size and resolution would have."""
    from pydicom import Dataset
    from pydicom.valuerep import DS

    content = _fingerprint(path)
    header, shared, measures = (Dataset() for _ in range(3))
    header.SOPClassUID = WHOLE_SLIDE_IMAGE
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        setattr(header, name, deterministic_uid(name, content))
    header.Modality, header.ImageType = "SM", ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    header.ImageOrientationSlide = list(USUAL_ORIENTATION)
    header.TotalPixelMatrixOriginSequence = [_origin(*USUAL_ORIGIN_MM)]
    header.TotalPixelMatrixColumns, header.TotalPixelMatrixRows = slide_size
    header.Columns = header.Rows = TILE_PX  # a converter's tiles may be others
    header.NumberOfFrames = math.prod(-(-side // TILE_PX) for side in slide_size)
    header.DimensionOrganizationType = "TILED_FULL"
    measures.PixelSpacing = [DS(level0_to_um(1, mpp) / 1000, auto_format=True)] * 2
    shared.PixelMeasuresSequence = [measures]
    header.SharedFunctionalGroupsSequence = [shared]
    return _completed(header, slide_id)


def _fingerprint(path: Path) -> str:
    """Of a slide's content; quick for files of gigabytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        length = file.seek(0, 2)
        digest.update(str(length).encode())
        for start in (0, max(0, length - SAMPLED_BYTES)):
            file.seek(start)
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()
