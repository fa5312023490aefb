"""Opening slides and reading regions of them."""

import math
import threading
import weakref

import numpy as np
import openslide
import pytest
import tifffile
from slide_files import write_mrxs, write_pyramid_tiff

from wsi_pipeline.errors import SlideError, SlideReadError
from wsi_pipeline.geometry import Bounds
from wsi_pipeline.slides import openslide_level, reader
from wsi_pipeline.slides.reader import Slide


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (301, 402, 3)).astype(np.uint8)


@pytest.fixture
def smooth():
    """A picture that resampling changes little: gradients in x and y."""
    y, x = np.mgrid[0:900, 0:1300]
    return np.stack([x / 1300 * 255, y / 900 * 255, (x + y) / 2200 * 255], -1).astype(np.uint8)


def painted_slide(path, level_sizes, mpp=0.5):
    """A square at level-0 x 600 to 800, y 300 to 400 of 1300 x 900 px, in every level."""

    def covered(pixels, extent, start, stop):
        edges = np.linspace(0, extent, pixels + 1).clip(start, stop)
        return np.diff(edges) * pixels / extent

    levels = []
    for width, height in level_sizes:
        share = np.outer(covered(height, 900, 300, 400), covered(width, 1300, 600, 800))
        levels.append(240 - share[..., None] * (60, 200, 150))
    return write_pyramid_tiff(path, levels, mpp=mpp, compression=None)


# Resolution.


def test_states_size_levels_and_resolution_of_a_tiled_tiff(tmp_path, noise):
    path = write_pyramid_tiff(tmp_path / "a.tiff", [noise, noise[::3, ::3]], mpp=0.25)
    with Slide(path) as slide:
        assert (slide.path, slide.vendor, slide.size) == (path, "generic-tiff", (402, 301))
        assert slide.level_sizes == ((402, 301), (134, 101))
        assert slide.level_downsamples == pytest.approx((1, (402 / 134 + 301 / 101) / 2))
        assert slide.bounds == Bounds(0, 0, 402, 301)
        assert slide.mpp == pytest.approx(0.25)


def test_given_resolution_wins_over_the_stated_one(tmp_path, noise):
    path = write_pyramid_tiff(tmp_path / "a.tiff", [noise], mpp=0.25)
    assert Slide(path, mpp=0.3).mpp == 0.3


def test_downsample_of_a_level_and_of_a_target_resolution(tmp_path, noise):
    path = write_pyramid_tiff(tmp_path / "a.tiff", [noise, noise[::3, ::3]], mpp=0.25)
    with Slide(path) as slide:
        assert slide.downsample(level=1) == slide.level_downsamples[1]
        assert slide.downsample(mpp=0.5) == pytest.approx(2)
        assert slide.downsample(mpp=0.24) == pytest.approx(0.96)
        with pytest.raises(SlideError, match="level 2 is asked for; the slide has levels 0 to 1"):
            slide.downsample(level=2)
        with pytest.raises(SlideError, match=r"0\.2 um per px is asked for"):
            slide.downsample(mpp=0.2)
        with pytest.raises(ValueError, match="give one of the two"):
            slide.downsample()


# Pixels.


def test_level_0_comes_as_stored(tmp_path, noise):
    with Slide(write_pyramid_tiff(tmp_path / "a.tiff", [noise], 64, 0.25, None)) as slide:
        assert np.array_equal(slide.read(0, 0, 402, 301), noise)
        assert np.array_equal(slide.read(37, 101, 150, 90), noise[101:191, 37:187])


@pytest.mark.parametrize(
    ("x", "y", "width", "height"),
    [(-30, -20, 100, 80), (350, 250, 100, 100), (-10, -10, 500, 400), (5000, 7, 40, 30)],
)
def test_outside_the_slide_is_white(tmp_path, noise, x, y, width, height):
    expected = np.full((height, width, 3), 255, np.uint8)
    for row in range(max(0, -y), min(height, 301 - y)):
        for col in range(max(0, -x), min(width, 402 - x)):
            expected[row, col] = noise[y + row, x + col]
    with Slide(write_pyramid_tiff(tmp_path / "a.tiff", [noise], 64, 0.25, None)) as slide:
        assert np.array_equal(slide.read(x, y, width, height), expected)


def test_large_reads_have_no_seams(tmp_path, monkeypatch, smooth):
    levels = [smooth, smooth[::4, ::4]]
    with Slide(write_pyramid_tiff(tmp_path / "a.tiff", levels, 256, 0.25, None)) as slide:
        regions = [(0, 0, 1300, 900, 1), (-8, 4, 325, 225, 4), (-5.5, 2.25, 500, 350, 2.7)]
        regions += [(0, 0, 120, 80, 11.3), (1, 2, 700, 600, 0.7)]
        whole = [slide.read(*region) for region in regions]
        monkeypatch.setattr(reader, "BLOCK_PX", 100)
        monkeypatch.setattr(openslide_level, "LARGEST_REQUEST_PX", 100)
        for region, expected in zip(regions, whole, strict=True):
            difference = np.abs(slide.read(*region).astype(int) - expected)
            assert difference.max() <= 1, region


@pytest.mark.parametrize("downsample", [1, 1.7, 4, 6.25])
def test_part_of_a_slab_equals_its_own_read(tmp_path, noise, downsample):
    with Slide(write_pyramid_tiff(tmp_path / "a.tiff", [noise], 64, 0.25, None)) as slide:
        slab = slide.read(-8 * downsample, -8 * downsample, 80, 64, downsample)
        for col, row in [(0, 0), (13, 5), (40, 32)]:
            patch = slide.read((col - 8) * downsample, (row - 8) * downsample, 32, 32, downsample)
            difference = np.abs(slab[row : row + 32, col : col + 32].astype(int) - patch)
            assert difference.max() <= 1


@pytest.mark.parametrize("downsample", [1.5, 2, 3, 4.1, 7, 10.4, 20])
@pytest.mark.parametrize("origin", [(0, 0), (-33, 41), (311.5, 7.25)])
def test_painted_square_lies_where_it_was_painted(tmp_path, downsample, origin):
    # Level downsamples 1, 3.004..., 7.05...: no whole numbers.
    path = painted_slide(tmp_path / "a.tiff", [(1300, 900), (433, 300), (185, 127)])
    x, y = origin
    with Slide(path) as slide:
        width, height = math.ceil((1300 - x) / downsample), math.ceil((900 - y) / downsample)
        painted = slide.read(x, y, width, height, downsample)[..., 1] < 140
    rows, cols = np.nonzero(painted)
    assert x + cols.min() * downsample == pytest.approx(600, abs=1.01 * downsample)
    assert x + (cols.max() + 1) * downsample == pytest.approx(800, abs=1.01 * downsample)
    assert y + rows.min() * downsample == pytest.approx(300, abs=1.01 * downsample)
    assert y + (rows.max() + 1) * downsample == pytest.approx(400, abs=1.01 * downsample)


def test_resampling_averages_before_it_reduces(tmp_path):
    """One-pixel stripes of 0 and 200 give an even 100, no moire."""
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 200
    with Slide(write_pyramid_tiff(tmp_path / "a.tiff", [stripes], 64, 0.25, None)) as slide:
        inside = slide.read(32, 32, 24, 24, 8)
    assert np.abs(inside.astype(int) - 100).max() <= 2


def test_finest_sufficient_level_is_read(tmp_path):
    """Each level has its own colour."""
    levels = [np.full((800 // d, 800 // d, 3), d * 20) for d in (1, 2, 8)]
    with Slide(write_pyramid_tiff(tmp_path / "a.tiff", levels, 64, 0.25, None)) as slide:

        def colour(downsample):
            return slide.read(80, 80, 8, 8, downsample)[4, 4, 0]

        downsamples = [0.5, 1, 1.9, 1.99, 2, 3, 7.9, 7.95, 8, 30]
        assert [colour(d) for d in downsamples] == [20, 20, 20, 40, 40, 40, 40, 160, 160, 160]


def test_thumbnail_covers_the_bounds(tmp_path, smooth):
    with Slide(write_pyramid_tiff(tmp_path / "a.tiff", [smooth], 256, 0.25, None)) as slide:
        pixels, downsample = slide.thumbnail(130)
        assert pixels.shape == (90, 130, 3)
        assert downsample == 10
        assert np.abs(pixels[45, 65].astype(int) - smooth[455, 655]).max() <= 1
        assert slide.thumbnail(5000)[1] == 1


# Bounds and transparency.


def test_mrxs_bounds_and_pixels(tmp_path, noise):
    pixels = noise[:300, :400]
    path = write_mrxs(tmp_path / "a.mrxs", pixels, bounds_x=300, bounds_y=100, mpp=0.2)
    with Slide(path) as slide:
        assert slide.vendor == "mirax"
        assert slide.size == (800, 800)
        assert slide.bounds == Bounds(300, 100, 400, 300)
        assert slide.mpp == pytest.approx(0.2)
        frame = np.full((800, 800, 3), 255, np.uint8)
        frame[100:400, 300:700] = pixels
        assert np.array_equal(slide.read(0, 0, 800, 800), frame)
        halves = pixels.reshape(150, 2, 200, 2, 3).mean((1, 3))
        assert np.abs(slide.read(300, 100, 200, 150, 2) - halves).max() <= 0.5
        thumbnail, downsample = slide.thumbnail(100)
        assert (thumbnail.shape, downsample) == ((75, 100, 3), 4)
        assert np.abs(thumbnail.mean((0, 1)) - pixels.mean((0, 1))).max() < 1


def test_bounds_of_mrxs_hold_on_every_level(tmp_path):
    """A square at bounds + (90, 30), 120 x 60 px; the bounds begin at an odd px of level 2."""
    pixels = np.full((250, 450, 3), 240, np.uint8)
    pixels[30:90, 90:210] = (180, 40, 90)
    path = write_mrxs(tmp_path / "a.mrxs", pixels, bounds_x=150, bounds_y=50, tile=50, levels=4)
    with Slide(path) as slide:
        assert slide.level_downsamples == (1, 2, 4, 8)
        for downsample in (1, 2, 3, 4, 5.5, 8, 10):
            read = slide.read(150, 50, int(450 / downsample), int(250 / downsample), downsample)
            rows, cols = np.nonzero(read[..., 1] < 140)
            assert cols.min() * downsample == pytest.approx(90, abs=downsample)
            assert (cols.max() + 1) * downsample == pytest.approx(210, abs=downsample)
            assert rows.min() * downsample == pytest.approx(30, abs=downsample)
            assert (rows.max() + 1) * downsample == pytest.approx(90, abs=downsample)


def test_part_of_a_slab_equals_its_own_read_where_bounds_cut_level_pixels(tmp_path, noise):
    """Bounds at 150 px begin half way in a pixel of the level reduced 4 times."""
    path = write_mrxs(tmp_path / "a.mrxs", noise[:300, :400], bounds_x=150, bounds_y=50, tile=50)
    with Slide(path) as slide:
        slab = slide.read(150, 50, 100, 75, 4)
        for col, row in [(0, 0), (1, 2), (2, 1), (31, 40)]:
            patch = slide.read(150 + 4 * col, 50 + 4 * row, 32, 32, 4)
            assert np.array_equal(patch, slab[row : row + 32, col : col + 32])


# Errors.


@pytest.fixture
def damaged_slide(tmp_path):
    """Four JPEG tiles; the lower right one's bytes are destroyed."""
    pixels = np.full((512, 512, 3), (200, 100, 150), np.uint8)
    path = write_pyramid_tiff(tmp_path / "damaged.tiff", [pixels], tile=256, mpp=0.25)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        start, length = page.dataoffsets[3], page.databytecounts[3]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\x00" * length)
    return path


def test_undecodable_region_is_an_error_each_time_and_never_white(damaged_slide):
    with Slide(damaged_slide) as slide:
        for _ in range(3):
            with pytest.raises(
                SlideReadError, match=r"damaged\.tiff: the region at level-0 px \(300, 260\)"
            ):
                slide.read(300, 260, 64, 64)


def test_other_regions_of_a_damaged_slide_stay_readable(damaged_slide):
    with Slide(damaged_slide) as slide:
        for x, y in [(0, 0), (256, 0), (0, 256)]:
            with pytest.raises(SlideReadError):
                slide.read(200, 200, 100, 100)
            read = slide.read(x, y, 256, 256).astype(int)
            assert np.abs(read - (200, 100, 150)).max() <= 3


def test_only_boxes_over_damage_are_lost_of_those_that_openslide_is_asked_for_together(
    damaged_slide, monkeypatch
):
    """The damage begins at px 256, in one of three boxes; together they touch a square of cells."""
    monkeypatch.setattr(openslide_level, "SMALLEST_REQUEST_PX", 200)
    asked = []
    with Slide(damaged_slide) as slide:
        level = slide._openslide[0]
        read = level.read_box
        monkeypatch.setattr(level, "read_box", lambda *of: asked.append(of[-1]) or read(*of))
        boxes = np.array([[0, 0, 300, 130], [100, 100, 384, 384], [200, 0, 384, 256]])
        out = np.zeros((384, 384, 3), np.uint8)
        lost = slide.read_under(0, 0, boxes, 1.0, out)
    assert list(lost) == [1]
    assert "damaged.tiff: the region at level-0 px (100, 100), 284 x 284" in lost[1]
    for left, upper, right, lower in boxes[[0, 2]].tolist():
        assert np.abs(out[upper:lower, left:right].astype(int) - (200, 100, 150)).max() <= 3
    assert [list(box) for box in asked] == [[0, 0, 384, 384], *boxes.tolist()]


def test_openslide_is_asked_for_cells_together_where_they_fill_a_rectangle():
    """Cells of 512 px are taken in squares of 4096 px, 8 by 8 of them."""
    square, beside, below = [(0, 0), (0, 1), (1, 0), (1, 1)], [(0, 8)], [(9, 0), (9, 2)]
    frames = openslide_level._frames([*square, *beside, *below], (512, 512)).tolist()
    # Left, upper, right and lower edges.
    assert frames == [[0, 0, 2, 2], [8, 0, 9, 1], [0, 9, 1, 10], [2, 9, 3, 10]]


def test_threads_do_not_take_over_each_others_errors(damaged_slide):
    outcomes = {"good": set(), "bad": set()}
    with Slide(damaged_slide) as slide:

        def read(kind, x):
            for _ in range(25):
                try:
                    outcomes[kind].add(int(slide.read(x, 300, 16, 16).mean()))
                except SlideReadError:
                    outcomes[kind].add("error")

        threads = [
            threading.Thread(target=read, args=arguments)
            for arguments in [("good", 10), ("bad", 300), ("good", 100), ("bad", 400)]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert outcomes["bad"] == {"error"}
    assert "error" not in outcomes["good"] and max(outcomes["good"]) <= 152


def test_transient_error_is_mended_by_a_new_handle(tmp_path, noise):
    path = write_pyramid_tiff(tmp_path / "a.tiff", [noise], 64, 0.25, None)
    intact = path.read_bytes()
    slide = Slide(path)
    path.write_bytes(intact[:1000])
    with pytest.raises(openslide.OpenSlideError):
        slide._file.handle.read_region((0, 0), 0, (64, 64))
    path.write_bytes(intact)
    with pytest.raises(openslide.OpenSlideError):  # The latch.
        slide._file.handle.read_region((0, 0), 0, (64, 64))
    assert np.array_equal(slide.read(5, 6, 20, 10), noise[6:16, 5:25])


def test_closed_slide_lets_go_of_its_file_and_reading_opens_it_again(tmp_path, noise):
    slide = Slide(write_pyramid_tiff(tmp_path / "a.tiff", [noise], 64, 0.25, None))
    handle = weakref.ref(slide._file.handle)
    slide.close()
    assert handle() is None
    assert np.array_equal(slide.read(5, 6, 20, 10), noise[6:16, 5:25])


def test_unreadable_svs_opens_and_fails_at_the_first_read(test_data):
    with Slide(test_data / "openslide-python/unreadable.svs") as slide:
        for _ in range(2):
            with pytest.raises(SlideReadError, match=r"unreadable\.svs.*Bogus marker length"):
                slide.read(0, 0, 16, 16)


# Real slides.


@pytest.mark.parametrize(
    ("name", "vendor", "size", "mpp"),
    [
        ("libvips/CMU-1-Small-Region.svs", "aperio", (2220, 2967), 0.499),
        ("luna/1065626.svs", "aperio", (11952, 10249), 0.5026),
        (
            "google-medical-imaging/multi_frame_jpeg_camelyon_challenge_image.dcm",
            "dicom",
            (1152, 700),
            28.9685,
        ),
        ("openslide-python/boxes_0.dcm", "dicom", (16, 16), 0.499),
    ],
)
def test_real_slides(test_data, name, vendor, size, mpp):
    with Slide(test_data / name) as slide:
        assert (slide.vendor, slide.size, slide.bounds) == (vendor, size, Bounds(0, 0, *size))
        assert slide.mpp == pytest.approx(mpp, rel=1e-4)
        corner = slide.read(size[0] - 8, size[1] - 8, 16, 16)
        assert (corner[8:] == 255).all() and (corner[:, 8:] == 255).all()
        assert corner[:8, :8].min() < 255


def test_level_1_of_a_real_slide_lies_on_level_0(test_data):
    """The stored level and level 0, reduced by us, show the same tissue in the same place."""
    with Slide(test_data / "luna/1065626.svs") as slide:
        downsample = slide.downsample(level=1)
        stored = slide.read(4700, 6100, 192, 160, downsample).astype(float)
        fine = slide.read(4700, 6100, 768, 640, 1).astype(float)
    reduced = fine.reshape(160, 4, 192, 4, 3).mean((1, 3))
    assert stored.std() > 5
    assert np.corrcoef(stored.ravel(), reduced.ravel())[0, 1] > 0.95
