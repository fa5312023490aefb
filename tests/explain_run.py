"""A run made by hand for tests of explanations: one slide, one small PatchNet of random weights.

The slide has 256 x 256 px of 0.5 um; patches of 32 px at downsample 2, one each 32 level-0 px, with
inner squares of 16 px: cell (row, col) has its inner square at level-0 px (32 col, 32 row) and its
patch at (32 col - 16, 32 row - 16).
"""

import numpy as np
import pandas as pd
import pyarrow as pa
import shapely
import torch
from slide_files import write_pyramid_tiff

from wsi_pipeline.config import Config
from wsi_pipeline.evaluation.patch_scores import write_scores
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.models.card import ModelCard, read_card
from wsi_pipeline.models.checkpoint import save_model
from wsi_pipeline.models.patchnet import PatchNet
from wsi_pipeline.patches.index import SCHEMA, PatchIndex, write_index
from wsi_pipeline.stages import explain
from wsi_pipeline.stages.run_directory import SLIDE_COLUMNS, evaluation_folder, index_path, model_id

GRID = PatchGrid(Bounds(0, 0, 256, 256), 0.5, 2.0, 32, 16, 16)
# Lesion 1 fills cell (3, 3) and halves its neighbours; lesion 2 lies inside cell (1, 6).
LESIONS = (shapely.box(96, 96, 144, 144), shapely.box(200, 40, 216, 56))
SCORES = {(3, 3): 0.9, (3, 4): 0.95, (4, 3): 0.6, (1, 6): 0.3, (6, 1): 0.85, (6, 6): 0.7}
METHODS = ("patchnet", "saliency")


def write_run(tmp_path):
    """A run directory as the evaluate stage leaves it, in what the explain stage reads."""
    rng = np.random.default_rng(0)
    slide = write_pyramid_tiff(
        tmp_path / "s.tif", [rng.integers(0, 255, (256, 256, 3))], tile=64, compression="zlib"
    )
    annotation = tmp_path / "s.geojson"
    annotation.write_text(shapely.to_geojson(shapely.MultiPolygon(LESIONS)))
    row = ("s", str(slide), str(annotation), "p", "test", 1, 0.5, 256, 256, "ok")
    run = tmp_path / "run"
    run.mkdir()
    pd.DataFrame([row], columns=SLIDE_COLUMNS).to_parquet(run / "slides.parquet")
    card = ModelCard(
        architecture="patchnet", arguments={"patch_px": 9, "stride_px": 9, "filters": 3,
        "layers": 2}, mean=(0.5,) * 3, std=(0.25,) * 3, patch_px=32, mpp=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(run / "models/net", PatchNet(**card.arguments), card)
    write_evaluation(run)
    return run


def write_evaluation(run):
    rows, cols = np.indices(GRID.shape).reshape(2, -1)
    inner = shapely.box(*GRID.inner_boxes(rows, cols).T)
    area = np.array([shapely.area(shapely.intersection(inner, lesion)) for lesion in LESIONS])
    x, y = GRID.patch_origins(rows, cols)
    columns = {
        "x": x,
        "y": y,
        "tissue": np.ones(len(x), np.float32),
        "coverage": (area.sum(0) / 32**2).astype(np.float32),
        "label": (area.sum(0) > 0).astype(np.int8),
        "lesions": [[i + 1 for i in range(2) if of_cell[i]] for of_cell in area.T],
    }
    table = pa.table(columns, schema=SCHEMA)
    index_path(run, "s").parent.mkdir()
    write_index(PatchIndex("s", GRID, table), index_path(run, "s"))
    folder = evaluation_folder(run, "net")
    (folder / "slides").mkdir(parents=True)
    scores = [SCORES.get(cell, 0.1) for cell in zip(rows, cols, strict=True)]
    write_scores(folder, "s", table, np.array(scores, np.float32))
    (folder / "slides.csv").write_text("split,slide_id,label\ntest,s,1\n")
    # Detections lie at the centres of cells (6, 1) and (6, 6).
    (folder / "false_positives.csv").write_text(
        "slide_id,probability,x,y\ns,0.85,48,208\ns,0.7,208,208\n"
    )
    write_lesions(folder, "missed")
    model = model_id("net", read_card(run / "models/net").weights_sha256)
    (folder / "report.html").write_text(
        f"before <!-- explanations of {model} --> none <!-- end of explanations --> after"
    )


def write_lesions(folder, status_of_the_second):
    (folder / "lesions.csv").write_text(
        "slide_id,lesion_id,status,patch_score\n"
        f"s,2,{status_of_the_second},0.3\ns,1,found,0.95\ns,3,missed,-inf\n"
    )


def settings(run, **sections):
    values = {
        "out": run,
        "catalog": {"csv": "slides.csv"},
        "tile": {"level": None, "mpp": 1.0, "patch_px": 32, "stride_px": 16, "inner_px": 16},
        "train": {"name": "net", "model": "patchnet", "weights": "none"},
        "explain": {"methods": METHODS, "top": 1, "patches": 4, "trust_patches": 1},
    }
    for name, section in sections.items():
        values[name] = values[name] | section
    return Config.model_validate(values)


def run_stage(config, client, **asked):
    return explain.run(config, client, explain.plan_explanations(config, **asked))
