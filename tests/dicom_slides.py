"""DICOM slides with known headers, made for tests."""

import io
from pathlib import Path

from PIL import Image


def write_dicom_slide(
    folder, pixels, *, mpp, orientation, origin_mm, levels=2, tile=256,
    **header,
) -> Path:  # fmt: skip
    """Write an image as the levels of a DICOM slide, each half the size of the one before.

    The files' names follow no order of size, and a label lies beside them. `header` adds elements
    by keyword. Returns the path of the coarsest level.
    """
    from pydicom.uid import generate_uid

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    uids = {
        name: generate_uid(entropy_srcs=[str(folder.name), name])
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
    }
    image = Image.fromarray(pixels)
    for level in range(levels):
        size = tuple(-(-side // 2**level) for side in image.size)
        path = folder / f"{(level + 1) % levels}.dcm"
        _write_level(
            path, image.resize(size), tile, mpp * 2**level, "VOLUME", level + 1, orientation,
            origin_mm, {**uids, **header},
        )  # fmt: skip
    label = Image.new("RGB", tuple(side * 2 for side in image.size))  # larger than the slide
    _write_level(
        folder / "label.dcm", label, max(label.size), mpp, "LABEL", levels + 1, orientation,
        origin_mm, {**uids, **header},
    )  # fmt: skip
    return path


def _write_level(path, image, tile, mpp, flavor, number, orientation, origin_mm, header):
    from pydicom import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit, generate_uid

    width, height = image.size
    frames = []
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            part = Image.new("RGB", (tile, tile), "white")
            part.paste(image.crop((x, y, min(x + tile, width), min(y + tile, height))))
            part.save(stream := io.BytesIO(), "JPEG", quality=90)
            frames.append(stream.getvalue() + b"\0" * (len(stream.getvalue()) % 2))

    measures, shared, origin, specimen, optical, code = (Dataset() for _ in range(6))
    measures.PixelSpacing, measures.SliceThickness = [mpp / 1000] * 2, 0.004
    shared.PixelMeasuresSequence = [measures]
    origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem = origin_mm
    specimen.SpecimenIdentifier, specimen.SpecimenUID = "S1-A", generate_uid(entropy_srcs=["S1"])
    specimen.IssuerOfTheSpecimenIdentifierSequence = specimen.SpecimenPreparationSequence = []
    code.CodeValue, code.CodingSchemeDesignator = "111744", "DCM"
    code.CodeMeaning = "Brightfield illumination"
    optical.OpticalPathIdentifier, optical.IlluminationTypeCodeSequence = "1", [code]
    optical.OpticalPathDescription = "Brightfield"

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    ds.SOPInstanceUID = generate_uid(entropy_srcs=[str(header), flavor, str(number)])
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.ImageType = ["ORIGINAL", "PRIMARY", flavor, "RESAMPLED" if number > 1 else "NONE"]
    ds.Modality, ds.Manufacturer, ds.InstanceNumber, ds.SeriesNumber = "SM", "Scanner", number, 1
    ds.ContainerIdentifier = "S1-A-1"
    ds.IssuerOfTheContainerIdentifierSequence = ds.ContainerTypeCodeSequence = []
    ds.SpecimenDescriptionSequence = [specimen]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "YBR_FULL_422", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.Rows = ds.Columns = tile
    ds.NumberOfFrames, ds.DimensionOrganizationType = len(frames), "TILED_FULL"
    ds.TotalPixelMatrixColumns, ds.TotalPixelMatrixRows = width, height
    ds.TotalPixelMatrixOriginSequence, ds.ImageOrientationSlide = [origin], list(orientation)
    ds.ImagedVolumeWidth, ds.ImagedVolumeHeight = width * mpp / 1000, height * mpp / 1000
    ds.ImagedVolumeDepth, ds.TotalPixelMatrixFocalPlanes = 4.0, 1
    ds.NumberOfOpticalPaths, ds.OpticalPathSequence = 1, [optical]
    ds.LossyImageCompression, ds.LossyImageCompressionRatio = "01", 10
    ds.LossyImageCompressionMethod = "ISO_10918_1"
    ds.SharedFunctionalGroupsSequence = [shared]
    for keyword, value in header.items():
        setattr(ds, keyword, value)
    ds.PixelData = encapsulate(frames)
    ds["PixelData"].VR = "OB"
    ds.save_as(path, enforce_file_format=True)
