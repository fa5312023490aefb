"""Labels by the inner-square rule against the patches that NCRF drew from CAMELYON16.

NCRF labels a patch by its centre point; here a patch is positive iff its inner square intersects
the annotation. A tumour centre is thus positive by this rule, too. The other way round no rule
follows: a centre outside a lesion may well lie within half an inner square of it.
"""

import numpy as np
import pytest
import shapely

from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.patches.index import build_index
from wsi_pipeline.slides.annotations import read_annotation
from wsi_pipeline.slides.tissue import TissueMask

INNER = 256

# Tumour centres that lie in no lesion. In Tumor_107 they lie in a `negative` outline, which NCRF
# disregards when it draws tumour patches and which is cut out here. All of them lie less than
# half an inner square from what is left, so that their patches are positive all the same.
CENTRES_CUT_OUT = {"Tumor_107": 47}

# Normal centres exactly on a lesion's outline.
NORMAL_ON_BORDER = {"Tumor_102": 2}

# Normal centres whose centred inner square, or whose cell of the grid, intersects a lesion:
# NCRF drew its normal patches close to lesions, too.
NORMAL_BUT_POSITIVE = {
    "Tumor_101": (483, 475),
    "Tumor_102": (652, 645),
    "Tumor_103": (105, 104),
    "Tumor_106": (848, 853),
    "Tumor_107": (35, 36),
    "Tumor_109": (356, 350),
}
TUMOURS = sorted(NORMAL_BUT_POSITIVE)
NORMALS = ["Normal_141", "Normal_148", "Normal_150", "Normal_152"]


@pytest.fixture(scope="module")
def ncrf(test_data):
    return test_data / "ncrf"


def centres(ncrf, kind, slide):
    lines = (ncrf / f"coords/{kind}_valid.subset.txt").read_text().split()
    points = [line.split(",")[1:] for line in lines if line.startswith(f"{slide},")]
    return np.array(points, int)


def lesions_of(ncrf, slide):
    return read_annotation(ncrf / f"polygons/valid/{slide}.json", positive=(), exclusion=()).lesions


def in_lesions(points, lesions):
    region = shapely.MultiPolygon(lesions)
    shapely.prepare(region)
    return shapely.covers(region, shapely.points(points))


def centred_labels(points, lesions):
    """Label of the patch centred at each point: a grid of one cell."""
    tree = shapely.STRtree(lesions)
    labels = []
    for x, y in (points - INNER // 2).tolist():
        near = tree.geometries[tree.query(shapely.box(x, y, x + INNER, y + INNER))].tolist()
        bounds = Bounds(x, y, INNER, INNER)
        tissue = TissueMask(np.ones((1, 1), bool), bounds, INNER)
        index = build_index("s", PatchGrid(bounds, 0.25, 1.0), tissue, near, int(bool(near)), 0)
        labels.append(index.table["label"][0].as_py())
    return np.array(labels)


def cell_labels(points, lesions):
    """Label of the cell of the level-0 grid whose inner square holds each point."""
    size = np.ceil(np.max([points.max(0), *(lesion.bounds[2:] for lesion in lesions)], axis=0))
    width, height = (int(length) + INNER for length in size)
    bounds = Bounds(0, 0, width, height)
    grid = PatchGrid(bounds, 0.25, 1.0)
    tissue = TissueMask(np.ones((1, 1), bool), bounds, max(width, height))
    table = build_index("s", grid, tissue, lesions, int(bool(lesions)), 0).table
    labels = np.full(grid.shape, -1)
    labels[grid.cells_at(table["x"].to_numpy(), table["y"].to_numpy())] = table["label"].to_numpy()
    rows, cols = points[:, 1] // INNER, points[:, 0] // INNER
    boxes = grid.inner_boxes(rows, cols)
    assert ((boxes[:, :2] <= points) & (points < boxes[:, 2:])).all()
    return labels[rows, cols]


@pytest.mark.parametrize("slide", TUMOURS)
def test_every_tumour_centre_is_positive(ncrf, slide):
    points, lesions = centres(ncrf, "tumor", slide), lesions_of(ncrf, slide)
    assert len(points) == 2000
    assert (~in_lesions(points, lesions)).sum() == CENTRES_CUT_OUT.get(slide, 0)
    assert centred_labels(points, lesions).tolist() == [1] * 2000
    assert cell_labels(points, lesions).tolist() == [1] * 2000


@pytest.mark.parametrize("slide", TUMOURS)
def test_normal_centres_are_positive_only_close_to_a_lesion(ncrf, slide):
    points, lesions = centres(ncrf, "normal", slide), lesions_of(ncrf, slide)
    assert in_lesions(points, lesions).sum() == NORMAL_ON_BORDER.get(slide, 0)
    centred, cells = centred_labels(points, lesions), cell_labels(points, lesions)
    assert (centred.sum(), cells.sum()) == NORMAL_BUT_POSITIVE[slide]
    # An inner square reaches 128 px from its centre, its corners sqrt(2) times as far.
    distance = shapely.distance(shapely.MultiPolygon(lesions), shapely.points(points))
    assert distance[centred == 1].max() < INNER / 2 * np.sqrt(2)
    assert distance[centred == 0].min() >= INNER / 2
    assert distance[cells == 1].max() < INNER * np.sqrt(2)


@pytest.mark.parametrize("slide", NORMALS)
def test_normal_slides_have_no_positive_patch(ncrf, slide):
    points, lesions = centres(ncrf, "normal", slide), lesions_of(ncrf, slide)
    assert len(points) > 300
    assert lesions == ()
    assert not cell_labels(points, lesions).any()
