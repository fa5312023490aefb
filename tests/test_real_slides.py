"""Real slides of every kind, and broken ones beside them, through tile and heatmap."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import tifffile
import yaml
import zarr
from slide_files import write_pyramid_tiff

from wsi_pipeline.jobs.record import read_failures
from wsi_pipeline.models.card import ModelCard
from wsi_pipeline.models.checkpoint import save_model
from wsi_pipeline.models.start import start_model
from wsi_pipeline.models.vgg16 import IMAGENET_MEAN, IMAGENET_STD
from wsi_pipeline.patches.index import read_index

MONUSEG = "TCGA-A7-A13E-01Z-00-DX1"


def wsi(*arguments):
    command = [sys.executable, "-c", "from wsi_pipeline.cli import main; main()"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(test_data, tmp_path_factory):
    """Tile and heatmap over the whole catalog; what the two commands left with."""
    folder = tmp_path_factory.mktemp("real")
    pixels = tifffile.imread(test_data / f"monuseg/{MONUSEG}.tif")[..., :3]
    write_pyramid_tiff(folder / "monuseg.tif", [pixels], mpp=0.25)
    dicom = "multi_frame_jpeg_camelyon_challenge_image.dcm"
    rows = [
        ("cmu", test_data / "libvips/CMU-1-Small-Region.svs",
         test_data / "luna/CMU-1-Small-Region.dsa.geojson", 1),
        ("luna", test_data / "luna/1065626.svs", "", 0),
        ("camelyon", test_data / "google-medical-imaging" / dicom, "", 0),
        ("monuseg", folder / "monuseg.tif", test_data / f"monuseg/{MONUSEG}.xml", 1),
        ("unreadable", test_data / "openslide-python/unreadable.svs", "", 0),
        ("unopenable", test_data / "openslide-python/unopenable.tiff", "", 0),
        ("malformed", test_data / "libvips/CMU-1-Small-Region.svs.copy",
         test_data / "luna/CMU-1-Small-Region.jill.geojson", 1),
    ]  # fmt: skip
    copy = folder / "malformed.svs"
    copy.write_bytes((test_data / "libvips/CMU-1-Small-Region.svs").read_bytes())
    table = pd.DataFrame(rows, columns=["slide_id", "path", "annotation", "label"])
    table.loc[table["slide_id"] == "malformed", "path"] = copy
    table["split"] = "test"
    table["mpp"] = [None, None, None, None, 0.5, 0.5, None]
    table.to_csv(folder / "slides.csv", index=False)
    settings = {
        "out": str(folder / "run"),
        "catalog": {"csv": str(folder / "slides.csv")},
        "tile": {"patch_px": 64, "stride_px": 64, "inner_px": 64},
        "heatmap": {"batch_size": 64},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    tiled = wsi("tile", "-c", folder / "run.yaml")
    card = ModelCard(
        architecture="vgg16", mean=IMAGENET_MEAN, std=IMAGENET_STD, patch_px=64, mpp=0.5
    )
    save_model(folder / "run/models/vgg16", start_model("vgg16", "none"), card)
    predicted = wsi("heatmap", "-c", folder / "run.yaml")
    return folder / "run", tiled, predicted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slide_id", "tissue", "positive"),
    [
        # shares of the slide: seen once, with the mask looked at; the bounds leave room
        ("cmu", (0.3, 0.55), True),
        ("luna", (0.001, 0.03), False),
        ("camelyon", (0.3, 0.6), False),  # with the strands in the fat
        ("monuseg", (0.95, 1.0), True),
    ],
)
def test_readable_slides_have_their_tissue_tiled_and_predicted(run, slide_id, tissue, positive):
    folder = run[0]
    index = read_index(folder / "patches" / f"{slide_id}.parquet")
    assert tissue[0] < index.table.num_rows / np.prod(index.grid.shape) <= tissue[1]
    assert (index.table["label"].to_numpy() == 1).any() == positive
    heatmap = zarr.open_group(folder / f"heatmaps/vgg16/{slide_id}.zarr", mode="r")["0"][:]
    assert heatmap.shape == index.grid.shape
    predicted = np.isfinite(heatmap)
    assert predicted.sum() == index.table.num_rows
    assert ((heatmap[predicted] >= 0) & (heatmap[predicted] <= 1)).all()


@pytest.mark.slow
def test_broken_slides_are_listed_with_a_reason_while_the_rest_completes(run):
    folder, tiled, predicted = run
    reasons = {row.slide_id: row for row in read_failures(folder)}
    assert set(reasons) == {"unreadable", "unopenable", "malformed"}
    assert "unopenable.tiff" in reasons["unopenable"].reason
    assert "jill.geojson" in reasons["malformed"].reason
    assert reasons["malformed"].error == "AnnotationError"
    assert reasons["unreadable"].error == "SlideReadError"
    assert tiled.returncode == 1
    assert "Traceback" not in tiled.stderr
    assert predicted.returncode == 0, predicted.stderr


@pytest.mark.slow
def test_a_slide_far_from_the_models_resolution_gets_a_note(run):
    lines = (run[0] / "done" / "heatmap-vgg16.jsonl").read_text().splitlines()
    notes = {line["key"]: line["result"]["notes"] for line in map(json.loads, lines)}
    assert notes["cmu"] == []
    assert "28.97 um per px" in notes["camelyon"][0]
