"""DICOM objects, validated by dciodvfy and read by pydicom, highdicom and wsidicom."""

import json
import shutil
import subprocess
import sys
from datetime import datetime

import numpy as np
import pandas as pd
import pytest
from dicom_slides import write_dicom_slide
from planted import GRIDS, LESION, SLIDE_SIZES, lesion_box, planted

from wsi_pipeline.errors import ExportError
from wsi_pipeline.export.dicom import (
    read_slide_header,
    write_annotations,
    write_parametric_map,
    write_segmentation,
)
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.regions import heatmap_regions
from wsi_pipeline.slides.reader import Slide

pytest.importorskip("highdicom", reason="highdicom (the extra dicom) is not installed")
import pydicom

MADE = {"model": "net@0123456789ab", "created": datetime(2026, 3, 4, 5, 6, 7)}
THRESHOLDS = (0.2, 0.5)
DETECTIONS = pd.DataFrame({"probability": [LESION, 0.25], "x": [4000.0, 17.0], "y": [300.0, 2.0]})
KINDS = ("map", "regions", "detections")
ROTATED = (0, -1, 0, -1, 0, 0)
"""Columns run to smaller y, rows to smaller x: as most scanners state it."""
TILTED = (0.8, 0.6, 0, 0.6, -0.8, 0)
PATIENT = {
    "SpecificCharacterSet": "ISO_IR 100", "PatientName": "Grün^Jörg", "PatientID": "P1",
    "PatientSex": "F", "PatientBirthDate": "19600102", "StudyID": "7", "StudyDate": "20260101",
    "StudyTime": "101010", "AccessionNumber": "A1", "ReferringPhysicianName": "",
    "AcquisitionDateTime": "20260101101010",
}  # fmt: skip


def write_all(folder, header, values, grid):
    """The three objects, by kind."""
    paths = {kind: folder / f"{kind}.dcm" for kind in KINDS}
    write_parametric_map(paths["map"], values=values, grid=grid, slide=header, **MADE)
    write_segmentation(
        paths["regions"], values=values, grid=grid, thresholds=THRESHOLDS, slide=header, **MADE
    )
    write_annotations(paths["detections"], detections=DETECTIONS, slide=header, **MADE)
    return paths


def on_dicom_slide(folder, orientation):
    """A DICOM slide of two levels whose pixels do not start at the slide's origin."""
    grid = PatchGrid(Bounds(0, 0, 4500, 3500), 0.25, 1.3, 64, 48, 48)
    pixels = np.full((3500, 4500, 3), 230, np.uint8)
    pixels[290:310, 3990:4010] = 40, 60, 160  # under the first detection
    path = write_dicom_slide(
        folder / "slide", pixels, mpp=0.25, orientation=orientation, origin_mm=(20.5, 40.25),
        **PATIENT,
    )  # fmt: skip
    header = read_slide_header(path, slide_id="d", slide_size=(4500, 3500), mpp=0.25)
    return path, header, grid


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """By name: paths of the three objects, the slide's header, values and grid."""
    found = {}
    for name, grid in GRIDS.items():
        folder = tmp_path_factory.mktemp(name)
        (slide := folder / "slide.svs").write_bytes(name.encode() * 1000)
        header = read_slide_header(slide, slide_id=name, slide_size=SLIDE_SIZES[name], mpp=grid.mpp)
        found[name] = write_all(folder, header, planted(grid), grid), header, planted(grid), grid
    for name, orientation in (("rotated", ROTATED), ("tilted", TILTED)):
        folder = tmp_path_factory.mktemp(name)
        _, header, grid = on_dicom_slide(folder, orientation)
        found[name] = write_all(folder, header, planted(grid), grid), header, planted(grid), grid
    return found


NAMES = (*GRIDS, "rotated", "tilted")


def errors_of_dciodvfy(path) -> list[str]:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (of dicom3tools) is not installed")
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    assert any(line.strip() in IODS for line in lines), lines  # it did read the object
    return [line for line in lines if line.lstrip().startswith("Error")]


IODS = ("ParametricMap", "Segmentation", "MicroscopyBulkSimpleAnnotations")


def matrix(ds, frames, numbers):
    """The total pixel matrix of some frames, from what each frame states of its place."""
    whole = np.full((ds.TotalPixelMatrixRows, ds.TotalPixelMatrixColumns), 77, frames.dtype)
    for number in numbers:
        place = ds.PerFrameFunctionalGroupsSequence[number].PlanePositionSlideSequence[0]
        row = place.RowPositionInTotalImagePixelMatrix - 1
        col = place.ColumnPositionInTotalImagePixelMatrix - 1
        part = whole[row : row + ds.Rows, col : col + ds.Columns]
        part[:] = frames[number][: part.shape[0], : part.shape[1]]
    return whole


def spacing_mm(ds):
    """Between rows, between columns."""
    measures = ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    return np.array(measures.PixelSpacing, float)


def axes(ds):
    """mm on the slide from the origin of the pixel matrix, of a step to the next column and row."""
    orientation = np.array(ds.ImageOrientationSlide, float).reshape(2, 3)
    return orientation * spacing_mm(ds)[::-1, np.newaxis]


def origin_mm(ds):
    origin = ds.TotalPixelMatrixOriginSequence[0]
    return np.array(
        [float(origin.get(f"{axis}OffsetInSlideCoordinateSystem") or 0) for axis in "XYZ"]
    )


def level0_of(places_mm, header):
    """Level-0 px of places on the slide, where a pixel's centre is at its number + 0.5."""
    offsets = (np.asarray(places_mm) - origin_mm(header)) @ np.linalg.pinv(axes(header))
    return offsets + 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_dciodvfy_finds_no_error(written, name, kind):
    assert errors_of_dciodvfy(written[name][0][kind]) == []


@pytest.mark.parametrize("name", NAMES)
def test_pydicom_reads_the_heatmap_as_written_and_the_lesion_where_it_is(written, name):
    paths, header, values, grid = written[name]
    ds = pydicom.dcmread(paths["map"])
    read = matrix(ds, ds.pixel_array.reshape(-1, ds.Rows, ds.Columns), range(ds.NumberOfFrames))
    np.testing.assert_array_equal(read, values)  # NaN outside tissue as well
    rows, cols = np.nonzero(read == LESION)
    centre_mm = origin_mm(ds) + np.array([cols.mean(), rows.mean()]) @ axes(ds)
    x0, y0, x1, y1 = lesion_box(grid)
    off = level0_of(centre_mm, header) - [(x0 + x1) / 2, (y0 + y1) / 2]
    assert np.abs(off).max() < grid.level0_length(grid.stride_px) / 2 / 1000


@pytest.mark.parametrize("name", NAMES)
def test_highdicom_finds_the_lesion_through_its_own_transformer(written, name):
    import highdicom
    from highdicom.spatial import ImageToImageTransformer

    paths, header, _, grid = written[name]
    image = highdicom.imread(paths["map"])
    read = image.get_total_pixel_matrix(apply_real_world_transform=True)
    rows, cols = np.nonzero(read == np.float32(LESION))
    to_slide = ImageToImageTransformer.for_images(
        image, header, for_total_pixel_matrix_from=True, for_total_pixel_matrix_to=True
    )
    corners = np.array([[cols.min(), rows.min()], [cols.max() + 1, rows.max() + 1]])
    half_a_pixel = grid.level0_length(grid.stride_px) / 2
    assert np.abs(to_slide(corners).ravel() - lesion_box(grid)).max() < half_a_pixel / 1000


@pytest.mark.parametrize("kind", KINDS)
def test_headers_can_be_sent_as_json(written, kind):
    ds = pydicom.dcmread(written["rotated"][0][kind])
    for name in ("PixelData", "FloatPixelData"):
        ds.pop(name, None)
    json.dumps(ds.to_json_dict(), allow_nan=False)  # NaN is not JSON: DICOMweb could not send it


def test_the_map_states_that_it_holds_probabilities(written):
    ds = pydicom.dcmread(written["plain"][0]["map"])
    mapping = ds.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
    assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1, 0)
    assert mapping.MeasurementUnitsCodeSequence[0].CodeValue == "1"  # UCUM: no unit
    quantity = mapping.QuantityDefinitionSequence[0].ConceptCodeSequence[0]
    assert quantity.CodeMeaning == "Probability of cancer"


@pytest.mark.parametrize("name", NAMES)
def test_each_threshold_is_a_segment_of_the_pixels_that_regions_outline(written, name):
    paths, _, values, grid = written[name]
    ds = pydicom.dcmread(paths["regions"])
    frames = ds.pixel_array.reshape(-1, ds.Rows, ds.Columns)
    numbers = [
        item.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        for item in ds.PerFrameFunctionalGroupsSequence
    ]
    for segment, threshold in zip(ds.SegmentSequence, THRESHOLDS, strict=True):
        mine = [at for at, number in enumerate(numbers) if number == segment.SegmentNumber]
        read = matrix(ds, frames, mine)
        np.testing.assert_array_equal(read, values >= threshold)
        assert segment.SegmentLabel == f"probability >= {threshold:g}"
        (by,) = segment.SegmentationAlgorithmIdentificationSequence
        assert (by.AlgorithmName, by.AlgorithmVersion) == ("net", "0123456789ab")
    area_mm2 = read.sum() * spacing_mm(ds).prod()  # of the highest threshold: the lesion alone
    (region,) = heatmap_regions(values, grid, THRESHOLDS[-1])
    assert area_mm2 == pytest.approx(region.area_mm2, rel=1e-6)
    np.testing.assert_allclose(origin_mm(ds), origin_mm(pydicom.dcmread(paths["map"])))


@pytest.mark.parametrize("name", NAMES)
def test_wsidicom_reads_detections_with_their_places_and_probabilities(written, name):
    wsidicom = pytest.importorskip("wsidicom", reason="wsidicom is not installed")
    paths, header, _, _ = written[name]
    (instance,) = wsidicom.AnnotationInstance.open([paths["detections"]])
    (group,) = instance.groups
    places = [annotation.geometry.to_coords()[0] for annotation in group.annotations]
    measured = [annotation.measurements[0].value for annotation in group.annotations]
    assert instance.coordinate_type == "volume" and measured == list(DETECTIONS["probability"])
    found = level0_of([(*place, 0) for place in places], header)
    np.testing.assert_allclose(found, DETECTIONS[["x", "y"]], atol=0.02)  # px; float32 mm


def test_objects_share_study_patient_and_frame_of_reference_with_a_dicom_slide(written):
    paths, header, _, _ = written["rotated"]
    for path in paths.values():
        ds = pydicom.dcmread(path)
        for name in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "AccessionNumber"):
            assert ds[name].value == header[name].value
        assert ds.PatientName == "Grün^Jörg" and ds.ContainerIdentifier == "S1-A-1"
        assert ds.SpecimenDescriptionSequence[0].SpecimenIdentifier == "S1-A"
        (series,) = ds.ReferencedSeriesSequence
        assert series.SeriesInstanceUID == header.SeriesInstanceUID
        (image,) = series.ReferencedInstanceSequence
        assert image.ReferencedSOPInstanceUID == header.SOPInstanceUID
        assert ds.SeriesInstanceUID != header.SeriesInstanceUID


@pytest.mark.parametrize("orientation", [ROTATED, (1, 0, 0, 0, -1, 0)])
def test_wsidicom_shows_the_marked_pixels_at_the_detection_beside_the_slide(tmp_path, orientation):
    wsidicom = pytest.importorskip("wsidicom", reason="wsidicom is not installed")
    path, header, _ = on_dicom_slide(tmp_path, orientation)
    write_annotations(path.parent / "found.dcm", detections=DETECTIONS, slide=header, **MADE)
    with wsidicom.WsiDicom.open(path.parent) as slide:
        (instance,) = slide.annotations
        x_mm, y_mm = instance.groups[0].annotations[0].geometry.to_coords()[0]
        side_mm = 0.002  # 8 px
        region = slide.read_region_mm(
            (x_mm - side_mm / 2, y_mm - side_mm / 2), 0, (side_mm, side_mm), slide_origin=True
        )
    assert np.abs(np.asarray(region).mean((0, 1)) - (40, 60, 160)).max() < 20


def test_openslide_opens_the_same_level_as_the_header_describes(tmp_path):
    path, header, _ = on_dicom_slide(tmp_path, ROTATED)
    with Slide(path) as slide:
        assert slide.size == (header.TotalPixelMatrixColumns, header.TotalPixelMatrixRows)
        pixels = slide.read(3995, 295, 10, 10, 1.0)
    assert np.abs(pixels.mean((0, 1)) - (40, 60, 160)).max() < 20
    assert header.SOPInstanceUID == pydicom.dcmread(path.parent / "1.dcm").SOPInstanceUID


def test_the_same_export_gives_the_same_bytes(written, tmp_path):
    for name in ("bounds", "rotated"):
        paths, header, values, grid = written[name]
        (folder := tmp_path / name).mkdir()
        again = write_all(folder, header, values, grid)
        for kind in KINDS:
            assert again[kind].read_bytes() == paths[kind].read_bytes()


def test_another_heatmap_is_another_series_of_the_same_study(written, tmp_path):
    paths, header, values, grid = written["plain"]
    first = pydicom.dcmread(paths["map"])
    path = tmp_path / "other.dcm"
    write_parametric_map(path, values=values / 2, grid=grid, slide=header, **MADE)
    other = pydicom.dcmread(path)
    assert other.StudyInstanceUID == first.StudyInstanceUID
    assert other.SeriesInstanceUID != first.SeriesInstanceUID
    assert other.SOPInstanceUID != first.SOPInstanceUID


def test_a_slide_of_another_format_has_uids_of_its_content_alone(tmp_path):
    slides = [tmp_path / name for name in ("a.svs", "renamed.svs", "other.svs")]
    for path, length in zip(slides, (3_000_000, 3_000_000, 3_000_001), strict=True):
        path.write_bytes(b"x" * length)
    first, renamed, other = (
        read_slide_header(path, slide_id=path.stem, slide_size=(900, 700), mpp=0.5)
        for path in slides
    )
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        assert first[name].value == renamed[name].value != other[name].value
    assert first.PatientID == "" and first.ContainerIdentifier == "a"


def test_a_slide_without_detections_gets_no_annotations_and_loses_old_ones(written, tmp_path):
    header = written["plain"][1]
    (path := tmp_path / "d.dcm").write_bytes(b"of an earlier export")
    none = DETECTIONS.iloc[:0]
    assert write_annotations(path, detections=none, slide=header, **MADE) is False
    assert not path.exists()
    assert write_annotations(path, detections=DETECTIONS, slide=header, **MADE) is True


def test_a_threshold_that_nothing_reaches_is_an_empty_segment(written, tmp_path):
    _, header, values, grid = written["plain"]
    path = tmp_path / "s.dcm"
    write_segmentation(path, values=values, grid=grid, thresholds=[1.0], slide=header, **MADE)
    assert errors_of_dciodvfy(path) == []
    assert pydicom.dcmread(path).pixel_array.sum() == 0


def test_a_pixel_just_below_the_threshold_is_in_no_segment_and_no_region(written, tmp_path):
    _, header, _, grid = written["plain"]
    values = np.full(grid.shape, 0.7, np.float32)  # 0.699999988
    path = tmp_path / "s.dcm"
    write_segmentation(path, values=values, grid=grid, thresholds=[0.7], slide=header, **MADE)
    assert pydicom.dcmread(path).pixel_array.sum() == 0
    assert heatmap_regions(values, grid, 0.7) == []


def test_large_heatmaps_are_cut_into_tiles(written, tmp_path):
    grid = PatchGrid(Bounds(0, 0, 9000, 7000), 0.5, 1.0, 16, 16, 16)  # 563 x 438 heatmap px
    values = np.random.default_rng(0).random(grid.shape, np.float32)
    paths = write_all(tmp_path, written["plain"][1], values, grid)
    ds = pydicom.dcmread(paths["map"])
    assert ds.NumberOfFrames == 6
    np.testing.assert_array_equal(matrix(ds, ds.pixel_array, range(6)), values)
    second = ds.PerFrameFunctionalGroupsSequence[1].PlanePositionSlideSequence[0]
    y_mm = float(second.YOffsetInSlideCoordinateSystem)  # columns run to smaller y, from 50 mm
    assert y_mm == pytest.approx(50 - (256 * 16 + 8 - 0.5) * 0.5 / 1000)  # first pixel's centre
    assert errors_of_dciodvfy(paths["map"]) == errors_of_dciodvfy(paths["regions"]) == []


def test_a_real_slide_without_patient_and_origin(test_data, tmp_path):
    path = test_data / "google-medical-imaging/multi_frame_jpeg_camelyon_challenge_image.dcm"
    header = read_slide_header(path, slide_id="c", slide_size=(1152, 700), mpp=28.97)
    assert "PatientID" not in pydicom.dcmread(path, stop_before_pixels=True)
    grid = PatchGrid(Bounds(0, 0, 1152, 700), 28.97, 1.0, 8, 8, 8)
    paths = write_all(tmp_path, header, planted(grid), grid)
    for kind in KINDS:
        assert errors_of_dciodvfy(paths[kind]) == []
        assert pydicom.dcmread(paths[kind]).PatientID == ""
    np.testing.assert_allclose(  # the slide's own, not the square pixels of the grid
        spacing_mm(pydicom.dcmread(paths["map"])), [8 * 0.028968, 8 * 0.028969]
    )


def test_a_header_that_cannot_place_a_heatmap_is_refused(tmp_path):
    path, _, _ = on_dicom_slide(tmp_path, ROTATED)
    with pytest.raises(ExportError, match=r"4500 x 3500 px, but the slide 9000 x 7000 px"):
        read_slide_header(path, slide_id="d", slide_size=(9000, 7000), mpp=0.25)
    for level in ("0.dcm", "1.dcm"):
        ds = pydicom.dcmread(path.parent / level)
        del ds.FrameOfReferenceUID
        ds.save_as(path.parent / level)
    with pytest.raises(ExportError, match="lacks FrameOfReferenceUID"):
        read_slide_header(path, slide_id="d", slide_size=(4500, 3500), mpp=0.25)


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    (path := tmp_path / "s.svs").touch()
    with pytest.raises(ExportError, match=r'pip install "wsi_pipeline\[dicom\]"'):
        read_slide_header(path, slide_id="s", slide_size=(900, 700), mpp=0.5)
