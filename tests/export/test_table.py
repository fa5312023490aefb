"""Tables of patches, read by the standard library and by pyarrow."""

import csv
import gzip

import numpy as np
import pyarrow.parquet
import pytest
from planted import GRIDS, LESION, lesion_box, planted

from wsi_pipeline.errors import ExportError, RunError
from wsi_pipeline.export.table import write_patches
from wsi_pipeline.geometry import Bounds, PatchGrid

COLUMNS = ["slide_id", "x", "y", "width", "mpp", "probability"]


def read(path):
    """Rows as a foreign program reads them: lists of text or numbers."""
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        return table.column_names, [list(row.values()) for row in table.to_pylist()]
    packed = path.suffix == ".gz"
    with gzip.open(path, "rt") if packed else path.open(newline="") as file:
        head, *rows = csv.reader(file)
    return head, [[row[0], *map(int, row[1:3]), *map(float, row[3:])] for row in rows]


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".parquet"])
def test_a_row_for_each_patch_with_a_prediction(ending, tmp_path):
    # Stride 20, inner squares 20, patches of 30 working px of 2 level-0 px: a margin of 5.
    grid = PatchGrid(Bounds(100, 200, 80, 40), 0.25, 2.0, 30, 20, 20)
    values = np.array([[0.1, np.nan]], np.float32)
    path = tmp_path / f"s{ending}"
    write_patches(path, values=values, grid=grid, slide_id="007")
    head, rows = read(path)
    assert head == COLUMNS
    assert rows == [["007", 90, 190, 60.0, 0.5, pytest.approx(0.1, abs=1e-8)]]


@pytest.mark.parametrize("ending", [".csv.gz", ".parquet"])
@pytest.mark.parametrize("name", GRIDS)
def test_patches_of_the_lesion_are_centred_on_its_heatmap_pixels(name, ending, tmp_path):
    grid, path = GRIDS[name], tmp_path / f"s{ending}"
    values = planted(grid)
    write_patches(path, values=values, grid=grid, slide_id=name)
    _, rows = read(path)
    assert len(rows) == np.isfinite(values).sum()
    centres = np.array([[x + w / 2, y + w / 2] for _, x, y, w, _, p in rows if p == LESION])
    step = grid.stride_px * grid.downsample
    x0, y0, x1, y1 = lesion_box(grid)
    found = [*(centres.min(0) - step / 2), *(centres.max(0) + step / 2)]
    assert np.abs(np.array(found) - [x0, y0, x1, y1]).max() <= 0.5  # whole level-0 px


def test_the_same_table_is_the_same_bytes(tmp_path):
    grid = GRIDS["downsample"]
    for ending in (".csv", ".csv.gz", ".parquet"):
        for part in ("a", "b"):
            write_patches(
                tmp_path / f"{part}{ending}", values=planted(grid), grid=grid, slide_id="s"
            )
        assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()
    assert (tmp_path / "a.csv").read_bytes() == gzip.decompress(
        (tmp_path / "a.csv.gz").read_bytes()
    )


def test_a_heatmap_without_predictions_is_a_table_without_rows(tmp_path):
    grid = GRIDS["plain"]
    for path in (tmp_path / "s.csv", tmp_path / "s.parquet"):
        write_patches(path, values=np.full(grid.shape, np.nan), grid=grid, slide_id="s")
        assert read(path) == (COLUMNS, [])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("s.xlsx", None, r"s\.xlsx: a table of patches ends in \.csv"), ("s.csv", (2, 2), "shape")],
)
def test_bad_input_is_refused_and_leaves_no_file(name, shape, message, tmp_path):
    grid = GRIDS["plain"]
    with pytest.raises((ExportError, RunError), match=message):
        write_patches(
            tmp_path / name, values=np.zeros(shape or grid.shape), grid=grid, slide_id="s"
        )
    assert not list(tmp_path.iterdir())
