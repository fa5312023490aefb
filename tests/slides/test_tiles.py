"""Tiles decoded without OpenSlide: the same pixels, the same errors, or OpenSlide itself."""

import os
import threading
from functools import partial

import imagecodecs
import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile
from counted_reads import counted_reads
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from slide_files import write_mrxs, write_pyramid_tiff

from wsi_pipeline.errors import SlideReadError
from wsi_pipeline.slides import openslide_level, reader, threads, tiles
from wsi_pipeline.slides.level_reader import BackendSelection
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.tile_decoders import JpegDecoder, TileError

APERIO = "Aperio Image Library v11\n{}x{} |AppMag = 20|MPP = 0.5"
REAL = [
    ("libvips/CMU-1-Small-Region.svs", ["tiles"]),
    ("luna/1065626.svs", ["compression is APERIO_JP2000_YCBC", "interpolates"]),
    ("openslide-python/boxes.tiff", None),
    ("openslide-python/small.svs", None),
    ("openslide-python/boxes_0.dcm", ["dicom files are not read by tiles"]),
    (
        "google-medical-imaging/multi_frame_jpeg_camelyon_challenge_image.dcm",
        ["dicom files are not read by tiles"],
    ),
]


@pytest.fixture(autouse=True)
def any_read_by_tiles(monkeypatch):
    """Also the first and the smallest, which OpenSlide has otherwise."""
    monkeypatch.setattr(reader, "WORTH_TILES_PX", 0)
    monkeypatch.setattr(reader, "LEAST_OF_TILE", 0)


@pytest.fixture
def picture():
    """Smooth colours with noise: 333 x 290 px, no multiple of a tile."""
    y, x = np.mgrid[0:290, 0:333]
    colours = np.stack([x / 333 * 200, y / 290 * 200, (x + y) / 623 * 200], -1)
    return (colours + np.random.default_rng(0).integers(0, 56, colours.shape)).astype(np.uint8)


def write_jpeg_tiff(
    path, levels, subsampling="420", colour="ycbcr", tables=True, marked=None, **options
):
    """Tiles of 64 px by imagecodecs, so that every kind of JPEG can be had.

    With `tables`, quantisation and Huffman tables go to the tag JPEGTables, as libtiff does, and
    the tiles are left with frame and scan. `marked`: numbers of tiles to the marker each begins
    with.
    """
    encoding = {"level": 90, "colorspace": "rgb", "outcolorspace": colour}
    if colour == "ycbcr":
        encoding["subsampling"] = subsampling
    else:
        options["compressionargs"] = {"outcolorspace": "rgb"}  # else tifffile notes YCbCr
    with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False)) as file:
        for number, pixels in enumerate(levels):
            encoded, shared = [], b""
            padding = [(0, -side % 64) for side in pixels.shape[:2]] + [(0, 0)]
            padded = np.pad(pixels, padding, mode="edge")
            for top in range(0, padded.shape[0], 64):
                for left in range(0, padded.shape[1], 64):
                    tile = np.ascontiguousarray(padded[top : top + 64, left : left + 64])
                    jpeg = imagecodecs.jpeg8_encode(tile, **encoding)
                    frame, shared = split_tables(jpeg) if tables else (jpeg, b"")
                    marker = (marked or {}).get(len(encoded), b"")
                    encoded.append(frame[:2] + marker + frame[2:])
            file.write(
                iter(encoded), shape=pixels.shape, dtype=np.uint8, tile=(64, 64), metadata=None,
                photometric=colour, compression="jpeg", subfiletype=int(number > 0),
                jpegtables=shared or None,
                subsampling=(int(subsampling[0]) // int(subsampling[1]), 2 if subsampling == "420"
                             else 1) if colour == "ycbcr" else None,
                **({"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"} | options),
            )  # fmt: skip
    return path


def split_tables(jpeg):
    """A JPEG's frame and scan without tables and APPn, and its tables as a stream of their own."""
    at, frame, shared = 2, b"\xff\xd8", b"\xff\xd8"
    while jpeg[at + 1] != 0xDA:
        marker, length = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4], "big") + 2
        if marker in (0xDB, 0xC4):
            shared += jpeg[at : at + length]
        elif not 0xE0 <= marker <= 0xEF:
            frame += jpeg[at : at + length]
        at += length
    return frame + jpeg[at:], shared + b"\xff\xd9"


def with_openslide_alone(path, level, x, y, width, height):
    """A region in level px, over white, as OpenSlide has it."""
    canvas = Image.new("RGB", (width, height), (255, 255, 255))
    with openslide.OpenSlide(path) as slide:
        level_width, level_height = slide.level_dimensions[level]
        stored = slide.level_downsamples[level]
        left, top = max(x, 0), max(y, 0)
        size = min(x + width, level_width) - left, min(y + height, level_height) - top
        if min(size) > 0:
            location = round(left * stored), round(top * stored)
            region = slide.read_region(location, level, size)
            canvas.paste(region, (left - x, top - y), mask=region)
    return np.asarray(canvas)


def assert_same(slide, level, x, y, width, height):
    stored = slide.level_downsamples[level]
    read = slide.read(x * stored, y * stored, width, height, stored)
    expected = with_openslide_alone(slide.path, level, x, y, width, height)
    assert np.array_equal(read, expected), (level, x, y, width, height)


def assert_same_everywhere(slide, level):
    """The whole level with a margin, and places whose corners lie on and off those of tiles."""
    width, height = slide.level_sizes[level]
    assert_same(slide, level, -9, -7, min(width, 700) + 20, min(height, 700) + 20)
    assert_same(slide, level, width - 100, height - 90, 130, 120)
    assert_same(slide, level, 64, 64, 64, 64)
    assert_same(slide, level, 63, 65, 2, 130)
    assert_same(slide, level, width + 5, height + 5, 10, 10)


# Pixels.


@pytest.mark.parametrize("subsampling", ["420", "422", "444"])
@pytest.mark.parametrize("tables", [True, False])
def test_ycbcr_jpeg_equals_openslide(tmp_path, picture, subsampling, tables):
    path = tmp_path / "a.tif"
    write_jpeg_tiff(path, [picture, picture[:144, :166]], subsampling, tables=tables)
    with Slide(path) as slide:
        # 333 / 166 and 290 / 144 are no whole numbers
        assert slide.backend(0).name == "tiles"
        assert "interpolates: its downsample 2.009" in slide.backend(1).reason
        assert_same_everywhere(slide, 0)
        assert_same_everywhere(slide, 1)


@pytest.mark.parametrize("tables", [True, False])
def test_rgb_jpeg_of_an_svs_equals_openslide(tmp_path, picture, tables):
    path = tmp_path / "a.svs"
    write_jpeg_tiff(
        path, [picture], colour="rgb", tables=tables, description=APERIO.format(333, 290)
    )
    with Slide(path) as slide:
        assert (slide.vendor, slide.backend(0).name) == ("aperio", "tiles")
        assert_same_everywhere(slide, 0)


def test_jpeg_2000_rgb_of_an_svs_equals_openslide(tmp_path, picture):
    path = tmp_path / "a.svs"
    padded = np.pad(picture, [(0, -290 % 64), (0, -333 % 64), (0, 0)], mode="edge")
    encoded = (
        imagecodecs.jpeg2k_encode(
            np.ascontiguousarray(padded[top : top + 64, left : left + 64]),
            level=40, codecformat="j2k", mct=True,
        )
        for top in range(0, 290, 64) for left in range(0, 333, 64)
    )  # fmt: skip
    tifffile.imwrite(
        path, encoded, shape=picture.shape, dtype=np.uint8, tile=(64, 64), photometric="rgb",
        compression="APERIO_JP2000_RGB", metadata=None, description=APERIO.format(333, 290),
    )  # fmt: skip
    with Slide(path) as slide:
        assert (slide.vendor, slide.backend(0).name) == ("aperio", "tiles")
        assert_same_everywhere(slide, 0)


def test_every_level_of_a_halved_big_tiff_equals_openslide(tmp_path, picture):
    levels = [picture[:288, :320], picture[:288:2, :320:2], picture[:288:4, :320:4]]
    with Slide(write_jpeg_tiff(tmp_path / "a.tif", levels, bigtiff=True)) as slide:
        for level in range(3):
            assert slide.backend(level).name == "tiles"
            assert_same_everywhere(slide, level)


@pytest.mark.parametrize("region", [(0, 0, 50, 40, 1.7), (-20, 30, 60, 70, 3), (7, 9, 90, 80, 0.9)])
def test_resampled_regions_are_those_of_openslide(tmp_path, monkeypatch, picture, region):
    path = write_jpeg_tiff(tmp_path / "a.tif", [picture[:288, :320], picture[:288:2, :320:2]])
    with Slide(path) as slide, counted_reads(slide) as counted:
        read = slide.read(*region)
    assert counted.by_tiles > 0
    assert counted.by_openslide == 0
    refused = BackendSelection("openslide", "not now")
    monkeypatch.setattr(reader, "find_tiles", lambda *of: [refused] * 2)
    with Slide(path) as slide:
        assert str(slide.backend(0)) == "openslide: not now"
        assert np.array_equal(read, slide.read(*region))


@pytest.mark.parametrize(("name", "backends"), REAL)
@settings(max_examples=15, derandomize=True)
@given(data=st.data())
def test_real_slides_equal_openslide(test_data, name, backends, data):
    with Slide(test_data / name, mpp=0.5) as slide:
        level = data.draw(st.integers(0, len(slide.level_sizes) - 1))
        if backends is not None:
            assert backends[level] in str(slide.backend(level))
        width, height = slide.level_sizes[level]
        x, y = data.draw(st.integers(-40, width)), data.draw(st.integers(-40, height))
        assert_same(slide, level, x, y, *data.draw(st.tuples(*[st.integers(1, 300)] * 2)))


@pytest.mark.parametrize("name", [name for name, _ in REAL])
def test_corners_and_edges_of_real_slides_equal_openslide(test_data, name):
    with Slide(test_data / name, mpp=0.5) as slide:
        for level in range(len(slide.level_sizes)):
            assert_same_everywhere(slide, level)


# Tiles that are not there, or not whole.


def rewrite(path, page, tile, data):
    """Overwrite the beginning of a tile."""
    with tifffile.TiffFile(path) as file:
        start, length = (
            values[tile]
            for values in (file.pages[page].dataoffsets, file.pages[page].databytecounts)
        )
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data(length))
    return start


def drop_tile(path, page, tile):
    """Set the byte count of a tile to 0."""
    change_tag(path, page, "TileByteCounts", tile, lambda count: 0)


def change_tag(path, page, name, tile, change):
    """Change what the file says of a tile's bytes."""
    with tifffile.TiffFile(path, mode="r+b") as file:
        tag = file.pages[page].tags[name]
        tag.overwrite([change(v) if i == tile else v for i, v in enumerate(tag.value)])


def test_tiles_left_out_of_a_tiff_are_white(tmp_path, picture):
    path = write_jpeg_tiff(tmp_path / "a.tif", [picture])
    drop_tile(path, 0, 8)  # the third of the second row: x 128 to 192, y 64 to 128
    with Slide(path) as slide:
        assert slide.backend(0).name == "tiles"
        assert_same_everywhere(slide, 0)
        assert (slide.read(128, 64, 64, 64) == 255).all()
        assert (slide.read(127, 63, 66, 66)[[0, -1]] < 255).any(axis=(1, 2)).all()


def test_tiles_left_out_of_a_philips_slide_are_white_at_each_level(tmp_path, picture):
    """Such slides are sparse. The coarser level's page is padded: OpenSlide cuts that off."""
    spacings = "".join(
        '<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING">'
        f"&quot;{mm}&quot; &quot;{mm}&quot;</Attribute></DataObject>"
        for mm in (0.0005, 0.001)
    )
    description = (
        '<DataObject ObjectType="DPUfsImport"><Attribute Name="PIM_DP_SCANNED_IMAGES"><Array>'
        '<DataObject ObjectType="DPScannedImage"><Attribute Name="PIM_DP_IMAGE_TYPE">WSI'
        '</Attribute><Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>'
        f"{spacings}</Array></Attribute></DataObject></Array></Attribute></DataObject>"
    )
    levels = [picture[:256, :320], picture[:256:2, :320:2]]
    levels[1] = np.pad(levels[1], [(0, 0), (0, 32), (0, 0)])
    options = {"software": "Philips DP v1.0", "description": description}
    path = write_jpeg_tiff(tmp_path / "a.tif", levels, **options)
    drop_tile(path, 0, 6)  # x 64 to 128, y 64 to 128
    with Slide(path, mpp=0.5) as slide:
        assert (slide.vendor, slide.level_sizes) == ("philips", ((320, 256), (160, 128)))
        assert slide.backend(0).name == "tiles"
        assert str(slide.backend(1)) == "openslide: 0 tiled TIFF pages have its size, 160 x 128 px"
        for level in (0, 1):
            assert_same_everywhere(slide, level)
        assert (slide.read(64, 64, 64, 64) == 255).all()


def test_tiles_left_out_of_an_svs_are_painted_by_openslide_at_coarser_levels_too(tmp_path, picture):
    levels = [picture[:288, :320], picture[:288:2, :320:2]]
    options = {"colour": "rgb", "description": APERIO.format(320, 288)}
    path = write_jpeg_tiff(tmp_path / "a.svs", levels, **options)
    drop_tile(path, 0, 6)
    with Slide(path) as slide:
        for level in (0, 1):
            assert "tiles are missing at this or a finer level" in slide.backend(level).reason
            assert_same_everywhere(slide, level)


@pytest.mark.parametrize(
    "damage",
    [
        lambda length: bytes(length),
        lambda length: b"\xff\xd8" + bytes(length - 2),
    ],
)
def test_a_damaged_tile_is_an_error_there_alone(tmp_path, picture, damage):
    path = write_jpeg_tiff(tmp_path / "a.tif", [picture])
    rewrite(path, 0, 8, damage)
    with Slide(path) as slide:
        assert slide.backend(0).name == "tiles"
        with pytest.raises(SlideReadError, match=r"a\.tif: the region at level-0 px \(128, 64\)"):
            slide.read(120, 60, 30, 30)
        assert_same(slide, 0, 0, 128, 333, 162)
        assert_same(slide, 0, 192, 0, 141, 290)


def test_a_tile_that_ends_too_soon_is_an_error_not_grey(tmp_path, picture):
    """Most decoders fill what is missing of a JPEG with grey, and say nothing."""
    path = write_jpeg_tiff(tmp_path / "a.tif", [picture])
    change_tag(path, 0, "TileByteCounts", 8, lambda count: count // 2)
    with pytest.raises(openslide.OpenSlideError):
        with_openslide_alone(path, 0, 128, 64, 64, 64)
    with Slide(path) as slide, pytest.raises(SlideReadError):
        slide.read(128, 64, 64, 64)


def test_tiles_beyond_the_end_of_the_file_leave_the_level_to_openslide(tmp_path, picture):
    levels = [picture[:288, :320], picture[:288:2, :320:2]]
    path = write_jpeg_tiff(tmp_path / "a.tif", levels)
    change_tag(path, 0, "TileOffsets", 8, lambda offset: path.stat().st_size - 10)
    with Slide(path) as slide:
        assert str(slide.backend(0)) == "openslide: tiles lie beyond the end of the file"
        assert slide.backend(1).name == "tiles"
        assert_same(slide, 0, 0, 128, 320, 160)
        with pytest.raises(SlideReadError):
            slide.read(230, 70, 5, 5)


# Who reads what.


def test_other_layouts_are_left_to_openslide(tmp_path, picture):
    plain = write_pyramid_tiff(tmp_path / "plain.tif", [picture], 64, 0.5, None)
    assert str(Slide(plain).backend(0)) == "openslide: its compression is NONE"
    grey = tmp_path / "grey.tif"
    tifffile.imwrite(grey, picture[..., 0], tile=(64, 64), compression="jpeg")
    assert "three interleaved channels" in Slide(grey, mpp=1).backend(0).reason
    mrxs = write_mrxs(tmp_path / "a.mrxs", np.zeros((200, 200, 3), np.uint8), 100, 100)
    assert str(Slide(mrxs).backend(0)) == "openslide: mirax files are not read by tiles"


def test_pages_of_one_size_are_left_to_openslide(tmp_path, picture):
    path = write_jpeg_tiff(tmp_path / "a.tif", [picture])
    tifffile.imwrite(path, picture, append=True, tile=(64, 64), compression="jpeg")
    assert "2 tiled TIFF pages have its size, 333 x 290" in Slide(path).backend(0).reason


def test_a_difference_leaves_the_level_to_openslide(tmp_path, monkeypatch, picture):
    decode = simplejpeg.decode_jpeg

    def slightly_other(*of, buffer, **how):
        decode(*of, buffer=buffer, **how)
        buffer ^= 1
        return buffer

    monkeypatch.setattr(simplejpeg, "decode_jpeg", slightly_other)
    with Slide(write_jpeg_tiff(tmp_path / "a.tif", [picture])) as slide:
        selection = slide.backend(0)
        assert selection.name == "openslide"
        assert selection.reason.startswith("the tile at level px (")
        assert selection.reason.endswith("differs from OpenSlide's by up to 1")
        with counted_reads() as counted:
            assert_same_everywhere(slide, 0)
        assert counted.by_tiles == 0


def test_a_level_of_which_nothing_can_be_compared_is_openslides(tmp_path, picture):
    path = write_jpeg_tiff(tmp_path / "a.tif", [picture])
    with tifffile.TiffFile(path) as file:
        tiles_there = len(file.pages[0].dataoffsets)
    for tile in range(tiles_there):
        rewrite(path, 0, tile, bytes)
    assert str(Slide(path).backend(0)) == "openslide: no tile can be compared with OpenSlide's"


def test_a_level_is_compared_once_in_a_process_until_its_file_changes(
    tmp_path, monkeypatch, picture
):
    compared = []
    equal = BackendSelection("tiles", "they are equal")
    monkeypatch.setattr(reader, "compare_tiles", lambda *of: compared.append(of) or equal)
    path = write_jpeg_tiff(tmp_path / "a.tif", [picture])
    for _ in range(2):
        with Slide(path) as slide:
            slide.read(0, 0, 10, 10)
    assert len(compared) == 1
    write_jpeg_tiff(path, [picture[::-1]])
    Slide(path).read(0, 0, 10, 10)
    assert len(compared) == 2


def test_the_tiles_that_a_region_touches_are_decoded_and_no_others(tmp_path, picture):
    path = write_jpeg_tiff(tmp_path / "a.tif", [picture])
    with Slide(path) as slide, counted_reads(slide) as counted:
        slide.read(60, 60, 10, 10)  # four tiles of 64 x 64
        slide.read(-5, -5, 10, 10)  # a part of the first
    assert (counted.by_tiles, counted.by_openslide) == (5 * 64 * 64, 0)


@pytest.mark.parametrize("corner", [(-100, -30), (70, 40), (250, 200)])
@pytest.mark.parametrize(("downsample", "by_tiles"), [(1.0, True), (1.0, False), (1.7, True)])
def test_what_boxes_hold_is_read_and_no_other_tile(
    tmp_path, monkeypatch, picture, corner, downsample, by_tiles
):
    if not by_tiles:
        monkeypatch.setattr(reader, "WORTH_TILES_PX", 10**9)
        monkeypatch.setattr(openslide_level, "SMALLEST_REQUEST_PX", 50)
    monkeypatch.setattr(openslide_level, "LARGEST_REQUEST_PX", 130)
    monkeypatch.setattr(reader, "BLOCK_PX", 130)
    rng = np.random.default_rng(0)
    starts, sizes = rng.integers(0, (150, 100), (5, 2)), rng.integers(1, 50, (5, 2))
    boxes = np.hstack([starts, starts + sizes])
    with Slide(write_jpeg_tiff(tmp_path / "a.tif", [picture])) as slide:
        expected = slide.read(*corner, 200, 150, downsample)
        out = np.zeros((150, 200, 3), np.uint8)
        with counted_reads(slide) as counted:
            assert slide.read_under(*corner, boxes, downsample, out) == {}
        needed = np.zeros((290, 333), bool)
        for left, upper, right, lower in boxes.tolist():
            box = np.s_[upper:lower, left:right]
            np.testing.assert_allclose(
                out[box].astype(int), expected[box], atol=int(downsample != 1)
            )
            x, y = corner
            needed[max(upper + y, 0) : max(lower + y, 0), max(left + x, 0) : max(right + x, 0)] = 1
        if by_tiles and downsample == 1:
            touched = sum(
                needed[top : top + 64, left : left + 64].any()
                for top in range(0, 290, 64)
                for left in range(0, 333, 64)
            )
            assert 0 < touched < 5 * 4
            assert counted.by_tiles == touched * 64 * 64


def test_a_few_neighbours_are_copied_together():
    """A row of ten tiles: the first is cut by the region, the sixth is not in the file."""
    there = {(2, col): col != 5 for col in range(10)} | {(3, 0): True, (3, 2): True, (4, 3): True}
    groups = tiles._neighbours(there, range(1, 20))
    assert [[col for _, col in group] for group in groups] == [
        [0], [1, 2, 3, 4], [5], [6, 7, 8, 9], [0], [2], [3],
    ]  # fmt: skip
    assert [place for group in groups for place in group] == list(there)


def test_boxes_are_read_by_tiles_though_edges_were_asked_for_too_soon(
    tmp_path, monkeypatch, picture
):
    """Before it was worth to find out where the tiles are."""
    monkeypatch.setattr(reader, "WORTH_TILES_PX", 40_000)
    with Slide(write_jpeg_tiff(tmp_path / "a.tif", [picture])) as slide:
        assert slide.row_edges(10, 190, 190).tolist() == [0, 190]
        slide.read(0, 0, 200, 200)
        assert slide.row_edges(10, 190, 190).tolist() == [0, 54, 118, 182, 190]
        out = np.zeros((190, 190, 3), np.uint8)
        with counted_reads() as counted:
            slide.read_under(10, 10, np.array([[0, 0, 190, 190]]), 1.0, out)
        assert counted.by_tiles == 4 * 4 * 64 * 64
        np.testing.assert_array_equal(out, slide.read(10, 10, 190, 190))


def test_the_first_and_the_smallest_reads_are_openslides(tmp_path, monkeypatch, picture):
    monkeypatch.setattr(reader, "WORTH_TILES_PX", 20_000)
    monkeypatch.setattr(reader, "LEAST_OF_TILE", 1 / 4)
    path = write_jpeg_tiff(tmp_path / "a.tif", [picture])
    with Slide(path) as slide, counted_reads(slide) as counted:
        slide.read(0, 0, 100, 100)
        assert (counted.by_tiles, counted.by_openslide) == (0, 10_000)
        slide.read(0, 0, 100, 100)  # 20,000 px by now; four tiles
        assert counted.by_tiles == 4 * 64 * 64
        slide.read(0, 0, 32, 31)  # under a quarter of 64 x 64
        assert counted.by_tiles == 4 * 64 * 64
        slide.read(0, 0, 32, 32)
        assert counted.by_tiles == 5 * 64 * 64
        assert counted.by_openslide == 10_000 + 32 * 31


ADOBE = bytes.fromhex("ffee000e41646f6265006400000000")
JFIF = bytes.fromhex("ffe000104a46494600010100000100010000")


@pytest.mark.parametrize(
    ("colour", "marker"), [("rgb", JFIF), ("rgb", ADOBE + b"\x01"), ("ycbcr", ADOBE + b"\x00")]
)
def test_a_tile_that_names_another_colour_space_than_the_page_is_openslides(
    tmp_path, picture, colour, marker
):
    """In a flat tile, of few bytes, that is not among those compared."""
    picture[64:128, 128:192] = (200, 120, 160)
    path = write_jpeg_tiff(tmp_path / "a.tif", [picture], colour=colour, marked={8: marker})
    with Slide(path) as slide:
        assert slide.backend(0).name == "tiles"
        with counted_reads() as counted:
            assert_same(slide, 0, 128, 64, 64, 64)
        assert counted.by_tiles == 0
        assert_same_everywhere(slide, 0)


@pytest.mark.parametrize("decoding", ["1", "2"])
def test_openslide_is_asked_for_the_tile_that_it_alone_can_read(
    tmp_path, monkeypatch, picture, decoding
):
    monkeypatch.setenv("OMP_NUM_THREADS", decoding)
    picture = picture[:256, :320]
    picture[64:128, 128:192] = (200, 120, 160)
    marked = {7: ADOBE + b"\x00"}  # of 4 x 5 tiles; the third of the second row
    with Slide(write_jpeg_tiff(tmp_path / "a.tif", [picture], marked=marked)) as slide:
        assert slide.backend(0).name == "tiles"
        with counted_reads() as counted:
            read = slide.read(0, 0, 320, 256)
        assert (counted.by_tiles, counted.by_openslide) == (19 * 64 * 64, 64 * 64)
        assert np.array_equal(read, with_openslide_alone(slide.path, 0, 0, 0, 320, 256))


def test_a_tile_that_is_cut_off_does_not_loosen_the_check_of_the_next(picture):
    decoder = JpegDecoder(None, tifffile.PHOTOMETRIC.YCBCR)
    decode = partial(decoder, memory=np.empty_like(picture))
    jpeg = imagecodecs.jpeg8_encode(picture)
    contradicts = jpeg[:2] + ADOBE + b"\x00" + jpeg[2:]
    for length in (2, 3, 40):
        with pytest.raises(TileError, match="no end"):
            decode(jpeg[:length])
        with pytest.raises(TileError, match="Adobe marker contradicts"):
            decode(contradicts)
    assert decode(jpeg).shape == picture.shape


def test_a_tile_that_names_the_colour_space_of_the_page_is_decoded(tmp_path, picture):
    marked = {7: ADOBE + b"\x01", 8: JFIF}
    path = write_jpeg_tiff(tmp_path / "a.tif", [picture], marked=marked)
    with Slide(path) as slide, counted_reads(slide) as counted:
        assert_same(slide, 0, 64, 64, 128, 64)
    assert counted.by_tiles == 2 * 64 * 64


# Threads and files.


@pytest.mark.parametrize("decoding", ["1", "2"])
def test_threads_read_one_slide_at_once(tmp_path, monkeypatch, picture, decoding):
    monkeypatch.setenv("OMP_NUM_THREADS", decoding)
    monkeypatch.setattr(threads, "CPU_COUNT", 2)
    regions = [(x, y, 120, 100) for x in range(0, 333, 30) for y in range(0, 290, 40)]
    path, wrong = write_jpeg_tiff(tmp_path / "a.tif", [picture]), []
    expected = [with_openslide_alone(path, 0, *region) for region in regions]
    with Slide(path) as slide, counted_reads(slide) as counted:

        def read():
            for region, pixels in zip(regions, expected, strict=True):
                if not np.array_equal(slide.read(*region), pixels):
                    wrong.append(region)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for thread in readers:
            thread.start()
        for thread in readers:
            thread.join()
    tiles_met = [
        (-(-min(x + w, 333) // 64) - x // 64) * (-(-min(y + h, 290) // 64) - y // 64)
        for x, y, w, h in regions
    ]
    assert counted.by_tiles == 2 * sum(tiles_met) * 64 * 64
    assert not wrong


def test_closing_lets_go_of_the_file_and_reading_opens_it_again(tmp_path, picture):
    def descriptors():
        held = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))  # noqa: PTH208
        return sum(os.path.realpath(name) == str(path) for name in held)

    path = write_jpeg_tiff(tmp_path / "a.tif", [picture]).resolve()
    slide = Slide(path)
    first = slide.read(0, 0, 70, 70)
    slide.close()
    assert descriptors() == 0
    assert np.array_equal(slide.read(0, 0, 70, 70), first)
    slide.close()
