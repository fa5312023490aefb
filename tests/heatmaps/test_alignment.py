"""Dark squares painted on a white slide: where does the heatmap, by its own metadata, put them?"""

from functools import cache

import numpy as np
import pytest
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader
from PIL import Image
from scipy import ndimage
from slide_files import write_mrxs, write_pyramid_tiff

from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.heatmaps.fine import coarse_slabs, predict_pixels, wanted_pixels
from wsi_pipeline.heatmaps.predict import predict_slab
from wsi_pipeline.heatmaps.store import create_heatmap, finish_heatmap, write_chunk
from wsi_pipeline.patches.slabs import slabs
from wsi_pipeline.slides.reader import Slide

WIDTH, HEIGHT, MPP = 2600, 2000, 0.25
# x0, y0, x1, y1 from the corner of the scanned part, level-0 px; on no grid's steps; top to bottom.
SQUARES = [(213, 131, 713, 631), (1501, 407, 2203, 1109), (333, 1279, 707, 1653)]


def painted():
    pixels = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    for x0, y0, x1, y1 in SQUARES:
        pixels[y0:y1, x0:x1] = 0
    return pixels


def reduced(pixels, downsample):
    size = round(WIDTH / downsample), round(HEIGHT / downsample)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def tiff(path, *downsamples):
    pixels = painted()
    levels = [pixels, *(reduced(pixels, downsample) for downsample in downsamples)]
    return write_pyramid_tiff(path / "painted.tiff", levels, mpp=MPP)


def mrxs(path, bounds_x, bounds_y):
    return write_mrxs(path / "painted.mrxs", painted(), bounds_x, bounds_y, mpp=MPP)


def darkness_of_inner_square(patches):
    margin = patches.shape[1] // 4
    inner = patches[:, margin:-margin, margin:-margin]
    return (1 - inner.mean(axis=(1, 2, 3)) / 255).astype(np.float32)


def make_heatmap(path, slide, resolution, stride_px, ngff="0.5"):
    grid = PatchGrid(
        slide.bounds,
        slide.mpp,
        slide.downsample(**resolution),
        patch_px=2 * stride_px,
        stride_px=stride_px,
        inner_px=stride_px,
    )
    cells = np.divmod(np.arange(np.prod(grid.shape)), grid.shape[1])
    create_heatmap(path, grid=grid, slide_id="painted", model="darkness", ngff=ngff)
    for slab in slabs(grid, *cells, chunk=16):
        values, unread = predict_slab(slide, grid, slab, darkness_of_inner_square, batch_size=256)
        assert not unread
        write_chunk(path, slab, values)
    finish_heatmap(path)


def squares_um(path):
    """Spacing and boxes of the dark regions at each level, from pixels and NGFF metadata alone."""
    (node,) = Reader(parse_url(path))()
    transformations = node.metadata["coordinateTransformations"]
    for pixels, (scale, translation) in zip(node.data, transformations, strict=True):
        (spacing, spacing_x), (first_y, first_x) = scale["scale"], translation["translation"]
        assert spacing == spacing_x
        regions, _ = ndimage.label(pixels.compute() > 0.5)
        pixel_boxes = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(regions)]
        # NGFF's coordinates name pixel centres: the edge before pixel i lies at i - 1/2.
        first = np.array([first_x, first_y] * 2)
        yield spacing, first + (np.array(pixel_boxes) - 0.5) * spacing


CASES = {
    "level 0": (tiff, (2, 4), {"level": 0}, 16),
    "whole-number level": (tiff, (2, 4), {"level": 2}, 4),
    "level 3.97": (tiff, (3.97,), {"level": 1}, 4),
    "level 2.03": (tiff, (2.03, 4.06), {"level": 1}, 8),
    "mpp between levels": (tiff, (2, 4), {"mpp": 0.7}, 6),
    "mpp between uneven levels": (tiff, (2.03, 3.97), {"mpp": 0.9}, 4),
    "bounds, level 0": (mrxs, (700, 300), {"level": 0}, 16),
    "bounds, level 1": (mrxs, (700, 300), {"level": 1}, 8),
    "bounds, mpp between levels": (mrxs, (700, 300), {"mpp": 0.7}, 6),
}


@pytest.fixture(scope="module")
def painted_slide(tmp_path_factory):
    """Writes each file once for all the cases that read it."""
    return cache(lambda write, how: write(tmp_path_factory.mktemp("slides"), *how))


@pytest.mark.parametrize(("write", "how", "resolution", "stride_px"), CASES.values(), ids=CASES)
def test_squares_lie_where_they_were_painted(
    tmp_path, painted_slide, write, how, resolution, stride_px
):
    with Slide(painted_slide(write, how)) as slide:
        make_heatmap(tmp_path / "painted.zarr", slide, resolution, stride_px)
        bounds = slide.bounds
    assert (bounds.x, bounds.y) == (how if write is mrxs else (0, 0))
    corner = np.array([bounds.x, bounds.y] * 2)
    truth = (np.array(SQUARES) + corner - 0.5) * MPP

    levels = list(squares_um(tmp_path / "painted.zarr"))

    assert len(levels) == 3
    for spacing, boxes in levels:
        assert boxes.shape == truth.shape
        # A heatmap pixel is dark when more than half of its cells are, so an edge is off by half
        # a pixel at most, and a little for resampling: a slip of a pixel would show.
        assert np.abs(boxes - truth).max() <= 0.6 * spacing


def darkness_of_centres(patch_px, stride_px):
    """A dense model: how dark the pixel is on which each patch is centred."""

    def predict(image):
        rows, cols = ((n - patch_px) // stride_px + 1 for n in image.shape[:2])
        centres = image[patch_px // 2 :: stride_px, patch_px // 2 :: stride_px, 0]
        return (1 - centres[:rows, :cols] / 255).astype(np.float32)

    return predict


FINE_CASES = ("level 0", "level 2.03", "bounds, level 1", "bounds, mpp between levels")


@pytest.mark.parametrize("case", FINE_CASES)
def test_squares_of_a_fine_heatmap_lie_where_they_were_painted(tmp_path, painted_slide, case):
    write, how, resolution, _ = CASES[case]
    with Slide(painted_slide(write, how)) as slide:
        downsample = slide.downsample(**resolution)
        coarse = PatchGrid(slide.bounds, slide.mpp, downsample, 64, 32, 32)
        grid = coarse.finer(patch_px=11, stride_px=round(12 / downsample))
        predict = darkness_of_centres(grid.patch_px, grid.stride_px)
        create_heatmap(tmp_path / "fine.zarr", grid=grid, slide_id="s", model="darkness", chunk=64)
        cells = np.divmod(np.arange(np.prod(coarse.shape)), coarse.shape[1])
        for slab in coarse_slabs(grid, coarse, *cells, chunk=64):
            pixels = wanted_pixels(grid, coarse, slab, chunk=64)
            values, _ = predict_pixels(slide, grid, pixels, predict)
            write_chunk(tmp_path / "fine.zarr", pixels, values)
        bounds = slide.bounds
    finish_heatmap(tmp_path / "fine.zarr")
    truth = (np.array(SQUARES) + [bounds.x, bounds.y] * 2 - 0.5) * MPP
    sampled = 0.0
    for spacing, boxes in squares_um(tmp_path / "fine.zarr"):
        assert boxes.shape == truth.shape
        # A fine pixel is a sample: an edge between two is off by half their step at the most, and
        # by half a working px, the sample itself. A coarser level adds half of its own pixel.
        assert np.abs(boxes - truth).max() <= 0.5 * spacing + sampled + 0.5 * downsample * MPP
        sampled = sampled or 0.5 * spacing


def test_both_ngff_versions_put_the_squares_at_the_same_places(tmp_path, painted_slide):
    with Slide(painted_slide(mrxs, (700, 300))) as slide:
        for ngff in ("0.5", "0.4"):
            make_heatmap(tmp_path / ngff, slide, {"level": 2}, 8, ngff)
    for (_, new), (_, old) in zip(
        squares_um(tmp_path / "0.5"), squares_um(tmp_path / "0.4"), strict=True
    ):
        np.testing.assert_array_equal(new, old)
