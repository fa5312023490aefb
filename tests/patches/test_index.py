import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.errors import CatalogError, RunError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.patches.index import (
    PatchIndex,
    build_index,
    read_index,
    uncovered_lesions,
    write_index,
)
from wsi_pipeline.slides.tissue import TissueMask

BOUNDS = Bounds(1003, 507, 2100, 1501)


def patch_grid(bounds=BOUNDS, downsample=1.7, patch_px=128, stride_px=64, inner_px=64):
    return PatchGrid(bounds, 0.25, downsample, patch_px, stride_px, inner_px)


def all_tissue(bounds=BOUNDS, downsample=10.0):
    shape = (int(bounds.height // downsample) + 1, int(bounds.width // downsample) + 1)
    return TissueMask(np.ones(shape, bool), bounds, downsample)


def index(lesions=(), label=1, grid=None, tissue=None, min_tissue=0.05):
    grid = grid or patch_grid()
    tissue = tissue or all_tissue(grid.bounds)
    return build_index("s1", grid, tissue, lesions, label, min_tissue)


def star(rng, x, y, radius, vertices=40):
    angle = np.linspace(0, 2 * np.pi, vertices, endpoint=False)
    reach = radius * rng.uniform(0.4, 1, vertices)
    return shapely.Polygon(np.stack([x + reach * np.cos(angle), y + reach * np.sin(angle)], 1))


def random_lesions(seed):
    """Three disjoint stars, the first with a hole that holds another; one beyond the bounds."""
    rng = np.random.default_rng(seed)
    outer = star(rng, 1600, 1200, 500).difference(shapely.Point(1600, 1200).buffer(150))
    return [
        outer,
        star(rng, 1600, 1200, 100),
        star(rng, 2600, 800, 300),
        star(rng, 3200, 2000, 250),
    ]


def frame(index):
    return index.table.to_pandas()


def brute_force(grid, lesions, tissue, min_tissue):
    """A loop over all cells; tissue counted on a canvas of level-0 pixels."""
    side = grid.inner_px * grid.downsample
    rows = []
    for row in range(grid.shape[0]):
        for col in range(grid.shape[1]):
            x0 = grid.bounds.x + col * grid.stride_px * grid.downsample
            y0 = grid.bounds.y + row * grid.stride_px * grid.downsample
            square = shapely.box(x0, y0, x0 + side, y0 + side)
            share = shapely.intersection(tissue, square).area / side**2
            if share <= min_tissue:
                continue
            areas = [lesion.intersection(square).area for lesion in lesions]
            margin = (grid.patch_px - grid.inner_px) / 2 * grid.downsample
            rows.append(
                {
                    "x": round(x0 - margin),
                    "y": round(y0 - margin),
                    "tissue": share,
                    "coverage": sum(areas) / side**2,
                    "label": int(sum(areas) > 0),
                    "lesions": [i for i, area in enumerate(areas, 1) if area > 0],
                }
            )
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    "sizes",
    [
        {"downsample": 1.7},
        {"downsample": 1.0},
        {"downsample": 4.000123, "stride_px": 16},  # inner squares overlap
        {"downsample": 1.0, "stride_px": 96, "inner_px": 32},  # and leave gaps
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_index_agrees_with_a_loop_over_all_cells(sizes, seed):
    grid = patch_grid(**sizes)
    lesions = random_lesions(seed)
    mask = np.random.default_rng(seed).random((31, 43)) > 0.5
    tissue = shapely.union_all(
        [
            shapely.box(1003 + 50 * x, 507 + 50 * y, 1053 + 50 * x, 557 + 50 * y)
            for y, x in np.argwhere(mask)
        ]
    )
    found = frame(index(lesions, 1, grid, TissueMask(mask, BOUNDS, 50.0), min_tissue=0.3))
    expected = brute_force(grid, lesions, tissue, 0.3)
    assert 0 < expected["label"].mean() < 1
    for name in ("x", "y", "label"):
        assert found[name].tolist() == expected[name].tolist(), name
    for name in ("tissue", "coverage"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6)
    assert [ids.tolist() for ids in found["lesions"]] == expected["lesions"].tolist()


@st.composite
def regions(draw):
    """Tumour as hand and ruler draw it, on a coarse raster so that its borders meet the grid's."""
    raster_px = draw(st.sampled_from([1, 8, 16, 32]))
    corner = st.tuples(*2 * [st.integers(0, 320 // raster_px)])
    shape = st.lists(corner, min_size=3, max_size=8, unique=True)
    drawn, excluded = (
        shapely.union_all(
            [
                shapely.make_valid(shapely.Polygon(np.multiply(points, raster_px)))
                for points in draw(st.lists(shape, min_size=fewest, max_size=3))
            ]
        )
        for fewest in (1, 0)
    )
    parts = shapely.get_parts(drawn.difference(excluded))
    return [part for part in parts if part.area > 1]


@settings(max_examples=60, deadline=None)
@given(
    regions(),
    st.sampled_from([(32, 32), (32, 12), (32, 16), (32, 48), (20, 31)]),
    st.sampled_from([1.0, 1.7, 0.5, 2.000123]),
)
def test_overlaps_are_those_of_every_square_with_every_lesion(lesions, sizes, downsample):
    inner_px, stride_px = sizes
    grid = PatchGrid(Bounds(0, 0, 320, 280), 0.25, downsample, 64, stride_px, inner_px)
    found = index(lesions, int(bool(lesions)), grid, min_tissue=0).table
    rows, cols = grid.cells_at(found["x"].to_numpy(), found["y"].to_numpy())
    squares = shapely.box(*grid.inner_boxes(rows, cols).T)
    areas = shapely.area(shapely.intersection(squares[:, None], np.array(lesions, object)))
    shares = areas.reshape(len(squares), -1) / (inner_px * downsample) ** 2
    assert found["lesions"].to_pylist() == [
        (np.flatnonzero(row > 1e-9) + 1).tolist() for row in shares
    ]
    np.testing.assert_allclose(found["coverage"].to_numpy(), shares.sum(1), atol=1e-6)


def test_index_is_the_same_whatever_is_worked_on_at_once(monkeypatch):
    grid, lesions = patch_grid(), random_lesions(0)
    whole = index(lesions, grid=grid)
    monkeypatch.setattr("wsi_pipeline.patches.index.CELLS_AT_ONCE", 50)  # 1 row; 50 of its cells
    assert whole.table.num_rows > 250
    assert index(lesions, grid=grid).table.equals(whole.table)


@settings(max_examples=60)
@given(
    st.integers(0, 4000),
    st.integers(0, 4000),
    st.integers(1, 900),
    st.integers(1, 900),
    st.floats(0.3, 9),
    st.data(),
)
def test_no_annotated_pixel_goes_unlabelled(x, y, width, height, downsample, data):
    bounds = Bounds(x, y, width, height)
    grid = patch_grid(bounds, downsample)
    assert (
        shapely.union_all(
            shapely.box(*grid.inner_boxes(*np.indices(grid.shape).reshape(2, -1)).T), grid_size=1e-6
        )
        .buffer(1e-5)
        .contains(shapely.box(x, y, x + width, y + height))
    )
    pixel_x = x + data.draw(st.integers(0, width - 1))
    pixel_y = y + data.draw(st.integers(0, height - 1))
    pixel = shapely.box(pixel_x, pixel_y, pixel_x + 1, pixel_y + 1)
    found = frame(index([pixel], grid=grid, min_tissue=0))
    assert found["label"].sum() >= 1
    square_area = (grid.inner_px * downsample) ** 2
    assert found["coverage"].sum() * square_area == pytest.approx(1, rel=1e-5)


def test_touching_an_edge_or_a_corner_is_not_positive():
    grid = patch_grid(Bounds(0, 0, 300, 300), 1.0, 200, 100, 100)
    found = frame(index([shapely.box(100, 100, 200, 200)], grid=grid))
    assert found["label"].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert found["coverage"].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_rounding_at_a_common_border_is_not_positive():
    grid = patch_grid(Bounds(0, 0, 3000, 3000), downsample=1.1)  # 70.4 px: no exact float
    boxes = grid.inner_boxes(*np.indices(grid.shape).reshape(2, -1)).reshape(*grid.shape, 4)
    lesion = shapely.box(*boxes[7, 9][:2], *boxes[11, 13][2:])
    label = frame(index([lesion], grid=grid))["label"].to_numpy().reshape(grid.shape)
    assert label[7:12, 9:14].all()
    assert label.sum() == 25


def test_a_corner_of_a_pixel_is_enough():
    grid = patch_grid(Bounds(0, 0, 300, 300), 1.0, 200, 100, 100)
    speck = shapely.Polygon([(99.9, 50), (110, 50), (110, 60)])
    found = frame(index([speck], grid=grid))
    assert found["label"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert 0 < found["coverage"][0] < 1e-6  # a triangle 0.1 px wide of 10,000 px


def test_both_lesions_in_one_square_are_listed_and_a_hole_is_none():
    grid = patch_grid(Bounds(0, 0, 300, 100), 1.0, 200, 100, 100)
    ring = shapely.box(-50, -50, 350, 150).difference(shapely.box(90, -10, 210, 110))
    found = frame(index([shapely.box(10, 10, 20, 20).buffer(0), ring], grid=grid))
    assert [ids.tolist() for ids in found["lesions"]] == [[1, 2], [], [2]]
    assert found["coverage"].tolist() == pytest.approx([0.91, 0, 0.9])
    assert found["label"].tolist() == [1, 0, 1]


def test_only_cells_with_more_tissue_than_the_threshold_are_indexed():
    bounds = Bounds(0, 0, 300, 100)
    mask = np.zeros((10, 30), bool)
    mask[:, 10:12] = True  # 0.2 of the second square
    mask[0, 20] = True  # 0.01 of the third
    grid = patch_grid(bounds, 1.0, 200, 100, 100)

    def cells(min_tissue):
        table = index((), 0, grid, TissueMask(mask, bounds, 10.0), min_tissue).table
        return (table["x"].to_numpy() // 100 + 1).tolist(), table["tissue"].to_pylist()

    assert cells(0.0) == ([1, 2], pytest.approx([0.2, 0.01]))
    assert cells(0.05) == ([1], pytest.approx([0.2]))
    assert cells(0.25) == ([], [])


def test_lesion_without_tissue_is_uncovered():
    bounds = Bounds(0, 0, 300, 100)
    mask = np.zeros((10, 30), bool)
    mask[:, :10] = True
    lesions = [
        shapely.box(150, 20, 160, 30),
        shapely.box(10, 10, 20, 20),
        shapely.box(5000, 0, 5010, 10),
    ]
    grid = patch_grid(bounds, 1.0, 200, 100, 100)
    tissue = TissueMask(mask, bounds, 10.0)
    found = index(lesions, 1, grid, tissue)
    assert uncovered_lesions(found, lesions, tissue) == {
        1: "has no tissue in the mask",
        3: "lies outside what was scanned",
    }
    covered = index(lesions[1:2], 1, grid)
    assert uncovered_lesions(covered, lesions[1:2], all_tissue()) == {}


def test_the_true_reason_is_told_of_a_lesion_that_no_patch_can_find():
    bounds = Bounds(0, 0, 400, 400)
    grid = patch_grid(bounds, 1.0, patch_px=100, stride_px=100, inner_px=50)
    # Inner squares at 0 to 50, 100 to 150 ...: a lesion in a gap, one where 1 of 25 px is tissue.
    lesions = [shapely.box(60, 60, 90, 90), shapely.box(210, 210, 220, 220)]
    mask = np.zeros((40, 40), bool)
    mask[:10, :10] = True
    mask[20, 20] = True
    tissue = TissueMask(mask, bounds, 10.0)
    found = build_index("s", grid, tissue, lesions, 1, min_tissue=0.05)
    assert uncovered_lesions(found, lesions, tissue) == {
        1: "lies between the inner squares",
        2: "is in inner squares with 4.0% tissue at most, too little for tile.min_tissue",
    }


@pytest.mark.parametrize(
    ("label", "expected", "coverage"), [(0, 0, 0.0), (1, -1, None), (-1, -1, None)]
)
def test_labels_without_lesions(label, expected, coverage):
    found = frame(index((), label))
    assert set(found["label"]) == {expected}
    if coverage is None:
        assert found["coverage"].isna().all()
    else:
        assert set(found["coverage"]) == {coverage}
    assert all(len(ids) == 0 for ids in found["lesions"])


@pytest.mark.parametrize("label", [0, -1])
def test_lesions_on_a_slide_that_is_not_tumour_are_an_error(label):
    with pytest.raises(CatalogError, match=rf"s1 has label {label} but annotated lesions \(1\)"):
        index([shapely.box(1100, 600, 1200, 700)], label)


def test_coverage_adds_up_to_the_area_of_an_outline_of_20_000_vertices():
    angle = np.linspace(0, 2 * np.pi, 20_000, endpoint=False)
    reach = 1 + 0.05 * np.sin(300 * angle)
    lesion = shapely.Polygon(
        np.stack(
            [102_400 + 60_000 * reach * np.cos(angle), 51_200 + 35_000 * reach * np.sin(angle)], 1
        )
    )
    bounds = Bounds(0, 0, 800 * 256, 400 * 256)
    grid = patch_grid(bounds, 1.0, 512, 256, 256)
    found = index([lesion], grid=grid, tissue=all_tissue(bounds, 256.0))
    assert found.table.num_rows == 320_000
    covered = found.table["coverage"].to_numpy().astype(float).sum() * 256**2
    assert covered == pytest.approx(lesion.area, rel=1e-6)


# Files


def test_index_survives_its_file(tmp_path):
    written = index(random_lesions(0))
    write_index(written, tmp_path / "s1.parquet")
    found = read_index(tmp_path / "s1.parquet")
    assert (found.slide_id, found.grid) == ("s1", written.grid)
    assert found.table.equals(written.table)
    assert [path.name for path in tmp_path.iterdir()] == ["s1.parquet"]
    by_pandas = pd.read_parquet(tmp_path / "s1.parquet")
    pd.testing.assert_frame_equal(by_pandas, frame(written))
    assert (
        pq.ParquetFile(tmp_path / "s1.parquet").metadata.row_group(0).column(0).compression
        == "ZSTD"
    )


def test_index_without_patches_survives_its_file(tmp_path):
    nothing = TissueMask(np.zeros((10, 10), bool), BOUNDS, 300.0)
    lesions = random_lesions(0)
    write_index(index(lesions, tissue=nothing), tmp_path / "s1.parquet")
    found = read_index(tmp_path / "s1.parquet")
    assert found.table.num_rows == 0
    assert [*uncovered_lesions(found, lesions, nothing)] == [1, 2, 3, 4]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s1.parquet"
    write_index(index((), 0), path)
    before = path.read_bytes()

    def full_disk(table, where, **options):
        where.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_index(index(random_lesions(0)), path)
    assert path.read_bytes() == before


def changed_metadata(table, **values):
    metadata = json.loads(table.schema.metadata[b"wsi_pipeline"])
    return table.replace_schema_metadata({"wsi_pipeline": json.dumps({**metadata, **values})})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.drop_columns("coverage"), "coverage"),
        (lambda t: t.replace_schema_metadata(None), "wsi_pipeline"),
        (lambda t: t.replace_schema_metadata({"wsi_pipeline": "{"}), "JSONDecodeError"),
        (lambda t: changed_metadata(t, schema_version=99), "schema version 99, this code reads 1"),
        (lambda t: changed_metadata(t, grid={"mpp": 1}), "grid|bounds"),
        (
            lambda t: changed_metadata(t, grid={**patch_grid().to_dict(), "inner_px": 0}),
            "inner_px is 0",
        ),
        (lambda t: t.set_column(0, "x", pa.array(["a"] * t.num_rows)), "int32"),
        (lambda t: t.set_column(0, "x", pa.array([[1]] * t.num_rows)), "int32"),
        (lambda t: t.set_column(0, "x", pa.array([0.5] * t.num_rows)), "int32"),
    ],
)
def test_damaged_index_is_a_named_error(tmp_path, damage, message):
    path = tmp_path / "s1.parquet"
    write_index(index((), 0), path)
    pq.write_table(damage(pq.read_table(path)), path)
    with pytest.raises(RunError, match=message) as error:
        read_index(path)
    assert str(path) in str(error.value)


def test_missing_or_foreign_file_is_a_named_error(tmp_path):
    with pytest.raises(RunError, match=r"gone\.parquet"):
        read_index(tmp_path / "gone.parquet")
    (tmp_path / "text.parquet").write_text("x,y\n")
    with pytest.raises(RunError, match=r"text\.parquet"):
        read_index(tmp_path / "text.parquet")


def test_cells_are_those_that_the_index_was_made_of():
    found = index()
    rows, cols = found.cells()
    corners = np.stack(found.grid.patch_origins(rows, cols))
    assert np.array_equal(corners, [found.table["x"].to_numpy(), found.table["y"].to_numpy()])
    assert len(rows) > 100


def test_a_patch_off_its_grid_has_no_cell():
    found = index()
    x = found.table["x"].to_numpy().copy()
    x[7] += 1
    moved = PatchIndex("s1", found.grid, found.table.set_column(0, "x", pa.array(x)))
    place = rf"s1: the indexed patch at x {x[7]}, y {found.table['y'][7]} is none of its grid's"
    with pytest.raises(RunError, match=place):
        moved.cells()


def test_index_is_a_value_that_others_may_make():
    made = index((), 0)
    assert isinstance(made, PatchIndex)
    rows, cols = made.grid.cells_at(made.table["x"].to_numpy(), made.table["y"].to_numpy())
    assert (np.diff(rows * made.grid.shape[1] + cols) > 0).all()  # row-major
